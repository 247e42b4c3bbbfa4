"""Norms, and the search for what is not finite, inside of ``shard_map``: those of one device.

Run one by hand: ``PYTHONPATH=tests/helpers XLA_FLAGS=--xla_force_host_platform_device_count=8
python tests/pod/test_manual_norms.py NAME``.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import itertools
from pathlib import Path
import re
from typing import Any

from by_hand import (
    FRONTS,
    OPTIONS,
    RATE,
    SETS,
    SHAPES,
    SPECS,
    STEPS,
    axis_names,
    mesh_of,
    moments,
    noise,
    run,
    specs_of,
    spread,
    tree,
)
from eight_devices import assert_passed, main
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import oracle
import pytest

import adamw_xla as ax

HALF_A_UNIT = 2.0**-24
COUNTERS = ("count", "micro_step", "skipped")


def compare(shape: tuple[int, ...], vma: bool, front: str, option: str) -> None:
    options = OPTIONS[option]
    start = tree(0)
    grads = noise(np.nan if "skip_nonfinite" in options else None)
    make = FRONTS[front]
    init, step = make(options)
    want, alone = jax.jit(functools.partial(run, step))(start, init(start), grads)
    _, step = make(options | {"axis_names": axis_names(shape, vma, front)})
    got, state = spread(step, init(start), shape, vma)(start, init(start), grads)
    for k, x in got.items():
        np.testing.assert_allclose(x, want[k], rtol=1e-6, err_msg=k)
    for column, ones in zip(moments(state), moments(alone), strict=True):
        for k, x in column.items():
            # Of a norm the sums are in another order; the rounding of the terms stays.
            np.testing.assert_allclose(x, ones[k], rtol=1e-5, atol=1e-6 * np.abs(ones[k]).max())
    if isinstance(state, ax.AdamWState):
        for name in COUNTERS:
            assert getattr(state, name) == getattr(alone, name), name
        if "skip_nonfinite" in options:
            assert state.skipped > 3 if "skip_spikes" in options else state.skipped == 3
    for k, x in exact(front, options, start, grads).items():
        # Each step rounds the param, and a result of about its size, once.
        np.testing.assert_allclose(got[k], x, rtol=1.5 * STEPS * HALF_A_UNIT, err_msg=k)


def exact(front: str, options: dict[str, Any], start: Any, grads: Any) -> Any:
    """In float64, from the formulas."""
    theirs = {"epsilon": 1e-8, "weight_decay": 1e-4, "epsilon_hat": False}
    o = oracle.Options(RATE, **({} if front not in ("optax", "chain") else theirs), **options)
    params = [start[k].astype(np.float64) for k in SHAPES]
    state = oracle.init(params)
    for i in range(STEPS):
        now = [grads[k][i] + 0.3 * p for k, p in zip(SHAPES, params, strict=True)]
        params, state, _ = oracle.step(params, now, state, o)
    return dict(zip(SHAPES, params, strict=True))


# ------------------------------------------------------------------ large and not finite


LARGE: dict[str, dict[str, Any]] = {
    "on one device": {"w": {(5, 9): 1e20}},
    "in the total alone": {"w": {(0, 0): 1.5e19, (3, 8): 1.5e19, (7, 15): 1.5e19}},
    "of two leaves' total": {"w": {(0, 0): 1.5e19}, "t": {(3,): -1.5e19}, "b": {(1,): 1e19}},
    "everywhere": {k: {...: 1e20} for k in SHAPES},
    "at the end of the range": {"w": {...: 3e38}, "f": {...: -3e38}},
    "infinite on one device": {"w": {(5, 9): np.inf}},
    "NaN on one device": {"t": {(11,): np.nan}},
}


def large(shape: tuple[int, ...], vma: bool, front: str, option: str) -> None:
    options: dict[str, Any] = {"clipnorm": 2.0} if option == "local" else OPTIONS[option]
    start, make = tree(0), FRONTS[front]
    init, step = make(options)
    alone = jax.jit(lambda p, s, g: step(p, g, s))
    _, across = make(options | {"axis_names": axis_names(shape, vma, front)})
    together = spread(across, init(start), shape, vma, steps=False)
    for name, places in LARGE.items():
        grads = tree(2)
        for k, values in places.items():
            for index, value in values.items():
                grads[k][index] = value
        want, got = (f(start, init(start), grads) for f in (alone, together))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, err_msg=name)
        if option == "skip":
            assert got[1].skipped == 1, name


# ------------------------------------------------------------------------ what is compiled


def collectives(front: str) -> None:
    """One all-reduce for each set of axes that leaves lie over, and nothing else."""
    start, grads = tree(0), tree(1)
    for shape, vma, option in itertools.product(SETS, (True, False), ("global", "local", "skip")):
        options = OPTIONS[option] | {"axis_names": axis_names(shape, vma, front)}
        init, step = FRONTS[front](options)
        state = init(start)
        text = spread(step, state, shape, vma, steps=False).lower(start, state, grads).compile()
        found = re.findall(
            r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
            text.as_text(),
        )
        assert found == ["all-reduce"] * SETS[shape], (shape, vma, option, found)


# ------------------------------------------------------------------------ each for itself


def population(front: str) -> None:
    """Along the axes that are not named, devices have norms of their own.

    The first step's size is that of no gradient's: the norms are seen in ``m``.
    """
    where = mesh_of((4, 2))
    params, grads = (
        np.stack([tree(s)["w"] * (1 + s) for s in seeds]) for seeds in ((0, 1), (2, 3))
    )
    init, step = FRONTS[front](OPTIONS["global"])
    alone = [jax.jit(step)(p, g, init(p))[1].m for p, g in zip(params, grads, strict=True)]

    def together(names: Any, spec: Any, vma: bool) -> Any:
        _, mine = FRONTS[front](OPTIONS["global"] | {"axis_names": names})

        def body(p: Any, g: Any) -> Any:
            return mine(p[0], g[0], init(p[0]))[1].m[None]

        mapped = jax.shard_map(
            body, mesh=where, in_specs=(spec, spec), out_specs=spec, check_vma=vma
        )
        return jax.jit(mapped)(params, grads)

    for names, spec, vma in (
        ((), P("y"), True),
        ((), P("y"), False),
        (P(), P("y"), False),
        (("x",), P("y", "x"), True),
        (P("x"), P("y", "x"), False),
    ):
        np.testing.assert_allclose(together(names, spec, vma), np.stack(alone), rtol=1e-6)


def batched(front: str) -> None:
    """``jax.vmap`` inside of ``shard_map``: each member has a norm over all devices."""
    start, grads = tree(0), tree(1)
    init, step = FRONTS[front](OPTIONS["global"])
    rates = np.float32([0.5, 2.0, 20.0])
    scaled = [jax.tree.map(lambda g, r=r: g * r, grads) for r in rates]
    want = [jax.jit(step)(start, g, init(start))[1].m for g in scaled]
    for vma in (True, False):
        _, mine = FRONTS[front](OPTIONS["global"] | {"axis_names": axis_names((4, 2), vma, front)})

        def many(p: Any, s: Any, g: Any, mine: Any = mine) -> Any:
            def one(rate: Any) -> Any:
                return mine(p, {k: x * rate for k, x in g.items()}, s)[1].m

            return jax.vmap(one, axis_name="members")(jnp.asarray(rates))

        specs = SPECS[4, 2]
        held, out = specs_of(init(start), specs), {k: P(None, *s) for k, s in specs.items()}
        mapped = jax.shard_map(
            many, mesh=mesh_of((4, 2)), in_specs=(specs, held, specs), out_specs=out, check_vma=vma
        )
        got = jax.jit(mapped)(start, init(start), grads)
        for i, member in enumerate(want):
            for k, x in member.items():
                np.testing.assert_allclose(got[k][i], x, rtol=1e-6)


def partly(kind: AxisType) -> None:
    """One axis by hand: over the other XLA sums by itself, of either type."""
    specs = {k: spec for k, spec in SPECS[4, 2].items() if k != "t"}
    manual = {k: P(*("x" if x == "x" else None for x in spec)) for k, spec in specs.items()}
    where = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    start, grads = ({k: tree(i)[k] for k in specs} for i in (0, 1))
    init, step = FRONTS["step"](OPTIONS["global"])
    want = jax.jit(step)(start, grads, init(start))[1].m
    places = {k: NamedSharding(where, spec) for k, spec in specs.items()}
    for vma, names in ((True, ("x",)), (False, manual)):
        _, mine = FRONTS["step"](OPTIONS["global"] | {"axis_names": names})

        def body(p: Any, g: Any, mine: Any = mine) -> Any:
            return mine(p, g, init(p))[1].m

        kinds = {"in_specs": (manual, manual), "out_specs": manual, "check_vma": vma}
        with jax.set_mesh(where):
            got = jax.jit(jax.shard_map(body, axis_names={"x"}, **kinds))(
                *(jax.device_put(x, places) for x in (start, grads))
            )
        for k, x in got.items():
            np.testing.assert_allclose(x, want[k], rtol=1e-6, err_msg=k)


def differentiated() -> None:
    """The reference's derivatives pass through the sums, as on one device."""
    start, grads = tree(0), tree(1)

    def loss(step: Any, params: Any, grads: Any) -> Any:
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(step(params, grads)))

    init, alone = FRONTS["reference"](OPTIONS["local"])
    want = jax.jit(jax.grad(functools.partial(loss, lambda p, g: alone(p, g, init(p))[0]), (0, 1)))
    for vma in (True, False):
        _, mine = FRONTS["reference"](
            OPTIONS["local"] | {"axis_names": axis_names((4, 2), vma, "step")}
        )
        mapped = spread(mine, init(start), (4, 2), vma, False)

        def new(p: Any, g: Any, mapped: Any = mapped) -> Any:
            return mapped(p, init(start), g)[0]

        got = jax.jit(jax.grad(functools.partial(loss, new), (0, 1)))(start, grads)
        for x, y in zip(*map(jax.tree.leaves, (got, want(start, grads))), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7)


