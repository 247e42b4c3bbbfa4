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
all below). |u| is a float of 3 bits of mantissa with gradual underflow: multiples of 1/64 up to
1/8, and from there to 15 with 3 bits. (With 2 bits and a linear range that ended at 2^-10 m had
twice the noise, and rarely seen rows of embeddings lost 0.003 nats of 1.5 by it.)
The unit is a power of two, so nothing is lost by it. That 15 is enough follows from
Cauchy and Schwarz: with m = (1-b1) sum b1^k g_k and v = (1-b2) sum b2^k g_k^2,

    |m| <= sqrt(v) * (1-b1) / sqrt((1-b2) * (1 - b1^2/b2)),

which is 7.3 sqrt(v) for betas of 0.9 and 0.999, and sqrt(v) is below 2 units, whichever way v was
rounded: 14.5. (15.2 with the beta_2 that words have in place of 0.999: only gradients that grow by
a ninth at each step come to it.) ``noise.py`` has the bound of other betas; where that is above 15,
and where v is above 2.3e8, codes saturate.

Both are rounded up or down at random, so that the mean is right: to the nearest, v would stall,
since 0.1 % of it is far below half a unit. The random bits are a hash of the element's gradient
and param and of the step's number, so the result depends on nothing but the element: not on the
mesh, on the bucket or on the order. Equal elements round alike.
"""

from typing import Any

import numpy as np

from .ops import BitOps

V_DROPS, V_MIN, V_LARGEST = 21, -98, 507
"""Bits of a float32's mantissa that v's code drops; log2 of the least v that is not in the linear
range; the largest code, counted from 0."""

U_DROPS, U_MIN, U_LARGEST = 20, -3, 63
"""The same of m's."""

FIRST = 2
"""c where v is 0."""

ZERO = np.uint16(FIRST << 6)
"""The word of m = v = 0."""

_SIGN = 0x80000000
_EXPONENT = 0x7F800000

# A code is treated as the pattern of a float32 of its value, and in the linear range of the mean
# of its value and the range's end. So one addition of integers makes it of the word's bits.
_NUM_V, _NUM_U = 9, 6  # bits of the codes
_V_AT, _U_AT = 22, 16  # and their places in the word, as a float32's pattern
_U_SCALE = -3  # log2; with it the pattern of m's code 0 has zeros where codes are


def decode(ops: BitOps, word: Any) -> tuple[Any, Any]:
    """m and v, float32.

    Args:
      ops: what makes the operations.
      word: as float32 numbers.
    """
    w = ops.bits(word)
    c = ops.right(ops.both(w, _field(ops, _V_AT, _NUM_V)), _V_AT - V_DROPS)
    c = ops.maximum(c, ops.integer(FIRST << V_DROPS))
    v_bits = ops.add(c, ops.integer(_offset(V_MIN) - (FIRST << V_DROPS)))
    a = ops.both(ops.left(w, U_DROPS - _U_AT), _field(ops, U_DROPS, _NUM_U))
    u_bits = ops.add(a, ops.integer(_offset(U_MIN)))
    u = _value(ops, u_bits, ops.maximum(ops.float_of(u_bits), ops.number(2.0**U_MIN)))
    # 2^floor(e/2): half the exponent, whose bias is odd; with m's sign.
    normal = _normal(ops, v_bits)
    doubled = ops.add(normal, ops.integer(127 << 23))
    unit = ops.both(ops.right(doubled, 1), ops.integer(_EXPONENT))
    signed = ops.float_of(ops.either(unit, ops.both(w, ops.integer(_SIGN))))
    return ops.multiply(u, signed), _value(ops, v_bits, ops.float_of(normal))


def encode(ops: BitOps, m: Any, v: Any, random: Any) -> Any:
    """The word of ``m`` and ``v``, as float32 numbers that bfloat16 has.

    Args:
      ops: what makes the operations.
      m: float32.
      v: float32, not negative.
      random: int32, of which all 32 bits are used.
    """
    v_noise = ops.both(random, ops.integer((1 << V_DROPS) - 1))
    v_bits = ops.add(_pattern(ops, v, V_MIN, _number(V_LARGEST, V_DROPS, V_MIN)), v_noise)
    # 2^-floor(e/2), and for u's field to begin with zeros less; 1 less than a unit more, so that
    # the mantissa borrows nothing.
    top = ((383 + 2 * _U_SCALE) << 23) - 1
    halved = ops.right(ops.subtract(ops.integer(top), _normal(ops, v_bits)), 1)
    inverse = ops.float_of(ops.both(halved, ops.integer(_EXPONENT)))
    m_bits = ops.bits(m)
    size = ops.float_of(ops.both(m_bits, ops.integer(_SIGN - 1)))
    least = U_MIN + _U_SCALE
    u = _pattern(ops, ops.multiply(size, inverse), least, _number(U_LARGEST, U_DROPS, least))
    u_bits = ops.add(u, ops.right(random, 32 - U_DROPS))
    c = ops.subtract(v_bits, ops.integer(_offset(V_MIN) - (FIRST << V_DROPS)))
    c = ops.both(ops.left(c, _V_AT - V_DROPS), _field(ops, _V_AT, _NUM_V))
    a = ops.both(ops.right(u_bits, U_DROPS - _U_AT), _field(ops, _U_AT, _NUM_U))
    sign = ops.both(m_bits, ops.integer(_SIGN))
    return ops.float_of(ops.either(ops.either(c, a), sign))


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


def _offset(least: int) -> int:
    """The pattern of code 0: half of 2^least."""
    return (127 + least - 1) << 23


def _field(ops: BitOps, place: int, width: int) -> Any:
    return ops.integer(((1 << width) - 1) << place)


def _normal(ops: BitOps, v_bits: Any) -> Any:
    """Of what is in v's linear range, the pattern of the range's end."""
    return ops.maximum(v_bits, ops.integer((127 + V_MIN) << 23))


def _value(ops: BitOps, bits: Any, normal: Any) -> Any:
    """The value: of the mean of two numbers and one of them, the other."""
    x = ops.float_of(bits)
    return ops.subtract(ops.add(x, x), normal)


def _number(code: int, drops: int, least: int) -> float:
    """What a code beyond the linear range stands for."""
    octave, rest = divmod(code, 1 << (23 - drops))
    return float((1 + rest / (1 << (23 - drops))) * 2.0 ** (least - 1 + octave))


def _pattern(ops: BitOps, x: Any, least: int, largest: float) -> Any:
    """The pattern of ``x``, to which noise is to be added; NaN counts as the largest."""
    end = ops.number(2.0**least)
    x = ops.maximum(x, ops.multiply(ops.add(x, end), ops.number(0.5)))
    top = ops.number(largest)
    return ops.bits(ops.select(ops.less(x, top), x, top))
