"""The squared norm on GPUs: StableHLO that XLA merges, or one kernel where that is asked for.

The two sums are the parts of complex numbers: as two arrays XLA:GPU keeps one of them in
memory between leaves and reduction (GPT-2 small: 9 MB), as one number neither. Of a factor on
each element it reckons that it is read anew for every one, and would do the same: so what is
summed takes the scale afterwards.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from .._jax_private import devices_hold_whole_operands
from ..contract import NormSpec, cut_evenly, default_implementation
from ..norm_stablehlo import (
    axis,
    finish,
    lower_by_leaf,
    reduce,
    scaled,
    splat,
    square,
    sum_over,
    units,
)
from ..stablehlo import slice_at
from .norm_kernel import partial_sums, split_parts, squeezed
from .rows import MIN_ROW, flat_shape, reshape, row_length, thinned

MAX_MERGED_SUMMANDS = 80
"""Fewer than ``gpu.MAX_FUSION_OPERANDS``, with room for what else a fusion reads and makes."""

MAX_UNSUMMED = 1000
"""So many squares are as well left to the last reduction: that saves kernels for 4 kB each."""

MIN_FOLDED_ROWS = 1024
"""Up to eight rows that are far apart are added by one kernel too, if so many sums are left."""


def lower(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, *leaves: ir.Value, spec: NormSpec
) -> list[ir.Value]:
    """One kernel and a reduction of what it makes, where that is asked for."""
    implementation = spec.implementation or default_implementation()
    if implementation == "native" and not spec.per_leaf and spec.batch_rank == 0:
        sums = partial_sums(ctx, scale, leaves)
        if sums is not None:
            return _finish(ctx, [reduce(split_parts(sums), 0, ())], spec)
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
    aval_out, _ = ctx.avals_out
    r = spec.batch_rank
    unscaled = splat(scale.type, 1.0)
    squares = functools.partial(_squares, scale=unscaled, batch_rank=r, units=units(scale))
    alike: dict[tuple[ir.Type, ...], list[int]] = {}
    flat = [reshape(x, flat_shape(x, r)) for x in leaves]
    for i, x in enumerate(flat):
        alike.setdefault((x.type,), []).append(i)
    if spec.per_leaf:
        sums = _sums_by_leaf(squares, flat, alike.values(), spec, aval_out)
        return _finish(ctx, [_scaled(x, scale, r) for x in sums], spec)
    partial = []
    for group in alike.values():
        for run in cut_evenly(group, MAX_MERGED_SUMMANDS):
            total = functools.reduce(hlo.add, [squares(flat[i]) for i in run])
            partial.append(_partly_summed(total, r))
    if r == 0:
        # One reduction of all partial sums, in place of a second stage for each group; the
        # barrier keeps the compiler from merging the stages and splitting them its own way.
        whole = hlo.concatenate([squeezed(thinned(x)) for x in partial], axis(0))
        partial = [split_parts(hlo.OptimizationBarrierOp([whole]).results[0])]
    sums = [reduce(x, r, aval_out.shape) for x in partial]
    return _finish(ctx, [_scaled(x, scale, r) for x in sums], spec)


def _squares(
    x: ir.Value, scale: ir.Value, batch_rank: int, units: Sequence[ir.Value | None]
) -> ir.Value:
    """The squares in both units, as the parts of complex numbers."""
    return hlo.complex(*(square(x, scale, batch_rank, unit) for unit in units))


def _scaled(sums: ir.Value, scale: ir.Value, batch_rank: int) -> ir.Value:
    """As ``norm_stablehlo.scaled``, of both sums."""
    return hlo.complex(*(scaled(x, scale, batch_rank) for x in (hlo.real(sums), hlo.imag(sums))))


def _finish(
    ctx: mlir.LoweringRuleContext, sums: Sequence[ir.Value], spec: NormSpec
) -> list[ir.Value]:
    return finish(ctx, [hlo.real(x) for x in sums], [hlo.imag(x) for x in sums], spec)


def _sums_by_leaf(
    squares: Callable[[ir.Value], ir.Value],
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
            x = squares(flat[i])
            shape = ir.RankedTensorType(x.type).shape
            rows.append(reshape(x, [*shape[:r], 1, shape[r]]))
        table = _partly_summed(hlo.concatenate(rows, axis(r)), r + 1)
        if ir.RankedTensorType(table.type).shape[r + 1] > 1:
            table = hlo.OptimizationBarrierOp([table]).results[0]
        row = reduce(table, r + 1, (*batch, len(run)))
        sums.update((i, reshape(slice_at(row, k), batch)) for k, i in enumerate(run))
    return [sums[i] for i in range(len(flat))]


def _partly_summed(x: ir.Value, batch_rank: int) -> ir.Value:
    """[*batch, n] -> [*batch, k] with the same sum and a smaller k, by one kernel."""
    kind = ir.RankedTensorType(x.type)
    *batch, n = kind.shape
    row = row_length(n)
    if n <= MAX_UNSUMMED or row < MIN_ROW:
        return x
    rows = n // row
    fold = next((k for k in range(8, 1, -1) if rows % k == 0 and rows // k >= MIN_FOLDED_ROWS), 1)
    folded = ir.RankedTensorType.get([*batch, fold, rows // fold, row], kind.element_type)
    dims = (batch_rank, batch_rank + 2)
    return sum_over(hlo.reshape(folded, x), dims)
