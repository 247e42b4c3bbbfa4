"""Reports of programs of several devices, against counts by hand, and what ``check`` finds wrong.

Run one by hand: ``PYTHONPATH=tests/helpers XLA_FLAGS=--xla_force_host_platform_device_count=8
python tests/hlo/test_hlo_devices.py NAME``.
"""

from __future__ import annotations

from collections import Counter
import functools
import itertools
import math
from pathlib import Path
from typing import Any

from eight_devices import assert_passed, main
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import optax
import pytest

import adamw_xla as ax

DEVICES = 8
SHAPES = {"w": (512, 256), "u": (256, 512), "b": (512,)}
PARAMS = sum(map(math.prod, SHAPES.values()))
CUT, WHOLE = {k: P("x") for k in SHAPES}, {k: P() for k in SHAPES}
COLUMNS = {"w": P(None, "x"), "u": P("x"), "b": P()}
LAYOUTS = {
    "data": (WHOLE, WHOLE),
    "fsdp": (CUT, CUT),
    "tensor": (COLUMNS, COLUMNS),
    "zero1": (WHOLE, CUT),
}
"""How params lie, and how the state does."""


@functools.cache
def mesh() -> Any:
    return jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))


def at(specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh(), spec), specs)


def loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["u"] + params["b"]) ** 2)


def ours(params: Any, specs: Any) -> tuple[Any, Any, Any]:
    config = ax.AdamW(global_clipnorm=1.0)

    def step(params: Any, grads: Any, state: Any) -> Any:
        return ax.adamw_step(params, grads, state, config)

    state = jax.eval_shape(functools.partial(ax.adamw_init, config=config), params)
    return step, state, ax.AdamWState(NamedSharding(mesh(), P()), at(specs), at(specs))


def theirs(params: Any, specs: Any) -> tuple[Any, Any, Any]:
    adamw = optax.adamw(1e-3)

    def step(params: Any, grads: Any, state: Any) -> Any:
        updates, state = adamw.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(adamw.init, params)
    adam, *rest = state
    places = adam._replace(count=NamedSharding(mesh(), P()), mu=at(specs), nu=at(specs))
    return step, state, (places, *rest)


OPTIMIZERS = {"ours": ours, "optax": theirs}


@functools.cache
def compiled(who: str, layout: str, *, donate: bool = True, gathered: bool = False) -> Any:
    """A train step; one that hands out the new moments whole if ``gathered``."""
    params_at, state_at = LAYOUTS[layout]
    params = {k: jax.ShapeDtypeStruct(shape, "float32") for k, shape in SHAPES.items()}
    optimize, state, places = OPTIMIZERS[who](params, state_at)
    _, _, new_places = OPTIMIZERS[who](params, WHOLE if gathered else state_at)

    def train_step(params: Any, state: Any, x: jax.Array) -> Any:
        grads = jax.grad(loss)(params, x)
        if layout == "zero1":
            grads = jax.lax.with_sharding_constraint(grads, at(state_at))
        return optimize(params, grads, state)

    jitted = jax.jit(
        train_step,
        donate_argnums=(0, 1) if donate else (),
        in_shardings=(at(params_at), places, NamedSharding(mesh(), P("x"))),
        out_shardings=(at(params_at), new_places),
    )
    return jitted.lower(params, state, jax.ShapeDtypeStruct((64, 512), "float32")).compile()


def check(found: ax.hlo.Report, **wanted: Any) -> list[str]:
    """What it finds wrong."""
    try:
        found.check(**wanted)
    except ax.hlo.CheckError as error:
        return str(error).splitlines()[1:]
    return []


# --------------------------------------------------------------------------- counts by hand


def exchanged(found: ax.hlo.Report, part: str) -> Counter[str]:
    """Bytes of each kind."""
    sizes: Counter[str] = Counter()
    for x in found.collectives:
        sizes[x.kind] += x.bytes_of.get(part, 0)
    return +sizes


def bytes_per_device() -> None:
    """Params, gradients and moments are read once, params and moments written once."""
    for layout in LAYOUTS:
        found = ax.hlo.report(compiled("ours", layout))
        assert found.devices == DEVICES, layout
        here = {"data": PARAMS, "tensor": 2 * 512 * 256 // DEVICES + 512}.get(
            layout, PARAMS // DEVICES
        )
        assert found.parameters == here, (layout, found.parameters)
        least = found.update.least_bytes or 0
        # ZeRO's new params are written once more, whole, as they are gathered.
        hand = here * (28 if layout != "zero1" else 24 + 4 * DEVICES)
        assert hand <= least <= hand + 4 * 16 * 3, (layout, least, hand)
        gathered = {"all-gather": 4 * PARAMS} if layout == "zero1" else {}
        assert exchanged(found, "update") == gathered, (layout, found.collectives)
        norm = exchanged(found, "norm")
        # Two sums a leaf at most, of what is not whole on each device.
        assert set(norm) <= {"all-reduce"}, (layout, norm)
        assert norm["all-reduce"] <= 2 * 4 * len(SHAPES), (layout, norm)
        assert (norm["all-reduce"] > 0) == (layout != "data"), (layout, norm)
        assert all(x.devices == DEVICES for x in found.collectives), layout


