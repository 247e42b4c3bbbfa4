"""One word of 16 bits for each element's m and v.

A word is the pattern of a normal, finite bfloat16 number, and lies in a bfloat16 array. So no
conversion between bfloat16 and float32, no flush of subnormals and no canonical NaN can change
it on any device; and XLA:TPU, which makes two kernels of an update as soon as one result is an
integer array, keeps it one.

    bit   15     14 13 12 11 10 9 8 7   6      5 4 3 2 1 0
          sign   v's code c, 9 bits            m's code a, 6 bits
          of m   (the bfloat16's exponent      (the rest of
                 and first bit of mantissa)    the mantissa)

v is a float of 2 bits of mantissa with gradual underflow, c = 2 + its code: from 2^-100 (and
multiples of it up to 2^-98) to 1.75 * 2^27, and 0. As c runs from 2 to 509, the exponent field is
never 0 nor 255. What is below 2 counts as 2, so an array of zeros is one of m = v = 0.

m is held as u = m / 2^floor(e/2), where 2^e <= v < 2^(e+1), v being what is stored (e = -98 for
all below). |u| is a float of 2 bits of mantissa with gradual underflow, from 2^-12 to 28, and 0.
The unit is a power of two, so nothing is lost by it. That 28 is enough follows from
Cauchy and Schwarz: with m = (1-b1) sum b1^k g_k and v = (1-b2) sum b2^k g_k^2,

    |m| <= sqrt(v) * (1-b1) / sqrt((1-b2) * (1 - b1^2/b2)),

which is 7.3 sqrt(v) for betas of 0.9 and 0.999. sqrt(v) is below 2 units, and what rounding v
down by a quarter adds is sqrt(5/4): 16.3. ``noise.py`` has the bound of other betas; beyond it, and
where v is above 2.3e8, codes saturate.

Both are rounded up or down at random, so that the mean is right: to the nearest, v would stall,
since 0.1 % of it is far below half a unit. The random bits are a hash of the element's gradient
and param and of the step's number, so the result depends on nothing but the element: not on the
mesh, on the bucket or on the order. Equal elements round alike.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .ops import BitOps

MANTISSA = 21
"""Bits of a float32's mantissa that a code drops."""

V_MIN, V_LARGEST = -98, 507
"""log2 of the least v that is not in the linear range; the largest code, counted from 0."""

U_MIN, U_LARGEST = -10, 63
"""The same of m's."""

FIRST = 2
"""c where v is 0."""

ZERO = np.uint16(FIRST << 6)
"""The word of m = v = 0."""

_SIGN = 0x80000000
_LINEAR = 4  # codes of the linear range: those that 2 bits of mantissa have


def decode(ops: BitOps, word: Any) -> tuple[Any, Any]:
    """m and v, float32.

    Args:
      ops: what makes the operations.
      word: as float32 numbers.
    """
    w = ops.bits(word)
    c = ops.both(ops.right(w, 22), ops.integer(0x1FF))
    code = ops.maximum(ops.subtract(c, ops.integer(FIRST)), ops.integer(0))
    u = _value(ops, ops.both(ops.right(w, 16), ops.integer(0x3F)), U_MIN)
    signed = ops.float_of(ops.either(ops.bits(u), ops.both(w, ops.integer(_SIGN))))
    return ops.multiply(signed, ops.float_of(_unit(ops, code))), _value(ops, code, V_MIN)


def encode(ops: BitOps, m: Any, v: Any, random: Any) -> Any:
    """The word of ``m`` and ``v``, as float32 numbers that bfloat16 has.

    Args:
      ops: what makes the operations.
      m: float32.
      v: float32, not negative.
      random: int32, of which all 32 bits are used.
    """
    code = _code(ops, v, ops.both(random, ops.integer((1 << MANTISSA) - 1)), V_MIN, V_LARGEST)
    inverse = ops.subtract(ops.integer(254 << 23), _unit(ops, code))
    m_bits = ops.bits(m)
    size = ops.float_of(ops.both(m_bits, ops.integer(_SIGN - 1)))
    u = ops.multiply(size, ops.float_of(inverse))
    a = _code(ops, u, ops.right(random, 32 - MANTISSA), U_MIN, U_LARGEST)
    c = ops.left(ops.add(code, ops.integer(FIRST)), 22)
    word = ops.either(ops.either(c, ops.left(a, 16)), ops.both(m_bits, ops.integer(_SIGN)))
    return ops.float_of(word)


def random_bits(ops: BitOps, grad: Any, param: Any, salt: Any) -> Any:
    """32 bits for one element of one step.

    Wellons' ``lowbias32`` finisher, of a sum in which each part has an odd factor.

    Args:
      ops: what makes the operations.
      grad: float32, as it was given.
      param: float32, before the step.
      salt: float32, the step's number.
    """
    x = ops.add(ops.multiply(ops.bits(grad), ops.integer(0x9E3779B9)), ops.bits(param))
    x = ops.add(x, ops.multiply(ops.bits(salt), ops.integer(0x85EBCA6B)))
    x = ops.multiply(ops.differ(x, ops.right(x, 16)), ops.integer(0x7FEB352D))
    x = ops.multiply(ops.differ(x, ops.right(x, 15)), ops.integer(0x846CA68B))
    return ops.differ(x, ops.right(x, 16))


def _unit(ops: BitOps, code: Any) -> Any:
    """The pattern of 2^floor(e/2), from v's code."""
    low = (127 + V_MIN) << 2
    raw = ops.add(ops.maximum(code, ops.integer(_LINEAR)), ops.integer(low - _LINEAR))
    exponent = ops.right(ops.add(ops.right(raw, 2), ops.integer(127)), 1)
    return ops.left(exponent, 23)


def _value(ops: BitOps, code: Any, least: int) -> Any:
    """What a code stands for; the float that the linear range begins at is taken off there."""
    is_linear = ops.less(code, ops.integer(_LINEAR))
    low = (127 + least) << 2
    offset = _either(ops, is_linear, ops.integer, low, low - _LINEAR)
    value = ops.float_of(ops.left(ops.add(code, offset), MANTISSA))
    return ops.subtract(value, _either(ops, is_linear, ops.number, 2.0**least, 0.0))


def _code(ops: BitOps, x: Any, noise: Any, least: int, largest: int) -> Any:
    """The code of ``x``, rounded up where the noise carries."""
    is_linear = ops.less(x, ops.number(2.0**least))
    y = ops.add(x, _either(ops, is_linear, ops.number, 2.0**least, 0.0))
    low = (127 + least) << 2
    offset = _either(ops, is_linear, ops.integer, low, low - _LINEAR)
    code = ops.subtract(ops.right(ops.add(ops.bits(y), noise), MANTISSA), offset)
    return ops.minimum(code, ops.integer(largest))


def _either(ops: BitOps, condition: Any, make: Callable[[Any], Any], yes: float, no: float) -> Any:
    return ops.select(condition, make(yes), make(no))
