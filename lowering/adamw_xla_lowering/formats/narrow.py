"""bfloat16 params of which no part of a step is lost.

Rounded at random, a param moves by the step on average; with 16 bits more, the *remainder*, it is
a float32 number, the *master*. Both are written as masks on float32's pattern and a conversion that
is exact: a bitcast through 16-bit integers would split the TPU's kernel.
"""

from typing import Any

from .ops import BitOps

_SIGN, _INFINITY, _HIGH = 0x80000000, 0x7F800000, 0xFFFF0000
_LARGEST = 0x7F7F0000


def stochastic(ops: BitOps, x: Any, random: Any) -> Any:
    """One of the two bfloat16 numbers beside ``x``, as float32; infinities and NaN stay.

    What is finite stays finite.

    Args:
      ops: what makes the operations.
      x: float32.
      random: int32, of which 16 bits that follow from all are used.
    """
    bits = ops.bits(x)
    size = ops.both(bits, ops.integer(_SIGN - 1))
    noise = ops.right(ops.multiply(random, ops.integer(0x2C1B3C6D)), 16)
    up = ops.both(ops.add(size, noise), ops.integer(_HIGH))
    up = ops.minimum(up, ops.integer(_LARGEST))
    rounded = ops.float_of(ops.either(up, ops.both(bits, ops.integer(_SIGN))))
    return ops.select(ops.less(size, ops.integer(_INFINITY)), rounded, x)


def join(ops: BitOps, param: Any, remainder: Any) -> Any:
    """The master of a bfloat16 param, both as float32.

    A param that was written over keeps its value to within a unit, and is no NaN: what a remainder
    cannot be beside 0 and infinity counts as 0.

    Args:
      ops: what makes the operations.
      param: float32, of bfloat16's numbers.
      remainder: int32, -32768 to 32767.
    """
    bits = ops.bits(param)
    size = ops.both(bits, ops.integer(_SIGN - 1))
    zero = ops.integer(0)
    low = ops.select(ops.less(zero, size), remainder, ops.maximum(remainder, zero))
    is_finite = ops.less(size, ops.integer(_INFINITY))
    low = ops.select(is_finite, low, ops.minimum(low, zero))
    joined = ops.float_of(ops.add(bits, low))
    return ops.select(ops.less(ops.integer(_INFINITY), size), param, joined)


def split(ops: BitOps, master: Any) -> tuple[Any, Any]:
    """The nearest bfloat16 number, ties away from 0, and the remainder; ``join`` undoes it.

    Ties to even would not: two masters would have one param and one remainder. Subnormal
    masters count as 0, on every device; a NaN's remainder is 0.

    Args:
      ops: what makes the operations.
      master: float32.

    Returns:
      float32 of bfloat16's numbers, and int32.
    """
    bits = ops.bits(master)
    size = ops.both(bits, ops.integer(_SIGN - 1))
    is_small = ops.less(size, ops.integer(0x00800000))
    bits = ops.select(is_small, ops.both(bits, ops.integer(_SIGN)), bits)
    high = ops.both(ops.add(bits, ops.integer(0x8000)), ops.integer(_HIGH))
    is_nan = ops.less(ops.integer(_INFINITY), size)
    param = ops.select(is_nan, master, ops.float_of(high))
    return param, ops.select(is_nan, ops.integer(0), ops.subtract(bits, high))
