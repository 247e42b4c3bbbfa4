"""Guards 16-bit params: rounded at random, and as the larger part of a float32 master."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import words

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.float32
EVERY = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)


def hard_masters() -> Any:
    """float32: all that is next to a bfloat16 number, and to the middle of two."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (np.arange(2**16, dtype=np.uint32)[:, None] << np.uint32(16) | low).view(F32)


def patterns(x: Any) -> Any:
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[np.asarray(x).dtype.itemsize])


# ------------------------------------------------------------------------------- masters


def test_what_is_split_joins_to_itself() -> None:
    x = hard_masters()
    params, rest = words.split(x)
    assert (params.dtype, rest.dtype) == (BFLOAT16, np.int16)
    subnormal = (np.abs(x) < np.finfo(F32).tiny) & (x != 0)
    want = np.where(subnormal, np.copysign(F32(0), x), x)
    joined = words.join(params, rest)
    np.testing.assert_array_equal(np.isnan(joined), np.isnan(x))
    at = ~np.isnan(x)
    np.testing.assert_array_equal(patterns(joined)[at], patterns(want)[at])
    np.testing.assert_array_equal(np.isnan(params.astype(F32)), np.isnan(x))
    assert (rest[~at] == 0).all()


def test_the_param_is_the_master_rounded_to_nearest() -> None:
    """As NumPy rounds it, but for what lies half way: that goes away from zero."""
    x = hard_masters()
    at = np.isfinite(x) & ((x == 0) | (np.abs(x) >= np.finfo(F32).tiny))
    params, rest = words.split(x)
    nearest = x[at].astype(BFLOAT16)
    params, rest = params[at], rest[at]
    half = patterns(x)[at] % 2**16 == 2**15
    np.testing.assert_array_equal(params[~half], nearest[~half])
    assert (rest[half] == -(2**15)).all()
    assert (np.abs(params[half].astype(F32)) > np.abs(x[at][half])).all()


def test_no_remainder_makes_a_nan_of_what_a_caller_wrote() -> None:
    rest = np.array([-(2**15), -1, 0, 1, 2**15 - 1], np.int16)
    joined = words.join(EVERY[:, None], rest)
    value = EVERY.astype(F32)[:, None]
    np.testing.assert_array_equal(np.isnan(joined), np.isnan(value) | np.zeros(5, bool))
    np.testing.assert_array_equal(patterns(joined[:, 2]), patterns(EVERY).astype(np.uint32) << 16)
    zero = (value == 0).ravel()
    assert (np.abs(joined[zero]) < np.finfo(F32).tiny).all()
    finite = (np.isfinite(value) & (value != 0)).ravel()
    apart = np.abs(patterns(joined[finite]).astype(np.int64) - patterns(value[finite]))
    assert apart.max() == 2**15
    assert (np.signbit(joined[finite]) == np.signbit(value[finite])).all()


# ------------------------------------------------------------------------------- random rounding


def test_params_are_right_on_average() -> None:
    """Exactly, over all noises: a number is a random word's share times an odd constant."""
    noise = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    r = noise * np.uint32(pow(0x2C1B3C6D, -1, 2**32))
    np.testing.assert_array_equal(words.noise_of_param(r), np.arange(2**16))
    some = np.random.default_rng(2).integers(0, 2**32, 40, dtype=np.uint32).view(F32)
    for x in [*some[np.isfinite(some)], *F32([0, -0.0, 1, 3e-39, -3e-39, 3.38e38])]:
        found = words.round_to_bfloat16(np.full(r.shape, x), r).astype(np.float64)
        assert found.mean() == x
        assert len(np.unique(found)) <= 2
        np.testing.assert_array_equal(np.signbit(found), np.signbit(x))


def test_what_bfloat16_holds_does_not_move() -> None:
    finite = EVERY[np.isfinite(EVERY.astype(F32))]
    for r in np.array([0, 1, 2**31, 2**32 - 1, 0xDEADBEEF], np.uint32):
        rounded = words.round_to_bfloat16(finite.astype(F32), r)
        np.testing.assert_array_equal(patterns(rounded), patterns(finite))


def test_what_is_finite_stays_so_and_what_is_not_too() -> None:
    r = np.arange(0, 2**32, 2**20, dtype=np.uint32)
    largest = np.finfo(F32).max
    for x, want in ((largest, 0x7F7F), (-largest, 0xFF7F), (np.inf, 0x7F80), (-np.inf, 0xFF80)):
        assert (patterns(words.round_to_bfloat16(np.full(r.shape, x, F32), r)) == want).all()
    assert np.isnan(words.round_to_bfloat16(np.full(r.shape, np.nan, F32), r).astype(F32)).all()
