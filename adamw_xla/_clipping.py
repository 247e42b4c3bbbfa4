"""Norms and clips over the leaves of a tree, in float32 or wider.

Stock Keras takes the norms in the gradient's dtype: in float16 a norm above 255
overflows, and the gradient becomes zero.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

Leaves = Sequence[jax.Array]


def _sum_of_squares(grad: jax.Array, scale: ArrayLike, dtype: DTypeLike) -> jax.Array:
    return jnp.sum(jnp.square(grad.astype(dtype) * jnp.asarray(scale, dtype)))


def global_norm(grads: Leaves, scale: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """The L2 norm of ``scale`` times all of ``grads``, a scalar of ``dtype``."""
    squares = (_sum_of_squares(g, scale, dtype) for g in grads)
    return jnp.sqrt(sum(squares, start=jnp.zeros((), dtype)))


def global_factor(norm: jax.Array, bound: ArrayLike) -> jax.Array:
    """The factor that brings a tree of this norm to at most ``bound``; NaN if it has none."""
    bound = jnp.asarray(bound, norm.dtype)
    factor = bound * jnp.minimum(1 / norm, 1 / bound)
    return jnp.where(jnp.isfinite(norm), factor, jnp.nan)


def leaf_factors(grads: Leaves, scale: ArrayLike, bound: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """For each leaf the factor that brings its norm to at most ``bound``: [leaves]."""
    norms = jnp.sqrt(jnp.stack([_sum_of_squares(g, scale, dtype) for g in grads]))
    bound = jnp.asarray(bound, dtype)
    return bound / jnp.maximum(norms, bound)


def all_finite(grads: Leaves) -> jax.Array:
    """Whether no element is NaN or infinite: a bool scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in grads]))
