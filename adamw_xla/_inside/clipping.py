"""Norms and clips over the leaves of a tree, in float32 or wider.

Stock Keras takes the norms in the gradient's dtype: in float16 a norm above 255
overflows, and the gradient becomes zero. In float32 squares overflow from 1.8e19 on, and
Keras makes everything NaN, optax zeros; here the norm is right for every finite gradient.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from adamw_xla._config import AdamW, needs_norm
from adamw_xla_lowering import Squares

SumOfSquares: TypeAlias = Callable[..., Squares]
"""``adamw_sum_of_squares`` or its like: ``(scale, leaves, *, per_leaf) -> [] or [leaves]``."""


class Scales(NamedTuple):
    """The factors on the gradients of one update, and what was summed to know them.

    ``tree`` is a scalar, ``per_leaf`` has shape [leaves]; ``squares`` is of [] or [leaves], or
    None where no sum was needed. ``factor`` is what clips: a scalar, or [leaves].
    """

    tree: float | jax.Array
    per_leaf: jax.Array | None = None
    squares: Squares | None = None
    factor: float | jax.Array = 1.0


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
        unit, quotient = factors(squares, config.clipnorm)
        return Scales(scale, unit * quotient, squares, unit * quotient)
    if needs_norm(config) is None:
        return Scales(scale)
    squares = sum_of_squares(jnp.asarray(scale, dtype), grads)
    if config.global_clipnorm is None:
        return Scales(scale, None, squares)
    unit, quotient = global_factors(squares, config.global_clipnorm)
    return Scales(scale * (unit * quotient), None, squares, unit * quotient)


def is_good(config: AdamW, squares: Squares) -> jax.Array:
    """Whether ``skip_nonfinite`` lets gradients with these sums pass: a bool scalar.

    All of them are finite, and so is the square of their norm once they are clipped: a ``v``
    that overflows never recovers.
    """
    good = jnp.isfinite(squares.sum)
    bounds = (config.clipnorm, config.clipvalue, config.global_clipnorm)
    bound = next((x for x in bounds if x is not None), jnp.inf)
    is_small = jnp.isfinite(jnp.square(jnp.asarray(bound, squares.sum.dtype)))
    return jnp.all(good & ((squares.unit == 1) | is_small))


def global_factors(squares: Squares, bound: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """As ``factors``; NaN where a gradient is infinite or NaN, so that nobody trains on."""
    unit, quotient = factors(squares, bound)
    return jnp.where(jnp.isfinite(squares.sum), unit, jnp.nan), quotient


def factors(squares: Squares, bound: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Two factors that, one after the other, bring a norm to at most ``bound``.

    Their product may be too small for a normal number (in float32 from norms of 8.5e37 times
    the bound on), neither of them is. Both are 1 exactly where the norm is within the bound.
    """
    dtype = squares.sum.dtype
    bound = jnp.asarray(bound, dtype)
    norm = root(squares.sum)
    is_within = norm <= bound * squares.unit
    unit = jnp.where(is_within, 1, squares.unit)
    return unit, jnp.where(is_within, 1, bound / jnp.where(is_within, 1, norm))


def root(x: jax.Array) -> jax.Array:
    """The square root, with the derivative 0 at 0."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))
