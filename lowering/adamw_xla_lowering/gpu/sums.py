"""Sums over a tree beside its update on GPUs, made by the kernels that make the update.

XLA:GPU lets a kernel that writes over its operands have one reduction, and copies them all for
a second (GPT-2 small: 560 kernels and 6.7 GB in place of 27 and 4.0): so a group of leaves has
one, of squares that are added first. Two sums are the parts of complex numbers, as in
``norm.py``. It stops at partial sums, which one kernel brings together and another adds.

Of a leaf larger than the cache it reckons that a kernel which also sums reads all twice, and
makes two kernels of it. Kernels that read the same, and none what the other makes, it joins
without reckoning: so for such leaves what is summed is computed once more from the operands, by
numbers of which XLA does not know that they are the same: times one.
"""

from collections.abc import Sequence
import functools
import math

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir
import numpy as np

from ..contract import UpdateSpec
from ..norm_stablehlo import axis, converted, sum_over
from ..stablehlo import Tree, slice_at
from ..sums import beside
from .rows import MIN_ROW, flat_shape, reshape, row_length, thinned

MAX_UNSUMMED = 4096
"""So few squares are as well left to the last reduction: XLA:GPU would not fuse theirs."""

MAX_ROW = 4096
"""With longer rows, fewer of them, XLA:GPU splits kernels of a dozen leaves."""

MAX_CACHED_BYTES = 32 << 20
"""Larger arrays are taken not to stay in a GPU's cache between two readings."""


class Pairs(beside.Summing):
    """The squares themselves, two and two the parts of complex numbers."""

    def types(self, spec: UpdateSpec, shape: Sequence[int], dtype: ir.Type) -> list[ir.Type]:
        """One for each pair of ``spec.sum_kinds``."""
        pair = ir.RankedTensorType.get(list(shape), ir.ComplexType.get(dtype))
        return [pair] * (len(spec.sum_kinds) // 2)

    def made(self, spec: UpdateSpec, arrays: Sequence[ir.Value]) -> list[ir.Value]:
        """Of the leaf's shape each."""
        return [hlo.complex(*pair) for pair in zip(arrays[::2], arrays[1::2], strict=True)]


def again(tree: Tree, leaf: int, number: int) -> ir.Value | None:
    """A one that XLA does not know, [1, 1], another for each group; None if once is enough.

    Groups that read the same one would be joined, and have two reductions.
    """
    param = tree.avals.leaves[leaf][0]
    if math.prod(param.shape) * param.dtype.itemsize <= MAX_CACHED_BYTES:
        return None
    # The first number of an array that no other group has.
    array = np.array([[1.0, -2.0 - number]], np.float32)
    constant = hlo.constant(ir.DenseElementsAttr.get(array))
    return slice_at(hlo.OptimizationBarrierOp([constant]).results[0], 0)


def of_group(leaves: Sequence[Sequence[ir.Value]]) -> list[ir.Value]:
    """What the composites of a group return for their sums -> an array of partial sums each."""
    found = []
    for pairs in zip(*leaves, strict=True):
        total = functools.reduce(hlo.add, [reshape(x, flat_shape(x, 0)) for x in pairs])
        found.append(_partly_summed(total))
    return found


def _partly_summed(x: ir.Value) -> ir.Value:
    kind = ir.RankedTensorType(x.type)
    (n,) = kind.shape
    if n <= MAX_UNSUMMED:
        return x
    row = row_length(n, MAX_ROW)
    if row < MIN_ROW:
        return reshape(sum_over(x, [0]), [1])
    return sum_over(reshape(x, [n // row, row]), [1])


def result(
    ctx: mlir.LoweringRuleContext, spec: UpdateSpec, groups: Sequence[Sequence[ir.Value]]
) -> ir.Value:
    """The equation's last result, from the partial sums of each group.

    With sums of leaves the groups are these, in their order.
    """
    dtype = mlir.dtype_to_ir_type(ctx.avals_out[-1].dtype)
    pairs = zip(*groups, strict=True)
    if spec.sums == "leaves":
        columns = [x for partial in pairs for x in _parts(_of_leaves(dtype, partial))]
        last = [reshape(x, [spec.num_leaves, 1]) for x in columns]
        return beside.with_type(ctx, hlo.concatenate(last, axis(1)))
    rows = []
    for partial in pairs:
        row = hlo.concatenate([_in(dtype, thinned(x)) for x in partial], axis(0))
        rows.append(reshape(row, [1, *ir.RankedTensorType(row.type).shape]))
    # The barrier keeps the compiler from merging the stages and splitting them its own way.
    table = hlo.OptimizationBarrierOp([hlo.concatenate(rows, axis(0))]).results[0]
    sums = _parts(sum_over(table, [1]))
    numbers = [slice_at(x, i) for i in range(len(rows)) for x in sums]
    return beside.with_type(ctx, hlo.concatenate(numbers, axis(0)))


def _of_leaves(dtype: ir.Type, partial: Sequence[ir.Value]) -> ir.Value:
    """Partial sums of each leaf -> [leaves]: leaves of as many are the rows of one table."""
    alike: dict[int, list[int]] = {}
    for i, x in enumerate(partial):
        alike.setdefault(ir.RankedTensorType(x.type).shape[0], []).append(i)
    sums: dict[int, ir.Value] = {}
    for length, leaves in alike.items():
        rows = [reshape(_in(dtype, partial[i]), [1, length]) for i in leaves]
        table = hlo.OptimizationBarrierOp([hlo.concatenate(rows, axis(0))]).results[0]
        column = sum_over(table, [1])
        sums.update((i, slice_at(column, k)) for k, i in enumerate(leaves))
    return hlo.concatenate([sums[i] for i in range(len(partial))], axis(0))


def _parts(x: ir.Value) -> tuple[ir.Value, ir.Value]:
    return hlo.real(x), hlo.imag(x)


def _in(dtype: ir.Type, x: ir.Value) -> ir.Value:
    """Complex numbers with parts of this dtype."""
    if ir.RankedTensorType(x.type).element_type == ir.ComplexType.get(dtype):
        return x
    return hlo.complex(*(converted(part, dtype) for part in _parts(x)))
