"""Norms and clips over the leaves of a tree, in float32 or wider.

Stock Keras takes the norms in the gradient's dtype: in float16 a norm above 255
overflows, and the gradient becomes zero.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from adamw_xla._config import AdamW

SumOfSquares: TypeAlias = Callable[..., jax.Array]
"""``adamw_sum_of_squares`` or its like: ``(scale, leaves, *, per_leaf) -> [] or [leaves]``."""


class Scales(NamedTuple):
    """The factors on the gradients of one update, and what was summed to know them.

    ``tree`` is a scalar, ``per_leaf`` has shape [leaves]; ``squares`` is [] or [leaves], or
    None where no sum was needed.
    """

    tree: float | jax.Array
    per_leaf: jax.Array | None = None
    squares: Any = None


def scales(
    config: AdamW,
    grads: Sequence[jax.Array],
    scale: float | jax.Array,
    dtype: DTypeLike,
    sum_of_squares: SumOfSquares,
) -> Scales:
    """The factors that clip ``scale`` times ``grads`` by the norm that the config bounds."""
    if config.clipnorm is not None:
        squares = sum_of_squares(jnp.asarray(scale, dtype), grads, per_leaf=True)
        return Scales(scale, leaf_factors(jnp.sqrt(squares), config.clipnorm), squares)
    if config.global_clipnorm is None and not config.skip_nonfinite:
        return Scales(scale)
    squares = sum_of_squares(jnp.asarray(scale, dtype), grads)
    if config.global_clipnorm is not None:
        scale = scale * global_factor(jnp.sqrt(squares), config.global_clipnorm)
    return Scales(scale, None, squares)


def global_factor(norm: jax.Array, bound: ArrayLike) -> jax.Array:
    """The factor that brings a tree of this norm to at most ``bound``; NaN if it has none."""
    # Optax and Keras make an infinite norm NaN, too; the quotient alone would be 0.
    return jnp.where(jnp.isfinite(norm), leaf_factors(norm, bound), jnp.nan)


def leaf_factors(norms: jax.Array, bound: ArrayLike) -> jax.Array:
    """For each leaf the factor that brings its norm to at most ``bound``: [leaves].

    It is 1 exactly where the norm is below the bound.
    """
    bound = jnp.asarray(bound, norms.dtype)
    return bound / jnp.maximum(norms, bound)
