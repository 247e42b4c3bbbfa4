"""A small problem and how to look at it: shared by the tests of transformations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamw_xla as ax
from adamw_xla.lowering import adamw_update_p

CONFIG = ax.AdamW(learning_rate=0.01, amsgrad=True, use_ema=True)
SHAPES = {"a": (4, 3), "b": (3,), "c": ()}


def tree(seed: int, batch: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.standard_normal((*batch, *s)), jnp.float32) for k, s in SHAPES.items()
    }


def problem(config: ax.AdamW = CONFIG) -> tuple[Any, Any, ax.AdamWState]:
    params = tree(0)
    return params, tree(1), ax.adamw_init(params, config)


def step(params: Any, grads: Any, state: Any) -> Any:
    return ax.adamw_step(params, grads, state, CONFIG)


def equations(jaxpr: Any) -> list[Any]:
    """All update equations in a jaxpr and in those inside of it."""
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()))]
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive is adamw_update_p]
    for x in inner:
        if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
            found += equations(getattr(x, "jaxpr", x))
    return found
