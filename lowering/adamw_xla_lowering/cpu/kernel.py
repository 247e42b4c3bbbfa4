"""The update on CPUs: a few calls of a compiled kernel, each for a bucket of leaves.

XLA:CPU fuses no loops with several results, so StableHLO costs three passes per leaf
where the kernel makes one. What the kernel cannot run goes to StableHLO instead.
"""

from collections.abc import Iterator, Mapping, Sequence
import math
from typing import Any

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir
import numpy as np

from .. import stablehlo
from .._jax_private import devices_hold_whole_operands, is_exporting
from ..contract import (
    CPU_TARGET_NAME,
    UPDATE_NAME,
    UpdateSpec,
    is_one_leaf,
    join_results,
    split_operands,
    split_results,
)
from ..donation import Donation
from ..errors import logger, unavailable, unfit, unfused
from ..rules import partitioned
from ..sums import joined
from . import library

MAX_BUCKET_LEAVES = 16
"""XLA's compile time grows faster than the operands of one custom call."""

MAX_BUCKET_BYTES = 16 << 20
"""A bucket's gradients all live until its call; 16 MB take milliseconds to update."""

MIN_BUCKET_BYTES = 1 << 20
"""Smaller buckets cost more calls than they save memory."""

MIN_BUCKETS = 32
"""So a bucket adds at most a 32nd of the gradients to the peak, but for its last leaf."""

MIN_ROW_SIZE, MAX_SHORT_ROWS = 128, 1024
"""Members of a batch that have their own numbers are rows to the kernel, and each costs it as
much as some hundred elements: many short ones are faster as XLA's loops."""

MIN_WITNESSED_BYTES = 1 << 16
"""Smaller operands may be copied: that costs less than knowing that they need not be."""

MAX_WHOLE_WITNESS_SIZE = 1 << 14
"""What a call waits for lives until then: so many elements of it for each operand, at most."""


def lower(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: UpdateSpec
) -> Sequence[ir.Value]:
    """Lowers the whole tree to the kernel, or to StableHLO where it cannot run."""
    reason = 'implementation="xla"' if spec.implementation == "xla" else _refusal(ctx, spec)
    whole = devices_hold_whole_operands(ctx)
    if reason is None and not whole:
        # StableHLO partitions by itself; the kernel does where it is asked for by name.
        asked = spec.implementation == "native"
        reason = partitioned.refusal(ctx, spec) if asked else "the program is partitioned"
    if reason is None:
        return (_lower_native if whole else partitioned.lower)(ctx, *operands, spec=spec)
    if spec.implementation == "native":
        raise unavailable(reason)
    logger.debug("%s: %d leaves in StableHLO: %s", UPDATE_NAME, spec.num_leaves, reason)
    return stablehlo.lower(ctx, *operands, spec=spec)


def _refusal(ctx: mlir.LoweringRuleContext, spec: UpdateSpec) -> str | None:
    """Why the kernel cannot run this equation, however it is partitioned; None if it can."""
    # Asked for by name, jax.export itself decides whether it lets a custom call pass.
    if spec.implementation is None and is_exporting(ctx):
        return "an exported program must run where this kernel is not"
    return unfit(ctx, "cpu") or unfused(spec) or library.unavailable_reason()


def _lower_native(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: UpdateSpec
) -> Sequence[ir.Value]:
    values, avals = split_operands(spec, operands), split_operands(spec, ctx.avals_in)
    n = spec.num_leaves
    outs, _ = split_results(spec, ctx.avals_out)
    short = [i for i in range(n) if _has_short_rows(ctx, spec, avals.leaves[i], outs[i])]
    lowered, short_sums = stablehlo.lower_leaves(ctx, operands, spec, short) if short else ([], [])
    results: dict[int, Sequence[ir.Value]] = dict(zip(short, lowered, strict=True))
    sums = joined.Parts(ctx, spec)
    if spec.sums and short:
        sums.add_by_leaf(short, short_sums)
    calls, donation = 0, Donation(ctx)
    for bucket in _buckets({i: row for i, row in enumerate(avals.leaves) if i not in results}):
        own = spec.of_leaves(bucket)
        args, avals_in = values.of_leaves(bucket), avals.of_leaves(bucket)
        own_sums = sums.aval(len(bucket), np.float64) if spec.sums else None
        avals_out = join_results([outs[i] for i in bucket], own_sums)
        written = donation.in_place(own, args, avals_in, avals_out)
        large = [args[i] for i in written if _bytes(avals_in[i]) >= MIN_WITNESSED_BYTES]
        earlier = _earlier_reads(large)
        call = jax.ffi.ffi_lowering(
            CPU_TARGET_NAME,
            operand_output_aliases=written,
        )
        flat = call(
            ctx.replace(avals_in=[*avals_in, *map(_aval_like, earlier)], avals_out=avals_out),
            *args,
            *earlier,
            leaves=np.array(bucket, np.int64),
            groups=np.array(own.groups, np.int64),
            batch_rank=np.int64(spec.batch_rank),
            **library.attributes(spec),
        )
        own_rows, summed = split_results(own, stablehlo.with_shardings(ctx, flat, avals_out))
        results.update(zip(bucket, own_rows, strict=True))
        if spec.sums:
            sums.add(bucket, summed)
        calls += 1
    message = "%s: %d leaves in %d calls of the CPU kernel, %d in StableHLO"
    logger.debug(message, UPDATE_NAME, n - len(short), calls, len(short))
    rows = [results[i] for i in range(n)]
    return join_results(rows, sums.result() if spec.sums else None)