def leaves() -> None:
    """Each has its param's path, and the kernel that writes the param."""
    for who in OPTIMIZERS:
        for layout in LAYOUTS:
            found = ax.hlo.report(compiled(who, layout))
            assert [x.name for x in found.leaves] == [f"params[{k!r}]" for k in sorted(SHAPES)]
            if (who, layout) == ("ours", "zero1"):
                gathers = {x.name for x in found.collectives if x.kind == "all-gather"}
                assert all(gathers & {*x.kernels} for x in found.leaves), found.leaves


def memory() -> None:
    """The arguments are as large as XLA says."""
    for layout in LAYOUTS:
        program = compiled("ours", layout)
        found, known = ax.hlo.report(program), program.memory_analysis()
        assert sum(x.bytes for x in found.inputs) == known.argument_size_in_bytes, layout


def words() -> None:
    said = str(ax.hlo.report(compiled("ours", "zero1")))
    assert "compiled for cpu, 8 devices; figures are of each of them" in said
    assert "exchanges 3 all-gather of 1.05 MB" in said
    assert "8 devices" not in str(ax.hlo.report(jax.jit(jnp.sin).lower(1.0).compile()))


# ------------------------------------------------------------------------ planted mistakes


def as_it_should_be() -> None:
    for who, layout in itertools.product(OPTIMIZERS, LAYOUTS):
        axis = None if layout == "data" else "x"
        found = ax.hlo.report(compiled(who, layout))
        wrong = check(found, donated=True, no_gather_of_state=True, state_sharded_over=axis)
        if who == "optax":  # whose params XLA:CPU copies, after some of them are written
            wrong = [line for line in wrong if "is copied all the same" not in line]
        assert wrong == [], (who, layout, wrong)


def zero1_that_is_none() -> None:
    for who, names in {"ours": ("m", "v"), "optax": ("mu", "nu")}.items():
        wrong = check(ax.hlo.report(compiled(who, "data")), state_sharded_over="x")
        assert len(wrong) == 4, wrong
        for name, key in itertools.product(names, ("u", "w")):
            said = "is not cut over 'x': it is whole on each device, 524288 bytes"
            assert any(f".{name}[{key!r}] {said}" in line for line in wrong), (name, key, wrong)


def lost_donation() -> None:
    for who in OPTIMIZERS:
        wrong = check(ax.hlo.report(compiled(who, "zero1", donate=False)), donated=True)
        assert len(wrong) == 3 * len(SHAPES), wrong
        assert all("was not donated: name it in donate_argnums" in line for line in wrong)


def gathered_state() -> None:
    for who in OPTIMIZERS:
        found = ax.hlo.report(compiled(who, "zero1", gathered=True))
        wrong = check(found, no_gather_of_state=True)
        assert wrong, found.collectives
        assert any("all-gather" in line for line in wrong), wrong


def other_mistakes() -> None:
    found = ax.hlo.report(compiled("ours", "fsdp"))
    assert check(found, kernels_at_most=3) == [
        f"  {found.program.count} kernels, and 3 are allowed"
    ]
    wrong = check(found, in_host_memory=True)
    assert len(wrong) == 2 * len(SHAPES), wrong
    assert all("does not lie in the host's memory: it is device" in line for line in wrong)
    text = ax.hlo.report(compiled("ours", "fsdp").as_text())
    wrong = check(text, state_sharded_over="x")
    assert all("a text does not say how it is cut; pass the compiled" in line for line in wrong)
    assert len(wrong) == 4, wrong
    assert check(found, state_sharded_over="dta") == [
        "  no argument is cut over 'dta'; they are over x"
    ]
    sine = ax.hlo.report(jax.jit(jnp.sin).lower(1.0).compile())
    (line,) = check(sine, donated=True)
    assert "the state was not found among the arguments" in line


CHECKS = (
    bytes_per_device,
    leaves,
    memory,
    words,
    as_it_should_be,
    zero1_that_is_none,
    lost_donation,
    gathered_state,
    other_mistakes,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_on_eight_devices(name: str) -> None:
    assert_passed(name, Path(__file__))


if __name__ == "__main__":
    main({check.__name__: check for check in CHECKS})