CHECKS: dict[str, Callable[[], None]] = {}
QUICK = ["global-step-4x2-vma", "accumulate-step-4x2-no_vma"]


def add(name: str, check: Callable[..., None], *args: Any) -> None:
    CHECKS[name] = functools.partial(check, *args)


for shape, vma in itertools.product(SPECS, (True, False)):
    end = f"{'x'.join(map(str, shape))}-{'vma' if vma else 'no_vma'}"
    for option, front in itertools.product(OPTIONS, ("step", "xla", "reference", "optax")):
        both = front in ("step", "reference")
        if front == "step" or (shape == (4, 2) and (vma or both)):
            add(f"{option}-{front}-{end}", compare, shape, vma, front, option)
    for option, front in itertools.product(("global", "local", "skip"), ("step", "reference")):
        if shape == (4, 2) or front == "step":
            add(f"large-{option}-{front}-{end}", large, shape, vma, front, option)
    add(f"global-chain-{end}", compare, shape, vma, "chain", "global")
for front in ("step", "xla", "reference"):
    add(f"collectives-{front}", collectives, front)
    add(f"population-{front}", population, front)
    add(f"batched-{front}", batched, front)
add("partly-automatic", partly, AxisType.Auto)
add("partly-explicit", partly, AxisType.Explicit)
add("differentiated", differentiated)


SLOW = [name for name in CHECKS if name not in QUICK]


@pytest.mark.parametrize("check", QUICK)
def test_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__), *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW)
def test_more_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__), *SLOW)


if __name__ == "__main__":
    main(CHECKS)
