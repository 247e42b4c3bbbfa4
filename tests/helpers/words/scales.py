"""Tiny floats with gradual underflow, and rounding to them that is right on average."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """The numbers that one code stands for.

    Attributes:
      min_exponent: of the smallest number that has all bits of its mantissa. Below it lie
        2^mantissa - 1 more, evenly, and 0.
      num_codes: how many there are, with 0.
      mantissa: bits.
    """

    min_exponent: int
    num_codes: int
    mantissa: int

    @property
    def num_noises(self) -> int:
        """How many values the noise has, one for each float32 between two codes' numbers."""
        return 2 ** (23 - self.mantissa)

    @property
    def values(self) -> Array:
        """float64[num_codes], from 0 up."""
        k = np.arange(self.num_codes)
        smallest = 2.0**self.min_exponent
        n = 2**self.mantissa
        normal = (1 + k % n / n) * np.exp2(k // n - 1.0) * smallest
        return np.where(k < n, k / n * smallest, normal)

    def place(self, x: Any) -> tuple[Array, Array]:
        """Code of the largest number not above x, and where x is between that and the next.

        Args:
          x: not negative, each a float32. NaN and infinity lie beyond the largest number.

        Returns:
          Codes, int64; and of the ``num_noises`` noises, how many round up. The sum with the
          smallest number is float32's, by which an x far below it is 0.
        """
        x = np.asarray(x, np.float32)
        smallest = np.float32(2.0**self.min_exponent)
        x = np.where(x < smallest, (x + smallest).astype(np.float64) - smallest, x)
        values = self.values
        x = np.where(x < values[-1], x, values[-1])
        code = np.searchsorted(values, x, side="right") - 1
        width = np.diff(values, append=np.inf)[code]
        ups = (x - values[code]) / width * self.num_noises
        return code, ups.astype(np.int64)

    def code(self, x: Any, noise: Any) -> Array:
        """x as a code, int64. As many noises as ``place`` says round up, the largest of all."""
        code, ups = self.place(x)
        return code + (np.asarray(noise, np.int64) >= self.num_noises - ups)


V = Scale(min_exponent=-98, num_codes=508, mantissa=2)
U = Scale(min_exponent=-3, num_codes=64, mantissa=3)
