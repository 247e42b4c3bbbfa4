"""The operations that an update is described with, and that each kind of program makes its own."""

from typing import Any, Protocol


class BitOps(Protocol):
    """Makes elementwise operations on float32 values, and on int32 values, their patterns.

    ``add``, ``subtract``, ``multiply``, ``maximum`` and ``select`` take either; integers wrap.
    """

    def add(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def subtract(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def multiply(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def maximum(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def select(self, condition: Any, yes: Any, no: Any, /) -> Any: ...  # noqa: D102

    def number(self, value: float, /) -> Any:
        """A float32 constant."""

    def integer(self, value: int, /) -> Any:
        """An int32 constant, of the pattern that a number below 2^32 has."""

    def bits(self, x: Any, /) -> Any:
        """The pattern of a float32."""

    def float_of(self, bits: Any, /) -> Any:
        """The float32 of a pattern."""

    def minimum(self, a: Any, b: Any, /) -> Any:
        """Of integers."""

    def less(self, a: Any, b: Any, /) -> Any:
        """Whether a < b, both floats or both integers."""

    def both(self, a: Any, b: Any, /) -> Any:
        """The bits that both integers have."""

    def either(self, a: Any, b: Any, /) -> Any:
        """The bits that one of them has."""

    def differ(self, a: Any, b: Any, /) -> Any:
        """The bits in which they differ."""

    def left(self, x: Any, places: int, /) -> Any:
        """An integer shifted to the left."""

    def right(self, x: Any, places: int, /) -> Any:
        """An integer shifted to the right; zeros come in."""


class Ops(BitOps, Protocol):
    """What a whole update needs: of float64 values too, but for patterns."""

    def divide(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def negate(self, x: Any, /) -> Any: ...  # noqa: D102
    def sqrt(self, x: Any, /) -> Any: ...  # noqa: D102
    def clamp(self, low: Any, x: Any, high: Any, /) -> Any: ...  # noqa: D102

    def is_set(self, flag: Any, /) -> Any:
        """Where a flag is not 0; NaN is not 0."""
