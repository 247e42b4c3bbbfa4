"""``Ops`` in StableHLO, on tensors of one shape."""

from collections.abc import Callable
import dataclasses
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
import numpy as np


@dataclasses.dataclass(frozen=True)
class HloOps:
    """Makes operations; ``spread`` makes a tensor of the shape of a scalar."""

    shape: tuple[int, ...]
    dtype: ir.Type
    spread: Callable[[ir.Value], ir.Value]

    add = staticmethod(hlo.add)
    subtract = staticmethod(hlo.subtract)
    multiply = staticmethod(hlo.multiply)
    divide = staticmethod(hlo.divide)
    maximum = staticmethod(hlo.maximum)
    minimum = staticmethod(hlo.minimum)
    negate = staticmethod(hlo.negate)
    sqrt = staticmethod(hlo.sqrt)
    clamp = staticmethod(hlo.clamp)
    select = staticmethod(hlo.select)
    both = staticmethod(hlo.and_)
    either = staticmethod(hlo.or_)
    differ = staticmethod(hlo.xor)

    def number(self, value: float) -> ir.Value:
        """A constant of the compute dtype."""
        is_wide = self.dtype == ir.F64Type.get()
        return self._constant(np.full((), value, np.float64 if is_wide else np.float32))

    def integer(self, value: int) -> ir.Value:
        """An int32 constant."""
        return self._constant(np.full((), value, np.int64).astype(np.int32))

    def bits(self, x: ir.Value) -> ir.Value:
        """The pattern of a float32."""
        i32 = ir.IntegerType.get_signless(32)
        return hlo.bitcast_convert(ir.RankedTensorType.get(self.shape, i32), x)

    def float_of(self, bits: ir.Value) -> ir.Value:
        """The float32 of a pattern."""
        return hlo.bitcast_convert(ir.RankedTensorType.get(self.shape, ir.F32Type.get()), bits)

    def less(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Whether a < b."""
        return hlo.compare(a, b, hlo.ComparisonDirectionAttr.get("LT"))

    def is_set(self, flag: ir.Value) -> ir.Value:
        """Where a flag is not 0; NaN is not 0."""
        return hlo.compare(flag, self.number(0.0), hlo.ComparisonDirectionAttr.get("NE"))

    def left(self, x: ir.Value, places: int) -> ir.Value:
        """Shifted to the left."""
        return hlo.shift_left(x, self.integer(places))

    def right(self, x: ir.Value, places: int) -> ir.Value:
        """Shifted to the right; zeros come in."""
        return hlo.shift_right_logical(x, self.integer(places))

    def _constant(self, array: Any) -> ir.Value:
        return self.spread(hlo.constant(ir.DenseElementsAttr.get(array, shape=[])))
