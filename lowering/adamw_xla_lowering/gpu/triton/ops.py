"""Operations of Triton kernels, on numbers and on blocks of elements."""

from collections.abc import Callable
import dataclasses
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jax.extend.mlir.dialects import math as math_dialect

from ..call import tt

DIVIDE = "div.rn.f32 $0, $1, $2;"
"""PTX: the quotient of two float32, rounded to nearest."""


def element_type(x: ir.Value) -> ir.Type:
    """That of a scalar, or of a block's elements."""
    shaped = isinstance(x.type, ir.RankedTensorType)
    return ir.RankedTensorType(x.type).element_type if shaped else x.type


def _is_integer(x: ir.Value) -> bool:
    return isinstance(element_type(x), ir.IntegerType)


def _on(floats: Callable[..., Any], integers: Callable[..., Any]) -> Any:
    """An operation on two floats, or on two integers."""

    def make(a: ir.Value, b: ir.Value) -> ir.Value:
        return (integers if _is_integer(a) else floats)(a, b)

    return staticmethod(make)


@dataclasses.dataclass(frozen=True)
class BlockOps:
    """``Ops`` on blocks of one width and dtype."""

    width: int
    dtype: ir.Type

    add = _on(arith.addf, arith.addi)
    subtract = _on(arith.subf, arith.subi)
    multiply = _on(arith.mulf, arith.muli)
    maximum = _on(arith.maximumf, arith.maxsi)  # a NaN stays one
    minimum = staticmethod(arith.minsi)
    negate = staticmethod(arith.negf)
    select = staticmethod(arith.select)
    both = staticmethod(arith.andi)
    either = staticmethod(arith.ori)
    differ = staticmethod(arith.xori)

    @property
    def is_wide(self) -> bool:
        """Whether it is float64."""
        return self.dtype == ir.F64Type.get()

    def splat(self, x: ir.Value) -> ir.Value:
        """A scalar, spread over the block."""
        return tt.splat(ir.RankedTensorType.get([self.width], x.type), x)

    def operand(self, x: ir.Value) -> ir.Value:
        """A block in the arithmetic's dtype: this one, or int32 for integers."""
        return convert(x, ir.IntegerType.get_signless(32) if _is_integer(x) else self.dtype)

    def number(self, value: float) -> ir.Value:
        """One number everywhere."""
        return splat_constant(self.width, self.dtype, value)

    def integer(self, value: int) -> ir.Value:
        """One int32 everywhere, of the pattern that a number below 2^32 has."""
        i32 = ir.IntegerType.get_signless(32)
        kind = ir.RankedTensorType.get([self.width], i32)
        signed = ir.IntegerAttr.get(i32, value - (1 << 32) if value >> 31 > 0 else value)
        return arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, signed))

    def bits(self, x: ir.Value) -> ir.Value:
        """The pattern of a float32."""
        return self._bitcast(x, ir.IntegerType.get_signless(32))

    def float_of(self, bits: ir.Value) -> ir.Value:
        """The float32 of a pattern."""
        return self._bitcast(bits, ir.F32Type.get())

    def less(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Whether a < b; nothing is less than a NaN, nor a NaN than anything."""
        if _is_integer(a):
            return arith.cmpi(arith.CmpIPredicate.slt, a, b)
        return arith.cmpf(arith.CmpFPredicate.OLT, a, b)

    def is_set(self, flag: ir.Value) -> ir.Value:
        """Where a flag is not 0; NaN is not 0."""
        return arith.cmpf(arith.CmpFPredicate.UNE, flag, self.number(0.0))

    def left(self, x: ir.Value, places: int) -> ir.Value:
        """Shifted to the left."""
        return arith.shli(x, self.integer(places))

    def right(self, x: ir.Value, places: int) -> ir.Value:
        """Shifted to the right; zeros come in."""
        return arith.shrui(x, self.integer(places))

    def divide(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Rounded correctly, which ``arith.divf`` is not in float32.

        Nor is ``tt.precise_divf`` from jaxlib 0.12 on: it becomes ``div.full.f32``.
        """
        if self.is_wide:
            return arith.divf(a, b)
        return tt.elementwise_inline_asm([a.type], DIVIDE, "=r,r,r", True, 1, [a, b])

    def sqrt(self, x: ir.Value) -> ir.Value:
        """Rounded correctly."""
        return math_dialect.sqrt(x) if self.is_wide else tt.precise_sqrt(x)

    def clamp(self, low: ir.Value, x: ir.Value, high: ir.Value) -> ir.Value:
        """``x`` within bounds; a NaN stays one."""
        return arith.minimumf(arith.maximumf(x, low), high)

    def _bitcast(self, x: ir.Value, dtype: ir.Type) -> ir.Value:
        return tt.bitcast(ir.RankedTensorType.get([self.width], dtype), x)


def convert(x: ir.Value, dtype: ir.Type) -> ir.Value:
    """``x``, a scalar or a block, in another dtype: of floats, or of integers that fit."""
    own = element_type(x)
    if own == dtype:
        return x
    shaped = isinstance(x.type, ir.RankedTensorType)
    target = ir.RankedTensorType.get(ir.RankedTensorType(x.type).shape, dtype) if shaped else dtype
    wider, narrower = arith.extf, arith.truncf
    if _is_integer(x):
        wider, narrower = arith.extsi, arith.trunci
    return (wider if dtype.width > own.width else narrower)(target, x)


def load_scalar(pointer: ir.Value, index: ir.Value) -> ir.Value:
    """One element."""
    return tt.load(offset_by(pointer, index))


def offset_by(pointer: ir.Value, offset: ir.Value) -> ir.Value:
    """A pointer, or a block of them, moved by elements."""
    return tt.addptr(pointer.type, pointer, offset)


def arange(width: int) -> ir.Value:
    """The numbers of a block's elements, int32."""
    i32 = ir.IntegerType.get_signless(32)
    return tt.make_range(ir.RankedTensorType.get([width], i32), 0, width)


def constant(number: int, kind: ir.Type) -> ir.Value:
    """An integer."""
    return arith.constant(kind, ir.IntegerAttr.get(kind, number))


def splat_constant(width: int, dtype: ir.Type, number: float) -> ir.Value:
    """One float in all elements of a block."""
    kind = ir.RankedTensorType.get([width], dtype)
    attribute = ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(dtype, number))
    return arith.constant(kind, attribute)


def over_threads(ops: BlockOps, block: ir.Value) -> ir.Value:
    """The sum of a block's elements, by halves."""
    # jaxlib's stubs show the generated class, which this one takes the place of.
    reduce: Any = tt.ReduceOp
    total = reduce([block], 0)
    combine = total.regions[0].blocks.append(ops.dtype, ops.dtype)
    with ir.InsertionPoint(combine):
        tt.reduce_return([arith.addf(*combine.arguments)])
    return total.result[0]
