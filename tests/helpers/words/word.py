"""The word: v's code in the exponent and a bit of the mantissa, m's in the sign and the rest."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .noise import noises
from .scales import Array, U, V


def legal() -> Array:
    """bfloat16[508, 2, 64]: every word there is, by v's code, m's sign and m's code."""
    v, sign, u = np.ogrid[: V.num_codes, :2, : U.num_codes]
    return _assemble(v, sign, u)


def _assemble(v: Array, sign: Array, u: Array) -> Array:
    """The first two codes are left out, and the last two: bfloat16 has no such normal numbers."""
    pattern = sign * 2**15 + (v + 2) * 2**6 + u
    return pattern.astype(np.uint16).view(ml_dtypes.bfloat16)


def unit(code: Array) -> Array:
    """float64: what m is stored in units of, for v's code: a power of two at most sqrt(v)."""
    exponent = V.min_exponent + np.maximum(code // 2**V.mantissa - 1, 0)
    return np.exp2(exponent // 2)


def decode(words: Array) -> tuple[Array, Array]:
    """Words -> m and v, float32. Zeros of bfloat16 are none, and stand for m = v = 0 too."""
    pattern = np.asarray(words).view(np.uint16).astype(np.int64)
    code = np.maximum(pattern // 2**6 % 2**9 - 2, 0)
    sign = np.where(pattern >= 2**15, -1.0, 1.0)
    m = sign * U.values[pattern % 2**6] * unit(code)
    return m.astype(np.float32), V.values[code].astype(np.float32)


def encode(m: Array, v: Array, r: Array) -> Array:
    """m, v and a random word for each -> words. All have one shape, or broadcast to it."""
    noise_of_v, noise_of_m = noises(r)
    code = V.code(v, noise_of_v)
    with np.errstate(over="ignore"):
        u = (np.abs(np.asarray(m, np.float64)) / unit(code)).astype(np.float32)
    return _assemble(code, np.signbit(m).astype(np.int64), U.code(u, noise_of_m))
