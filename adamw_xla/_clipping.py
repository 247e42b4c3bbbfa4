"""Norms and clips over the leaves of a tree, in float32 or wider.

Stock Keras takes the norms in the gradient's dtype: in float16 a norm above 255
overflows, and the gradient becomes zero.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

SumOfSquares: TypeAlias = Callable[..., jax.Array]
"""``adamw_sum_of_squares`` or its like: ``(scale, leaves, *, per_leaf) -> [] or [leaves]``."""


def global_factor(norm: jax.Array, bound: ArrayLike) -> jax.Array:
    """The factor that brings a tree of this norm to at most ``bound``; NaN if it has none."""
    bound = jnp.asarray(bound, norm.dtype)
    factor = bound * jnp.minimum(1 / norm, 1 / bound)
    return jnp.where(jnp.isfinite(norm), factor, jnp.nan)


def leaf_factors(norms: jax.Array, bound: ArrayLike) -> jax.Array:
    """For each leaf the factor that brings its norm to at most ``bound``: [leaves]."""
    bound = jnp.asarray(bound, norms.dtype)
    return bound / jnp.maximum(norms, bound)
