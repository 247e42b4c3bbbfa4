"""The sums beside an update that is lowered in parts, of some leaves each."""

from collections.abc import Sequence
import functools
import itertools
from typing import Any

from jax.extend.mlir import ir, lower_with_sharding_in_types
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from ..contract import UpdateSpec
from ..norm_stablehlo import axis, converted
from . import beside


class Parts:
    """What the parts of an equation give, until it is all there."""

    def __init__(self, ctx: mlir.LoweringRuleContext, spec: UpdateSpec) -> None:
        self._ctx, self._spec = ctx, spec
        self._parts: list[tuple[Sequence[int], ir.Value]] = []

    def aval(self, leaves: int, dtype: Any) -> Any:
        """The type of the sums of so many leaves: the equation's, but of this dtype."""
        whole, r = self._ctx.avals_out[-1], self._spec.batch_rank
        rows = (leaves,) * (self._spec.sums == "leaves")
        shape = (*whole.shape[:r], *rows, len(self._spec.sum_kinds))
        return whole.update(shape=shape, dtype=dtype)

    def add(self, leaves: Sequence[int], sums: ir.Value) -> None:
        """Of these leaves there are sums, of the shape of ``aval`` and of any dtype."""
        self._parts.append((leaves, sums))

    def add_by_leaf(self, leaves: Sequence[int], sums: Sequence[Sequence[ir.Value]]) -> None:
        """The same, as ``stablehlo.lower_leaves`` gives them."""
        own = self.aval(len(leaves), self._ctx.avals_out[-1].dtype)
        self.add(leaves, beside.result(self._ctx.replace(avals_out=[own]), self._spec, sums))

    def result(self) -> ir.Value:
        """The equation's last result: parts are added in the order in which they came."""
        types = [ir.RankedTensorType(x.type).element_type for _, x in self._parts]
        wide = max(types, key=lambda kind: int(kind.width))
        values = [converted(x, wide) for _, x in self._parts]
        aval = self._ctx.avals_out[-1]
        if self._spec.sums == "tree":
            whole = functools.reduce(hlo.add, values)
        else:
            whole = self._in_order(values)
        own = converted(whole, mlir.dtype_to_ir_type(aval.dtype))
        return lower_with_sharding_in_types(self._ctx, own, aval)

    def _in_order(self, values: Sequence[ir.Value]) -> ir.Value:
        """[*batch, leaves, kinds] of the parts -> that of the tree."""
        dim = self._spec.batch_rank
        whole = hlo.concatenate(values, axis(dim)) if len(values) > 1 else values[0]
        there = [leaf for leaves, _ in self._parts for leaf in leaves]
        places = sorted(range(len(there)), key=there.__getitem__)
        # Neighbours stay together.
        runs = [
            [place for _, place in run]
            for _, run in itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])
        ]
        if len(runs) == 1:
            return whole
        rows = [_slice(whole, dim, run[0], run[-1] + 1) for run in runs]
        return hlo.concatenate(rows, axis(dim))


def _slice(x: ir.Value, dim: int, low: int, high: int) -> ir.Value:
    shape = list(ir.RankedTensorType(x.type).shape)
    first = [low if d == dim else 0 for d in range(len(shape))]
    last = [high if d == dim else size for d, size in enumerate(shape)]
    return hlo.slice(x, *(mlir.dense_int_array(k) for k in (first, last, [1] * len(shape))))
