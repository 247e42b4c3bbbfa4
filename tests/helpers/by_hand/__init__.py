"""One problem for one device, and by hand for several: params, gradients, and every API's step."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

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

STEPS = 50
RATE = 0.01

OPTIONS: dict[str, dict[str, Any]] = {
    "global": {"global_clipnorm": 2.0},
    "local": {"clipnorm": 0.5},
    "skip": {"skip_nonfinite": True},
    "accumulate": {
        "gradient_accumulation_steps": 2,
        "skip_nonfinite": True,
        "skip_spikes": ax.SpikeRule(window=8, deviations=0.5),
        "clipnorm": 0.5,
    },
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
