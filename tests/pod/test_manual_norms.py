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

from eight_devices import main, report
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import oracle
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

SHAPES = {"w": (8, 16), "u": (3, 8), "t": (16,), "f": (4, 2), "b": (5,), "s": ()}
SPECS = {
    (8,): {"w": P("x"), "u": P(None, "x"), "t": P("x"), "f": P(), "b": P(), "s": P()},
    (4, 2): {
        "w": P("x", "y"),
        "u": P(None, "x"),
        "t": P(("y", "x")),
        "f": P(None, "y"),
        "b": P(),
        "s": P(),
    },
}
SETS = {(8,): 1, (4, 2): 3}
"""How many sets of axes, one axis at least, the leaves lie over."""

STEPS = 20
HALF_A_UNIT = 2.0**-24
RATE = 0.01

COUNTERS = ("count", "micro_step", "skipped")
OPTIONS: dict[str, dict[str, Any]] = {
    "global": {"global_clipnorm": 2.0},
    "local": {"clipnorm": 0.5},
    "skip": {"skip_nonfinite": True},
    "accumulate": {"gradient_accumulation_steps": 2, "skip_nonfinite": True, "clipnorm": 0.5},
}


def mesh_of(shape: tuple[int, ...]) -> Any:
    names = ("x", "y")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def tree(seed: int, *lead: int) -> dict[str, Any]:
    """Numbers of either sign, none of them near 0: a relative bound means something."""
    rng = np.random.default_rng(seed)
    shapes = {k: (*lead, *shape) for k, shape in SHAPES.items()}
    signs = {k: rng.choice([-1, 1], shape) for k, shape in shapes.items()}
    made = {k: signs[k] * rng.uniform(0.5, 1.5, shape) for k, shape in shapes.items()}
    return {k: np.asarray(x, np.float32) for k, x in made.items()}


def noise(bad: float | None) -> dict[str, Any]:
    """Gradients of each step; ``bad`` is in the shard of one device, and later in whole leaves."""
    made = tree(1, STEPS)
    made["w"] *= np.linspace(0.1, 3, STEPS, dtype=np.float32)[:, None, None]
    if bad is not None:
        made["w"][3, 5, 9] = made["b"][7, 2] = made["f"][8, 0, 1] = bad
    return made


# Each API makes of options a pair: how a state begins, and how a step is made.


def native(step: Any) -> Any:
    def make(options: dict[str, Any]) -> tuple[Any, Any]:
        config = ax.AdamW(RATE, **options)
        return functools.partial(ax.adamw_init, config=config), functools.partial(
            step, config=config
        )

    return make


def transformed(options: dict[str, Any]) -> tuple[Any, Any]:
    return _of_optax(axo.adamw(RATE, **options))


def chained(options: dict[str, Any]) -> tuple[Any, Any]:
    """The clip in front, which has an ``axis_names`` of its own."""
    bound, where = options["global_clipnorm"], options.get("axis_names")
    clip = axo.clip_by_global_norm(bound, axis_names=where)
    return _of_optax(optax.chain(clip, axo.adamw(RATE)))


def _of_optax(solver: Any) -> tuple[Any, Any]:
    def step(params: Any, grads: Any, state: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return solver.init, step


FRONTS: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "step": native(ax.adamw_step),
    "xla": native(functools.partial(ax.adamw_step, implementation="xla")),
    "reference": native(ax.reference.adamw_step),
    "optax": transformed,
    "chain": chained,
}


def run(step: Any, params: Any, state: Any, noise: Any) -> Any:
    def body(carry: Any, noise: Any) -> Any:
        params, state = carry
        grads = jax.tree.map(lambda g, p: g + 0.3 * p, noise, params)
        return step(params, grads, state), None

    return jax.lax.scan(body, (params, state), noise)[0]


def specs_of(state: Any, specs: Any) -> Any:
    """The state's, of which all but the counters is built like the params."""

    def of(path: Any, x: Any) -> Any:
        return next((specs[k.key] for k in path if getattr(k, "key", None) in specs), P())

    return jax.tree_util.tree_map_with_path(of, state)


def spread(
    step: Any, state: Any, shape: tuple[int, ...], vma: bool, steps: bool = True
) -> Callable[..., Any]:
    """``run`` (or one step) by hand, on a mesh."""
    specs = SPECS[shape]
    lead = {k: P(None, *spec) if steps else spec for k, spec in specs.items()}
    body = functools.partial(run, step) if steps else lambda p, s, g: step(p, g, s)
    held = specs_of(state, specs)
    return jax.jit(
        jax.shard_map(
            body,
            mesh=mesh_of(shape),
            in_specs=(specs, held, lead),
            out_specs=(specs, held),
            check_vma=vma,
        )
    )


def axis_names(shape: tuple[int, ...], vma: bool, front: str) -> Any:
    """Names where types tell the rest; the reference is given specs there too."""
    return ("x", "y")[: len(shape)] if vma and front != "reference" else SPECS[shape]


def moments(state: Any) -> tuple[Any, Any]:
    get = optax.tree_utils.tree_get
    return (
        (state.m, state.v)
        if isinstance(state, ax.AdamWState)
        else (get(state, "mu"), get(state, "nu"))
    )


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
            assert state.skipped == 3
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


CHECKS: dict[str, Callable[[], None]] = {}
QUICK = ["global-step-4x2-vma", "accumulate-step-4x2-no_vma"]


def add(name: str, check: Callable[..., None], *args: Any) -> None:
    CHECKS[name] = functools.partial(check, *args)


for shape, vma in itertools.product(SPECS, (True, False)):
    end = f"{'x'.join(map(str, shape))}-{'vma' if vma else 'no_vma'}"
    for option, front in itertools.product(OPTIONS, ("step", "xla", "reference", "optax")):
        if shape == (4, 2) or front == "step":
            add(f"{option}-{front}-{end}", compare, shape, vma, front, option)
    for option, front in itertools.product(("global", "local", "skip"), ("step", "reference")):
        if shape == (4, 2) or front == "step":
            add(f"large-{option}-{front}-{end}", large, shape, vma, front, option)
    add(f"global-chain-{end}", compare, shape, vma, "chain", "global")
for front in ("step", "xla", "reference"):
    add(f"collectives-{front}", collectives, front)
    add(f"population-{front}", population, front)
    add(f"batched-{front}", batched, front)


SLOW = [name for name in CHECKS if name not in QUICK]


@pytest.mark.parametrize("check", QUICK)
def test_on_eight_devices(check: str) -> None:
    printed = report(Path(__file__), *QUICK)
    assert f"passed {check}\n" in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW)
def test_more_on_eight_devices(check: str) -> None:
    printed = report(Path(__file__), *SLOW)
    assert f"passed {check}\n" in printed, printed


if __name__ == "__main__":
    main(CHECKS)
