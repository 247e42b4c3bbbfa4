"""The squared norm as StableHLO, for each platform, or by a kernel on GPUs.

CPUs have no kernel of their own for it: XLA reads 268 MB of gradients at 30 to 33 GB/s on two
cores where a loop written for it read them at 36 to 37, one millisecond sooner.
"""

from collections.abc import Iterable, Sequence
import functools
from typing import Any

from jax.extend.mlir import ir, lower_with_sharding_in_types
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from . import gpu_norm
from ._jax_private import devices_hold_whole_operands
from .contract import NormSpec
from .gpu import cut_evenly, flat_shape, reshape
from .platforms import default_implementation
from .stablehlo import slice_at


def lower_by_leaf(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, *leaves: ir.Value, spec: NormSpec
) -> list[ir.Value]:
    """One reduction per leaf: right under any sharding of the leaves."""
    (aval_out,) = ctx.avals_out
    sums = [
        _reduce(_square(x, scale, spec.batch_rank), spec.batch_rank, aval_out.shape) for x in leaves
    ]
    return _finish(ctx, sums, spec)


def lower_added(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, *leaves: ir.Value, spec: NormSpec
) -> list[ir.Value]:
    """Squares of leaves of one type are added before one reduction; for TPUs.

    Nothing is reshaped, which would move data there. For GPT-2 small on v5e, 163 fusions
    instead of 296 with the update, a third less of temporaries and 9 % fewer of the
    compiler's estimated cycles.
    """
    if spec.per_leaf or not devices_hold_whole_operands(ctx):
        return lower_by_leaf(ctx, scale, *leaves, spec=spec)
    (aval_out,) = ctx.avals_out
    alike: dict[ir.Type, list[ir.Value]] = {}
    for x in leaves:
        alike.setdefault(x.type, []).append(_square(x, scale, spec.batch_rank))
    runs = (run for group in alike.values() for run in cut_evenly(group, MAX_ADDED_SUMMANDS))
    sums = [
        _reduce(functools.reduce(hlo.add, run), spec.batch_rank, aval_out.shape) for run in runs
    ]
    return _finish(ctx, sums, spec)


def lower_cuda(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, *leaves: ir.Value, spec: NormSpec
) -> list[ir.Value]:
    """One kernel and a reduction of what it makes, where that is asked for."""
    implementation = spec.implementation or default_implementation()
    if implementation == "native" and not spec.per_leaf and spec.batch_rank == 0:
        sums = gpu_norm.partial_sums(ctx, scale, leaves)
        if sums is not None:
            return _finish(ctx, [_reduce(sums, 0, ())], spec)
    return lower_merged(ctx, scale, *leaves, spec=spec)


def lower_merged(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, *leaves: ir.Value, spec: NormSpec
) -> list[ir.Value]:
    """Squares of leaves of one size are added before one reduction; for GPUs.

    Leaves that are sharded in different ways cannot be added without moving them, so it is
    done only where each device holds whole operands.
    """
    if not devices_hold_whole_operands(ctx):
        return lower_by_leaf(ctx, scale, *leaves, spec=spec)
    (aval_out,) = ctx.avals_out
    r = spec.batch_rank
    alike: dict[tuple[ir.Type, ...], list[int]] = {}
    flat = [reshape(x, flat_shape(x, r)) for x in leaves]
    for i, x in enumerate(flat):
        alike.setdefault((x.type,), []).append(i)
    if spec.per_leaf:
        return _finish(ctx, _sums_by_leaf(scale, flat, alike.values(), spec, aval_out), spec)
    partial = []
    for group in alike.values():
        for run in cut_evenly(group, MAX_MERGED_SUMMANDS):
            squares = [_square(flat[i], scale, r) for i in run]
            partial.append(_partial_sums(functools.reduce(hlo.add, squares), r))
    if r == 0:
        # One reduction of all partial sums, in place of a second stage for each group; the
        # barrier keeps the compiler from merging the stages and splitting them its own way.
        partial = list(hlo.OptimizationBarrierOp([hlo.concatenate(partial, _axis(0))]).results)
    return _finish(ctx, [_reduce(x, r, aval_out.shape) for x in partial], spec)


def _sums_by_leaf(
    scale: ir.Value,
    flat: Sequence[ir.Value],
    alike: Iterable[Sequence[int]],
    spec: NormSpec,
    aval_out: Any,
) -> list[ir.Value]:
    """A sum for each leaf: leaves of one size are the rows of one table.

    XLA:GPU reads the rows where they are, but for a table of a few 100 KB, which it makes.
    """
    r = spec.batch_rank
    batch = aval_out.shape[:r]
    sums: dict[int, ir.Value] = {}
    for run in (run for group in alike for run in cut_evenly(group, MAX_MERGED_SUMMANDS)):
        rows = []
        for i in run:
            x = _square(flat[i], scale, r)
            shape = ir.RankedTensorType(x.type).shape
            rows.append(reshape(x, [*shape[:r], 1, shape[r]]))
        table = _partial_sums(hlo.concatenate(rows, _axis(r)), r + 1)
        if ir.RankedTensorType(table.type).shape[r + 1] > 1:
            table = hlo.OptimizationBarrierOp([table]).results[0]
        row = _reduce(table, r + 1, (*batch, len(run)))
        sums.update((i, reshape(slice_at(row, k), batch)) for k, i in enumerate(run))
    return [sums[i] for i in range(len(flat))]


