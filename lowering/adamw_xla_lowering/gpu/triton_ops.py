"""Operations of Triton kernels, on numbers and on blocks of elements."""

import dataclasses

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jax.extend.mlir.dialects import math as math_dialect

from .call import tt

DIVIDE = "div.rn.f32 $0, $1, $2;"
"""PTX: the quotient of two float32, rounded to nearest."""


@dataclasses.dataclass(frozen=True)
class BlockOps:
    """``arithmetic.Ops`` on blocks of one width and dtype."""

    width: int
    dtype: ir.Type

    @property
    def is_wide(self) -> bool:
        """Whether it is float64."""
        return self.dtype == ir.F64Type.get()

    def splat(self, x: ir.Value) -> ir.Value:
        """A scalar, spread over the block."""
        return tt.splat(ir.RankedTensorType.get([self.width], x.type), x)

    def convert(self, x: ir.Value) -> ir.Value:
        """A block of another dtype."""
        return convert(x, self.dtype)

    def constant(self, number: float) -> ir.Value:
        """One number everywhere."""
        return splat_constant(self.width, self.dtype, number)

    def is_set(self, flag: ir.Value) -> ir.Value:
        """Where a flag is not 0; NaN is not 0."""
        return arith.cmpf(arith.CmpFPredicate.UNE, flag, self.constant(0.0))

    add = staticmethod(arith.addf)
    subtract = staticmethod(arith.subf)
    multiply = staticmethod(arith.mulf)
    negate = staticmethod(arith.negf)
    select = staticmethod(arith.select)
    maximum = staticmethod(arith.maximumf)  # a NaN stays one

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


def convert(x: ir.Value, dtype: ir.Type) -> ir.Value:
    """``x``, a scalar or a block, in another float dtype."""
    shaped = isinstance(x.type, ir.RankedTensorType)
    own = ir.RankedTensorType(x.type).element_type if shaped else x.type
    if own == dtype:
        return x
    target = ir.RankedTensorType.get(ir.RankedTensorType(x.type).shape, dtype) if shaped else dtype
    return (arith.extf if dtype.width > own.width else arith.truncf)(target, x)


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
