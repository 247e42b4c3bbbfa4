"""A tree with every container, and a short run over it: shared by the front end's tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamw_xla as ax


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32),
        "b": [jnp.asarray(rng.standard_normal(2), jnp.float32), jnp.float32(0.5)],
    }


def run(config: ax.AdamW, calls: int = 1, params: Any = None, **overrides: Any) -> Any:
    params = tree() if params is None else params
    state = ax.adamw_init(params, config)
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config, **overrides))
    for k in range(calls):
        params, state = step(params, tree(k + 1), state)
    return params, state