def _partial_sums(x: ir.Value, batch_rank: int) -> ir.Value:
    """[*batch, n] -> [*batch, k] with the same sum and a smaller k, by one kernel."""
    kind = ir.RankedTensorType(x.type)
    *batch, n = kind.shape
    longest = min(max(n // MIN_ROWS, MIN_ROW), MAX_ROW)
    columns = next((c for c in range(longest, 0, -1) if n % c == 0), 1)
    if n <= MAX_UNSUMMED or columns < MIN_ROW:
        return x
    rows = n // columns
    fold = next((k for k in (8, 4, 2) if rows % k == 0 and rows // k >= MIN_FOLDED_ROWS), 1)
    folded = ir.RankedTensorType.get([*batch, fold, rows // fold, columns], kind.element_type)
    dims = (batch_rank, batch_rank + 2)
    return _sum(hlo.reshape(folded, x), dims)


MAX_ADDED_SUMMANDS = 16
"""More make no difference to XLA:TPU's estimate, and keep more gradients alive."""

MAX_MERGED_SUMMANDS = 80
"""Fewer than ``gpu.MAX_FUSION_OPERANDS``, with room for what else a fusion reads and makes."""

MAX_UNSUMMED = 1000
"""So many squares are as well left to the last reduction: that saves kernels for 4 kB each."""

MAX_ROW = 8192
"""XLA:GPU splits longer row reductions into two kernels."""

MIN_ROWS = 256
"""With fewer, XLA:GPU would not fuse what makes the rows: too few blocks for a device."""

MIN_FOLDED_ROWS = 2048
"""Up to eight rows that are far apart are added by one kernel too, if so many sums are left."""

MIN_ROW = 256
"""Shorter rows are worse than the compiler's own two stages."""


def _square(x: ir.Value, scale: ir.Value, batch_rank: int) -> ir.Value:
    """``(scale * x)**2`` in the dtype of ``scale``, with the batch of both."""
    dtype = ir.RankedTensorType(scale.type).element_type
    shape = ir.RankedTensorType(x.type).shape
    batch = ir.RankedTensorType(scale.type).shape
    joined = [max(a, b) if 0 not in (a, b) else 0 for a, b in zip(batch, shape, strict=False)]
    kind = ir.RankedTensorType.get([*joined, *shape[batch_rank:]], dtype)
    x = hlo.convert(ir.RankedTensorType.get(shape, dtype), x)
    x = hlo.broadcast_in_dim(kind, x, mlir.dense_int_array(list(range(len(shape)))))
    scale = hlo.broadcast_in_dim(kind, scale, mlir.dense_int_array(list(range(batch_rank))))
    x = hlo.multiply(x, scale)
    return hlo.multiply(x, x)


def _reduce(x: ir.Value, batch_rank: int, shape_out: Sequence[int]) -> ir.Value:
    """Sums all dimensions behind the batch, and spreads the result over the whole batch."""
    kind = ir.RankedTensorType(x.type)
    own = _sum(x, range(batch_rank, len(kind.shape)))
    whole = ir.RankedTensorType.get(shape_out[:batch_rank], kind.element_type)
    return hlo.broadcast_in_dim(whole, own, mlir.dense_int_array(list(range(batch_rank))))


def _sum(x: ir.Value, dims: Sequence[int]) -> ir.Value:
    """Sums some dimensions."""
    kind = ir.RankedTensorType(x.type)
    dtype = kind.element_type
    scalar = ir.RankedTensorType.get([], dtype)
    zero = hlo.constant(ir.DenseElementsAttr.get_splat(scalar, ir.FloatAttr.get(dtype, 0.0)))
    kept = [size for d, size in enumerate(kind.shape) if d not in dims]
    own = ir.RankedTensorType.get(kept, dtype)
    op = hlo.ReduceOp([own], [x], [zero], mlir.dense_int_array(list(dims)))
    with ir.InsertionPoint(op.body.blocks.append(scalar, scalar)) as point:
        hlo.return_([hlo.add(*point.block.arguments)])
    return op.results[0]


def _axis(index: int) -> ir.IntegerAttr:
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), index)


def _finish(ctx: mlir.LoweringRuleContext, sums: list[ir.Value], spec: NormSpec) -> list[ir.Value]:
    (aval_out,) = ctx.avals_out
    if spec.per_leaf:
        dtype = mlir.dtype_to_ir_type(aval_out.dtype)
        column = ir.RankedTensorType.get([*aval_out.shape[:-1], 1], dtype)
        result = hlo.concatenate([hlo.reshape(column, x) for x in sums], _axis(spec.batch_rank))
    else:
        result = functools.reduce(hlo.add, sums)
    return [lower_with_sharding_in_types(ctx, result, aval_out)]
