"""Guards the bounds that other tests rely on: wide enough for NumPy, and no wider."""

from typing import Any

from bounded import PTX, Bounded, assert_within
import ml_dtypes
import numpy as np
import pytest

RNG = np.random.default_rng(3)
A, B, C = (RNG.uniform(0.5, 2.0, 20_000) for _ in range(3))


def formula(a: Any, b: Any, c: Any, root: Any) -> Any:
    return (a - b * c) / root(a * b + c) + a


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_computation_of_numpy_is_within(dtype: Any) -> None:
    a, b, c = (x.astype(dtype) for x in (A, B, C))
    want = formula(*(Bounded.operand(x, dtype) for x in (a, b, c)), Bounded.sqrt)
    assert_within(formula(a, b, c, np.sqrt), want, "formula")
    assert np.all(want.error < 8 * np.finfo(dtype).eps * (1 + np.abs(want.value)))


def test_errors_come_close_to_their_bounds() -> None:
    """A bound that no operand ever reaches half of would hide errors of its size."""
    operands = [x.astype(np.float32) for x in (A, B, C)]
    a, b, c = (Bounded.operand(x, np.float32) for x in operands)
    x, y, z = operands
    pairs = [(a + b, x + y), (a - b, x - y), (a * b, x * y), (a / b, x / y), (c.sqrt(), np.sqrt(z))]
    for want, got in [*pairs, (a * b - c, x * y - z)]:
        reached = np.max(np.abs(got.astype(np.float64) - want.value) / want.error)
        assert 0.5 < reached <= 1, reached


@pytest.mark.parametrize(("name", "units"), [("divide", 2), ("sqrt", 1)])
def test_a_gpu_may_be_as_far_off_as_its_manual_says(name: str, units: int) -> None:
    """Two units in the last place of a quotient, one of a root; no more, and no IEEE machine."""
    x, y = (z.astype(np.float32) for z in (A, B))

    def want(*machine: Any) -> Bounded:
        a, b = (Bounded.operand(z, np.float32, *machine) for z in (x, y))
        return a / b if name == "divide" else a.sqrt()

    off = (x / y if name == "divide" else np.sqrt(x)).view(np.int32) + np.int32(units)
    assert_within(off.view(np.float32), want(PTX), name)
    with pytest.raises(AssertionError, match="elements are off"):
        assert_within(off.view(np.float32), want(), name)
    with pytest.raises(AssertionError, match="elements are off"):
        assert_within((off + np.int32(2 * units)).view(np.float32), want(PTX), name)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_a_narrow_result_is_the_rounding_of_a_number_that_is_within(dtype: Any) -> None:
    """Its neighbours are refused, but where the number is close to the middle of two."""
    want = Bounded.operand(A, np.float32) * Bounded.operand(B, np.float32)
    nearest = want.value.astype(np.float32).astype(dtype)
    assert_within(nearest, want, "nearest")
    up = (nearest.view(np.uint16) + np.uint16(1)).view(dtype)
    refused = 0
    for i in range(200):
        one = Bounded(want.value[i], want.error[i], want.arithmetic)
        try:
            assert_within(up[i], one, "neighbour")
        except AssertionError:
            refused += 1
    assert refused >= 195


@pytest.mark.parametrize(
    ("value", "got"),
    [(np.nan, 0.0), (0.0, np.nan), (np.inf, np.nan), (np.inf, 3e38), (0.0, np.inf)],
)
def test_nan_and_infinity_are_no_numbers(value: float, got: float) -> None:
    want = Bounded.operand(np.array([1.0, value]), np.float32)
    assert_within(np.array([1.0, value], np.float32), want, "itself")
    with pytest.raises(AssertionError, match="1 of 2 elements are off"):
        assert_within(np.array([1.0, got], np.float32), want, "another")


def test_what_bounds_a_number_has_its_error_too() -> None:
    exact, wide = np.float64(0.25), np.float64(0.1)
    bound = Bounded.operand(wide, np.float32)
    assert bound.error == abs(np.float64(np.float32(wide)) - wide)
    number = Bounded.operand(exact, np.float32)
    assert number.error == 0
    assert number.clip(bound).error == number.maximum(bound).error == bound.error
