"""Tiny floats with gradual underflow, and rounding to them that is right on average."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

NUM_NOISES = 2**21
"""How many values the noise of one code has; all are as likely."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """The numbers that one code stands for.

    Attributes:
      min_exponent: of the smallest number that has both bits of its mantissa. Below it lie
        three more, evenly, and 0.
      num_codes: how many there are, with 0.
    """

    min_exponent: int
    num_codes: int

    @property
    def values(self) -> Array:
        """float64[num_codes], from 0 up."""
        k = np.arange(self.num_codes)
        smallest = 2.0**self.min_exponent
        normal = (1 + k % 4 / 4) * np.exp2(k // 4 - 1.0) * smallest
        return np.where(k < 4, k / 4 * smallest, normal)

    def place(self, x: Any) -> tuple[Array, Array]:
        """Code of the largest number not above x, and where x is between that and the next.

        Args:
          x: not negative, each a float32. NaN and infinity lie beyond the largest number.

        Returns:
          Codes, int64; and of the ``NUM_NOISES`` noises, how many round up. The sum with the
          smallest number is float32's, by which an x far below it is 0.
        """
        x = np.asarray(x, np.float32)
        smallest = np.float32(2.0**self.min_exponent)
        x = np.where(x < smallest, (x + smallest).astype(np.float64) - smallest, x)
        values = self.values
        x = np.where(x < values[-1], x, values[-1])
        code = np.searchsorted(values, x, side="right") - 1
        width = np.diff(values, append=np.inf)[code]
        ups = (x - values[code]) / width * NUM_NOISES
        return code, ups.astype(np.int64)

    def code(self, x: Any, noise: Any) -> Array:
        """x as a code, int64. As many noises as ``place`` says round up, the largest of all."""
        code, ups = self.place(x)
        return code + (np.asarray(noise, np.int64) >= NUM_NOISES - ups)


V = Scale(min_exponent=-98, num_codes=508)
U = Scale(min_exponent=-10, num_codes=64)
