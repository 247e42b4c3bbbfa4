"""``BitOps`` on JAX's arrays, and what is made with them outside of an update."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from . import narrow, word

_HALVES = (1 << 31) | (1 << (word.V_DROPS - 1))
"""Random bits with which both codes are rounded to the nearest: m's noise ends at the highest."""


class ArrayOps:
    """Makes arrays."""

    add = staticmethod(lax.add)
    subtract = staticmethod(lax.sub)
    multiply = staticmethod(lax.mul)
    maximum = staticmethod(jnp.maximum)
    minimum = staticmethod(jnp.minimum)
    less = staticmethod(jnp.less)
    both = staticmethod(jnp.bitwise_and)
    either = staticmethod(jnp.bitwise_or)
    differ = staticmethod(jnp.bitwise_xor)

    @staticmethod
    def select(condition: Any, yes: Any, no: Any) -> jax.Array:
        """Of two values the one that a condition chooses, for each element."""
        return jnp.where(condition, yes, no)

    @staticmethod
    def number(value: float) -> Any:
        """A float32."""
        return np.float32(value)

    @staticmethod
    def integer(value: int) -> Any:
        """An int32, of the pattern that a number below 2^32 has."""
        return np.int64(value).astype(np.int32)

    @staticmethod
    def bits(x: Any) -> jax.Array:
        """The pattern of a float32."""
        return lax.bitcast_convert_type(x, np.int32)

    @staticmethod
    def float_of(bits: Any) -> jax.Array:
        """The float32 of a pattern."""
        return lax.bitcast_convert_type(bits, np.float32)

    @staticmethod
    def left(x: Any, places: int) -> jax.Array:
        """Shifted to the left."""
        return jnp.left_shift(x, np.int32(places))

    @staticmethod
    def right(x: Any, places: int) -> jax.Array:
        """Shifted to the right; zeros come in."""
        return lax.shift_right_logical(x, jnp.full_like(x, places))


OPS = ArrayOps()


def unpack(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """m and v of words: float32, of their shape; exact."""
    return word.decode(OPS, words.astype(np.float32))


def pack(m: jax.Array, v: jax.Array) -> jax.Array:
    """The words nearest to float32 m and v: bfloat16, of their shape.

    Of what ``unpack`` returns they are the words themselves.
    """
    m, v = m.astype(np.float32), v.astype(np.float32)
    nearest = word.encode(OPS, m, v, jnp.full_like(m, OPS.integer(_HALVES), np.int32))
    return nearest.astype(jnp.bfloat16)


def join_params(param: jax.Array, remainder: jax.Array) -> jax.Array:
    """The float32 masters of bfloat16 params and their int16 remainders."""
    return narrow.join(OPS, param.astype(np.float32), remainder.astype(np.int32))


def split_params(master: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bfloat16 params and int16 remainders of float32 masters; ``join_params`` undoes it."""
    param, remainder = narrow.split(OPS, master)
    return param.astype(jnp.bfloat16), remainder.astype(np.int16)
