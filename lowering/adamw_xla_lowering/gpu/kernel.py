"""The update on NVIDIA GPUs as one kernel, whatever the tree; asked for with "native".

An H100 has run it, and it held to float64 there (words of 16 bits have only been compiled and
interpreted); nothing has shown it to be faster: ``implementation=None`` stays with ``merge.py``.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from .. import stablehlo
from .._jax_private import devices_hold_whole_operands
from ..contract import (
    UPDATE_NAME,
    UpdateSpec,
    cut_evenly,
    is_one_leaf,
    join_leaves,
    join_results,
    split_leaves,
    split_operands,
    split_results,
)
from ..donation import Donation
from ..errors import logger, unavailable, unfit, unfused
from ..norm_stablehlo import sum_over
from ..rules import partitioned
from ..sums import joined
from . import call, merge
from .pieces import Kind, Launch, Leaf
from .rows import halved
from .triton.builder import update_kernel
from .triton.sums import even_ranges, ranges, sums_kernel

LAUNCHES = {
    80: Launch(block=1024, num_warps=4),
    90: Launch(block=1024, num_warps=4),
    100: Launch(block=1024, num_warps=4),
}
"""By compute capability and later ones: 8 elements per thread. On an H100, of 256 M elements in one
leaf, blocks of 512 to 4096 with 2 to 8 warps took 1.00 to 1.02 times as long, but 4096 with 2
warps 1.23. Of small leaves, and on other devices, it has not been measured."""

PLATFORM = "cuda"
"""Whose programs may hold the kernel; tests interpret it in those of another."""

MAX_POINTERS = 4000
"""A kernel may have 32,764 bytes of parameters (compute capability 7.0, CUDA 12.1)."""


def lower(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: UpdateSpec
) -> Sequence[ir.Value]:
    """Lowers the whole tree to the kernel where it is asked for, or else to StableHLO."""
    if spec.implementation != "native":
        return merge.lower(ctx, *operands, spec=spec)
    whole = devices_hold_whole_operands(ctx)
    reason = _unfit(ctx) or (None if whole else partitioned.refusal(ctx, spec)) or unfused(spec)
    if reason is not None:
        raise unavailable(reason)
    if not whole:
        return partitioned.lower(ctx, *operands, spec=spec)
    return _lower_native(ctx, operands, spec)


def can_run(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether a kernel can stand in this program, and read operands as they are."""
    return _unfit(ctx) is None and devices_hold_whole_operands(ctx)


def _unfit(ctx: mlir.LoweringRuleContext) -> str | None:
    """Why no kernel can run this equation, however it is partitioned; None if one can."""
    return unfit(ctx, PLATFORM) or call.unavailable_reason()


def launch_shape() -> Launch:
    """The launch's shape on this machine's devices."""
    known = [c for c in LAUNCHES if c <= call.compute_capability()]
    return LAUNCHES[max(known, default=min(LAUNCHES))]


def _lower_native(
    ctx: mlir.LoweringRuleContext, operands: Sequence[ir.Value], spec: UpdateSpec
) -> Sequence[ir.Value]:
    outs, _ = split_results(spec, ctx.avals_out)
    empty = [i for i, row in enumerate(outs) if 0 in row[0].shape]
    full = [i for i in range(spec.num_leaves) if i not in set(empty)]
    lowered, no_sums = stablehlo.lower_leaves(ctx, operands, spec, empty) if empty else ([], [])
    results: dict[int, Sequence[ir.Value]] = dict(zip(empty, lowered, strict=True))
    streams = len(spec.operand_kinds) + len(spec.result_kinds)
    most = (MAX_POINTERS - spec.num_scalars) // streams
    calls, donation, sums = 0, Donation(ctx), joined.Parts(ctx, spec)
    if spec.sums and empty:
        sums.add_by_leaf(empty, no_sums)
    for part in cut_evenly(full, most) if full else ():
        own, own_sums = _call(ctx, operands, spec, part, donation)
        results.update(zip(part, own, strict=True))
        if own_sums is not None:
            sums.add(part, own_sums)
        calls += 1
    logger.debug("%s: %d leaves in %d GPU kernels", UPDATE_NAME, len(full), calls)
    rows = [results[i] for i in range(spec.num_leaves)]
    return join_results(rows, sums.result() if spec.sums else None)


