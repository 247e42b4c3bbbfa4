"""The random word of an element: a hash of its gradient, its param and the number of the update."""

from __future__ import annotations

from typing import Any

import numpy as np

from .scales import Array


def _bits(x: Any) -> Array:
    return np.atleast_1d(np.asarray(x, np.float32)).view(np.uint32)


def random_bits(grad: Any, param: Any, number: Any) -> Array:
    """uint32 of the operands' common shape, at least [1].

    Args:
      grad: as the caller gave it: neither scaled nor clipped.
      param: before the step; the float32 master where there is one.
      number: of the update, from 1.
    """
    with np.errstate(over="ignore"):
        x = _bits(grad) * np.uint32(0x9E3779B9) + _bits(param)
        x = x + _bits(number) * np.uint32(0x85EBCA6B)
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
        return x ^ x >> np.uint32(16)


def with_random_bits(r: Any, grad: Any, number: Any) -> Array:
    """float32: the params with which ``random_bits`` are ``r``. Some are NaN or infinite."""
    modulus = 2**32
    with np.errstate(over="ignore"):
        x = np.atleast_1d(np.asarray(r, np.uint32))
        x = (x ^ x >> np.uint32(16)) * np.uint32(pow(0x846CA68B, -1, modulus))
        x = (x ^ x >> np.uint32(15) ^ x >> np.uint32(30)) * np.uint32(pow(0x7FEB352D, -1, modulus))
        x = x ^ x >> np.uint32(16)
        x = x - _bits(number) * np.uint32(0x85EBCA6B) - _bits(grad) * np.uint32(0x9E3779B9)
    return x.view(np.float32)


def noises(r: Any) -> tuple[Array, Array]:
    """That of v's code and that of m's: the lower 21 and the upper 20 bits of the 32, uint32."""
    r = np.asarray(r, np.uint32)
    return r % np.uint32(2**21), r // np.uint32(2**12)


def noise_of_param(r: Any) -> Array:
    """That of a bfloat16 param, 16 bits in uint32."""
    with np.errstate(over="ignore"):
        return np.atleast_1d(np.asarray(r, np.uint32)) * np.uint32(0x2C1B3C6D) >> np.uint32(16)
