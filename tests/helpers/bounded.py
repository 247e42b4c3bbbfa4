"""Float64 numbers that know how far off narrower arithmetic may be: tolerances by proof.

Each operation adds the most that rounding its result can change and passes on the errors
of its operands, so that a test needs no tolerance of its own: what a program computes in
this order, with or without fused multiply-adds, lies within ``error`` of ``value``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True, eq=False)
class Bounded:
    """``value``, computed in ``arithmetic``, is off by ``error`` at most."""

    value: Array
    error: Array
    arithmetic: np.dtype[Any]

    @staticmethod
    def operand(x: Any, arithmetic: Any) -> Bounded:
        """A number that is given; wider than the arithmetic, it is rounded first."""
        if isinstance(x, Bounded):
            return x
        value = np.asarray(x).astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            error = np.abs(value - value.astype(arithmetic))
        return _bounded(value, error, np.dtype(arithmetic))

    def __add__(self, other: Bounded) -> Bounded:
        return _rounded(self.value + other.value, self.error + other.error, self.arithmetic)

    def __sub__(self, other: Bounded) -> Bounded:
        return _rounded(self.value - other.value, self.error + other.error, self.arithmetic)

    def __mul__(self, other: Bounded) -> Bounded:
        a, b = np.abs(self.value), np.abs(other.value)
        error = a * other.error + b * self.error + self.error * other.error
        return _rounded(self.value * other.value, error, self.arithmetic)

    def __truediv__(self, other: Bounded) -> Bounded:
        value = self.value / other.value
        least = np.maximum(np.abs(other.value) - other.error, 0)
        error = (self.error + np.abs(value) * other.error) / least
        return _rounded(value, error, self.arithmetic)

    def sqrt(self) -> Bounded:
        root = np.sqrt(self.value)
        least = np.sqrt(np.maximum(self.value - self.error, 0))
        error = np.where(root > 0, self.error / (root + least), np.sqrt(self.error))
        return _rounded(root, error, self.arithmetic)

    def maximum(self, other: Bounded) -> Bounded:
        error = np.maximum(self.error, other.error)
        return _bounded(np.maximum(self.value, other.value), error, self.arithmetic)

    def clip(self, bound: Bounded) -> Bounded:
        value = np.clip(self.value, -bound.value, bound.value)
        return _bounded(value, np.maximum(self.error, bound.error), self.arithmetic)


def _bounded(value: Array, error: Array, arithmetic: np.dtype[Any]) -> Bounded:
    """NaN and infinity are exact: they stand where they stand, or the test fails."""
    return Bounded(value, np.where(np.isfinite(value), error, 0.0), arithmetic)


def _rounded(value: Array, error: Array, arithmetic: np.dtype[Any]) -> Bounded:
    """Half a unit in the last place of what may be off already; subnormal, it is flushed."""
    kind = np.finfo(arithmetic)
    half_a_unit = (np.abs(value) + error) * float(kind.eps) / 2
    return _bounded(value, error + np.maximum(half_a_unit, float(kind.tiny)), arithmetic)


def assert_within(got: Any, want: Bounded, name: str) -> None:
    """``got`` is a number within the error, rounded to its dtype; NaN is where it must be.

    Rounding is monotone: such a number lies between the interval's ends, rounded alike.
    """
    got = np.asarray(got)
    # This oracle in float64 rounds as often as float64 arithmetic does.
    error = want.error * (2 if want.arithmetic == np.float64 else 1)
    with np.errstate(over="ignore"):
        ends = [
            x.astype(want.arithmetic).astype(got.dtype)
            for x in (want.value - error, want.value + error)
        ]
    low, high = (x.astype(np.float64) for x in ends)
    number = got.astype(np.float64)
    fits = (low <= number) & (number <= high) | (np.isnan(want.value) & np.isnan(number))
    if not np.all(fits):
        at = np.unravel_index(np.argmin(fits), fits.shape)
        raise AssertionError(
            f"{name}: {np.sum(~fits)} of {fits.size} elements are off, first at {at}:"
            f" {number[at]!r} is not within {low[at]!r} and {high[at]!r}"
        )