def _has_short_rows(
    ctx: mlir.LoweringRuleContext, spec: UpdateSpec, row: Sequence[Any], out: Sequence[Any]
) -> bool:
    """Whether the leaf is left to XLA, where the choice is ours."""
    r, scalars = spec.batch_rank, ctx.avals_in[: spec.num_scalars]
    merges = is_one_leaf(spec, scalars, row, out) and not spec.sums
    if spec.implementation == "native" or merges:
        return False
    shape = out[0].shape
    return math.prod(shape[r:]) < MIN_ROW_SIZE and math.prod(shape[:r]) > MAX_SHORT_ROWS


def _buckets(leaves: Mapping[int, Sequence[Any]]) -> Iterator[list[int]]:
    """Neighbours in the tree, bounded in number and in bytes of gradients."""
    bucket: list[int] = []
    filled = 0
    sizes = {leaf: _bytes(grads) for leaf, (_, grads, *_) in leaves.items()}
    bound = min(max(sum(sizes.values()) // MIN_BUCKETS, MIN_BUCKET_BYTES), MAX_BUCKET_BYTES)
    for leaf, size in sizes.items():
        if bucket and (len(bucket) == MAX_BUCKET_LEAVES or filled + size > bound):
            yield bucket
            bucket, filled = [], 0
        bucket.append(leaf)
        filled += size
    if bucket:
        yield bucket


_VIEWS = frozenset(
    f"stablehlo.{name}" for name in ("broadcast_in_dim", "convert", "reshape", "transpose")
)


def _earlier_reads(overwritten: Sequence[ir.Value]) -> list[ir.Value]:
    """A little out of each computation that last read one of these values.

    XLA copies what a call overwrites, unless every other reader is known to come
    before the call. Backpropagation through a layer reads the layer's params, but their
    gradients do not depend on it; so the call asks for its result too, or an element of it.
    """
    block = ir.InsertionPoint.current.block
    readers: dict[ir.Operation, ir.Value] = {}
    for value in overwritten:
        while (use := next(iter(value.uses), None)) is not None:  # the last one comes first
            reader = use.owner.operation
            if reader.block != block or not reader.results:
                break
            value = reader.results[0]
            if reader.name not in _VIEWS:
                readers[reader] = value
                break
    return [x for value in readers.values() if (x := _witness(value)) is not None]


def _witness(value: ir.Value) -> ir.Value | None:
    """The first element of a tensor, or a small product as it is; None if there is none."""
    if not isinstance(value.type, ir.RankedTensorType):
        return None
    kind = ir.RankedTensorType(value.type)
    if not kind.has_static_shape or 0 in kind.shape:
        return None
    # A slice is one more kernel to compile and to start, and a product is in memory anyway.
    is_product = value.owner.name == "stablehlo.dot_general"
    if is_product and math.prod(kind.shape) <= MAX_WHOLE_WITNESS_SIZE:
        return value
    low, high = ([n] * kind.rank for n in (0, 1))
    first = hlo.slice(value, *(mlir.dense_int_array(x) for x in (low, high, high)))
    return hlo.reshape(ir.RankedTensorType.get([], kind.element_type), first)


def _aval_like(value: ir.Value) -> jax.core.ShapedArray:
    """Has the value's shape; stands for an operand that is not read, whatever its dtype."""
    return jax.core.ShapedArray(tuple(ir.RankedTensorType(value.type).shape), np.float32)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * int(aval.dtype.itemsize)
