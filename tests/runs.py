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


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6, atol=1e-7)
