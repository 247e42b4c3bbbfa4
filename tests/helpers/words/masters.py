"""bfloat16 params: rounded at random, or with a remainder that makes a float32 master of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .noise import noise_of_param
from .scales import Array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX = np.float32(ml_dtypes.finfo(BFLOAT16).max)
TINY = np.finfo(np.float32).tiny


def _toward_zero(x: Array) -> Array:
    """float32: the bfloat16 number next to x on the side of zero, or x itself."""
    return (x.view(np.uint32) // 2**16 * 2**16).astype(np.uint32).view(np.float32)


def round_to_bfloat16(x: Array, r: Array) -> Array:
    """Float32 params -> bfloat16, right on average; what is finite stays so."""
    x = np.atleast_1d(np.asarray(x, np.float32))
    part = x.view(np.uint32) % 2**16  # of 2**16 noises, so many round away from zero
    below = _toward_zero(x)
    with np.errstate(over="ignore", invalid="ignore"):
        above = (below.view(np.uint32) + 2**16).astype(np.uint32).view(np.float32)
        rounded = np.where(noise_of_param(r) + part >= 2**16, above, below)
        rounded = np.where(np.isfinite(x), np.clip(rounded, -MAX, MAX), x)
        return rounded.astype(BFLOAT16)


def split(master: Array) -> tuple[Array, Array]:
    """Float32 masters -> bfloat16 params, rounded to nearest, and int16 remainders.

    What lies half way is rounded away from zero. Zero and what float32 holds with fewer bits,
    infinities and NaN have a remainder of 0.
    """
    master = np.atleast_1d(np.asarray(master, np.float32))
    master = np.where(np.abs(master) < TINY, np.copysign(np.float32(0), master), master)
    part = master.view(np.uint32).astype(np.int64) % 2**16
    away = part >= 2**15
    whole = master.view(np.uint32) // 2**16 + away
    params = whole.astype(np.uint16).view(BFLOAT16)
    remainders = part - away * 2**16
    nan = np.isnan(master)
    params = np.where(nan, BFLOAT16.type(np.nan), params)
    return params, np.where(nan, 0, remainders).astype(np.int16)


def join(params: Array, remainders: Array) -> Array:
    """What ``split`` made two of. No remainder makes a NaN of a number, zero or an infinity."""
    params = np.atleast_1d(np.asarray(params, BFLOAT16))
    x, rest = params.astype(np.float32), np.asarray(remainders, np.int64)
    rest = np.where((x == 0) & (rest < 0) | np.isinf(x) & (rest > 0) | np.isnan(x), 0, rest)
    pattern = params.view(np.uint16).astype(np.int64) * 2**16 + rest
    return (pattern % 2**32).astype(np.uint32).view(np.float32)
