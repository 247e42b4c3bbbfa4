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


@dataclasses.dataclass(frozen=True)
class Machine:
    """How far off float32 operations may be, in half units in the last place of the result.

    IEEE's operations are rounded once: by one. Float64's are IEEE's on every machine here.
    """

    divide: float = 1
    sqrt: float = 1


IEEE = Machine()
PTX = Machine(divide=4, sqrt=2)
"""What XLA:GPU makes of StableHLO. By the PTX ISA, ``div.full.f32`` is off by 2 units in the
last place at most, ``sqrt.approx.f32`` by 2^-23 of its result. (Sums and products are
rounded to nearest, and contracted: a rounding less.)"""


@dataclasses.dataclass(frozen=True, eq=False)
class Bounded:
    """``value``, computed in ``arithmetic``, is off by ``error`` at most."""

    value: Array
    error: Array
    arithmetic: np.dtype[Any]
    machine: Machine = IEEE

    @staticmethod
    def operand(x: Any, arithmetic: Any, machine: Machine = IEEE) -> Bounded:
        """A number that is given; wider than the arithmetic, it is rounded first."""
        if isinstance(x, Bounded):
            return x
        value = np.asarray(x).astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            error = np.abs(value - value.astype(arithmetic))
        return Bounded(value, _finite(value, error), np.dtype(arithmetic), machine)

    def where(self, kept: Any) -> Bounded:
        """0, exactly, but where it is kept."""
        value, error = (np.where(kept, x, 0.0) for x in (self.value, self.error))
        return dataclasses.replace(self, value=value, error=error)

    def __add__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        a, b = np.abs(self.value), np.abs(other.value)
        error = a * other.error + b * self.error + self.error * other.error
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        value = self.value / other.value
        least = np.maximum(np.abs(other.value) - other.error, 0)
        error = (self.error + np.abs(value) * other.error) / least
        return self._rounded(value, error, self.machine.divide)

    def sqrt(self) -> Bounded:
        root = np.sqrt(self.value)
        least = np.sqrt(np.maximum(self.value - self.error, 0))
        error = np.where(root > 0, self.error / (root + least), np.sqrt(self.error))
        return self._rounded(root, error, self.machine.sqrt)

    def maximum(self, other: Bounded) -> Bounded:
        error = np.maximum(self.error, other.error)
        return self._like(np.maximum(self.value, other.value), error)

    def clip(self, bound: Bounded) -> Bounded:
        value = np.clip(self.value, -bound.value, bound.value)
        return self._like(value, np.maximum(self.error, bound.error))

    def sum_of_squares(self, roundings: float) -> Bounded:
        """Over all elements, where each square meets at most so many roundings, its own included.

        Nothing is negative: so each rounding is off by half a unit in the last place of the sum
        at most. Squares that are subnormal are flushed.
        """
        kind = np.finfo(self.arithmetic)
        squares = np.square(np.abs(self.value) + self.error)
        value = np.sum(np.square(self.value))
        off = np.sum(squares) * np.expm1(roundings * np.log1p(float(kind.eps) / 2))
        off += self.value.size * float(kind.tiny)
        return self._like(value, np.sum(squares) - value + off)

    def _like(self, value: Array, error: Array) -> Bounded:
        return dataclasses.replace(self, value=value, error=_finite(value, error))

    def _rounded(self, value: Array, error: Array, halves: float = 1) -> Bounded:
        """Half units in the last place of what may be off already; subnormal, it is flushed."""
        kind = np.finfo(self.arithmetic)
        units = halves if self.arithmetic == np.float32 else 1
        off = (np.abs(value) + error) * units * float(kind.eps) / 2
        return self._like(value, error + np.maximum(off, float(kind.tiny)))


def _finite(value: Array, error: Array) -> Array:
    """NaN and infinity are exact: they stand where they stand, or the test fails."""
    return np.where(np.isfinite(value), error, 0.0)


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