def _call(
    ctx: mlir.LoweringRuleContext,
    operands: Sequence[ir.Value],
    spec: UpdateSpec,
    part: Sequence[int],
    donation: Donation,
) -> tuple[list[tuple[ir.Value, ...]], ir.Value | None]:
    """One kernel for some of the leaves, and one for the sums of them."""
    values, avals = split_operands(spec, operands), split_operands(spec, ctx.avals_in)
    outs, _ = split_results(spec, ctx.avals_out)
    scalars = ctx.avals_in[: spec.num_scalars]
    leaves = [_leaf(spec, i, scalars, avals.leaves[i], outs[i]) for i in part]
    shapes = [(aval.shape, aval.dtype) for aval in scalars]
    kernel = update_kernel(spec, leaves, shapes, launch_shape())
    args, avals_in = values.of_leaves(part), avals.of_leaves(part)
    own = spec.of_leaves(part)
    shape = (len(spec.sum_kinds), kernel.programs)
    partial = jax.core.ShapedArray(shape, scalars[0].dtype) if spec.sums else None
    avals_out = join_results([outs[i] for i in part], partial)
    written = donation.in_place(own, args, avals_in, avals_out)
    flat = call.call(ctx, kernel, args, avals_in, avals_out, written)
    rows, parts = split_results(own, flat)
    kept = stablehlo.with_shardings(ctx, join_leaves(rows), join_leaves([outs[i] for i in part]))
    sums = None if parts is None else _added(ctx, spec, leaves, parts, partial)
    return split_leaves(kept, len(part)), sums


def _added(
    ctx: mlir.LoweringRuleContext,
    spec: UpdateSpec,
    leaves: Sequence[Leaf],
    parts: ir.Value,
    aval: Any,
) -> ir.Value:
    """The sums of these leaves, from what each program has of them."""
    r, launch = spec.batch_rank, launch_shape()
    batch = ctx.avals_out[-1].shape[:r]
    kinds, programs = aval.shape
    is_whole = spec.sums == "tree" and r == 0
    table = even_ranges(programs) if is_whole else ranges(leaves, batch, launch.block)
    kernel = sums_kernel(aval.dtype, kinds, programs, table.size // table.shape[-1], launch)
    aval_out = jax.core.ShapedArray((*table.shape[:-1], kinds), aval.dtype)
    aval_table = jax.core.ShapedArray(table.shape, table.dtype)
    operands = [hlo.constant(ir.DenseElementsAttr.get(table)), parts]
    (sums,) = call.call(ctx, kernel, operands, [aval_table, aval], [aval_out], {})
    if is_whole:
        return halved(sums)
    return sum_over(sums, [r]) if spec.sums == "tree" else sums


def _leaf(
    spec: UpdateSpec, index: int, scalars: Sequence[Any], row: Sequence[Any], out: Sequence[Any]
) -> Leaf:
    """Leaf ``index`` as the kernel sees it; a batch that all operands share becomes part of it."""
    rank = spec.batch_rank
    batch = out[0].shape[:rank]
    size = math.prod(out[0].shape[rank:])
    dtypes = tuple(x.dtype for x in row), tuple(x.dtype for x in out)
    own = tuple(x.shape[:rank] for x in row)
    if is_one_leaf(spec, scalars, row, out) and not (spec.sums and rank):
        kind = Kind(*dtypes)
        size *= math.prod(batch)
    else:
        kind = Kind(*dtypes, batch, own)
    return Leaf(kind, size, spec.groups[index], index)
