"""Guards 16-bit params: rounded at random, and as the larger part of a float32 master."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from update_contract.implementations import IMPLEMENTATIONS
import words
from words import formats

from adamw_xla_lowering import NUM_SLOTS, Slot, join_params, split_params

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.float32
EVERY = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)


def hard_masters() -> Any:
    """float32: all that is next to a bfloat16 number, and to the middle of two."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (np.arange(2**16, dtype=np.uint32)[:, None] << np.uint32(16) | low).view(F32)


def patterns(x: Any) -> Any:
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[np.asarray(x).dtype.itemsize])


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """From arrays to arrays of NumPy."""
    jitted = jax.jit(f)
    return lambda *x: jax.tree.map(np.asarray, jitted(*np.broadcast_arrays(*x)))


MASTERS = {
    "oracle": (words.split, words.join),
    "adamw_xla": (compiled(split_params), compiled(join_params)),
}
Master = tuple[Callable[..., Any], Callable[..., Any]]

# ------------------------------------------------------------------------------- masters


@pytest.mark.parametrize("master", MASTERS.values(), ids=MASTERS)
def test_what_is_split_joins_to_itself(master: Master) -> None:
    split, join = master
    x = hard_masters()
    params, rest = split(x)
    assert (params.dtype, rest.dtype) == (BFLOAT16, np.int16)
    subnormal = (np.abs(x) < np.finfo(F32).tiny) & (x != 0)
    want = np.where(subnormal, np.copysign(F32(0), x), x)
    joined = join(params, rest)
    np.testing.assert_array_equal(np.isnan(joined), np.isnan(x))
    at = ~np.isnan(x)
    np.testing.assert_array_equal(patterns(joined)[at], patterns(want)[at])
    np.testing.assert_array_equal(np.isnan(params.astype(F32)), np.isnan(x))
    assert (rest[~at] == 0).all()


@pytest.mark.parametrize("master", MASTERS.values(), ids=MASTERS)
def test_the_param_is_the_master_rounded_to_nearest(master: Master) -> None:
    """As NumPy rounds it, but for what lies half way: that goes away from zero."""
    x = hard_masters()
    at = np.isfinite(x) & ((x == 0) | (np.abs(x) >= np.finfo(F32).tiny))
    params, rest = master[0](x)
    nearest = x[at].astype(BFLOAT16)
    params, rest = params[at], rest[at]
    half = patterns(x)[at] % 2**16 == 2**15
    np.testing.assert_array_equal(params[~half], nearest[~half])
    assert (rest[half] == -(2**15)).all()
    assert (np.abs(params[half].astype(F32)) > np.abs(x[at][half])).all()


@pytest.mark.parametrize("master", MASTERS.values(), ids=MASTERS)
def test_no_remainder_makes_a_nan_of_what_a_caller_wrote(master: Master) -> None:
    rest = np.array([-(2**15), -1, 0, 1, 2**15 - 1], np.int16)
    joined = master[1](EVERY[:, None], rest)
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


@pytest.mark.parametrize("name", [x for x in formats.NAMES if x in IMPLEMENTATIONS])
@pytest.mark.parametrize("salt", [1, 2, 3, 1000])
def test_an_update_rounds_as_the_oracle_does(name: str, salt: int) -> None:
    """Params of 0, to which all that is hard to round is added; doubled, some are infinite."""
    x = hard_masters()
    x = x[np.isfinite(x) & (np.abs(x) > 2.0**-60)]
    p, empty = np.zeros(x.shape, BFLOAT16), np.full(x.shape, words.legal()[0, 0, 0])
    for factor in (1, 2):
        row = np.zeros((1, NUM_SLOTS), F32)
        row[0, [Slot.ONE_MINUS_BETA_1, Slot.EPSILON, Slot.SALT]] = 1, 1, salt
        row[0, [Slot.GRAD_SCALE, Slot.STEP_SIZE]] = 2.0**-65, -factor * 2.0**65  # squares fit
        tree = {"params": [p], "grads": [x], "words": [empty]}
        found = IMPLEMENTATIONS[name].step(None, stochastic=True)(row, tree).params[0]
        with np.errstate(over="ignore"):
            want = words.round_to_bfloat16(factor * x, words.random_bits(x, F32(0), salt))
        np.testing.assert_array_equal(patterns(found), patterns(want))
