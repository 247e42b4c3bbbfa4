"""The update on CPUs: a few calls of a compiled kernel, each for a bucket of leaves.

XLA:CPU fuses no loops with several results, so StableHLO costs three passes per leaf
where the kernel makes one. What the kernel cannot run goes to StableHLO instead.
"""

from collections.abc import Iterator, Sequence
import math
from typing import Any

import jax
from jax.extend.mlir import ir, lower_with_sharding_in_types
from jax.interpreters import mlir
import numpy as np

from . import native, stablehlo
from ._jax_private import devices_hold_whole_operands, is_exporting
from .contract import UPDATE_NAME, UpdateSpec, join_leaves, split_operands
from .errors import NativeUnavailableError

MAX_BUCKET_LEAVES = 32
"""XLA's compile time grows faster than the operands of one custom call."""

MAX_BUCKET_BYTES = 16 << 20
"""A bucket's gradients all live until its call; 16 MB take milliseconds to update."""


def lower(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: UpdateSpec
) -> Sequence[ir.Value]:
    """Lowers the whole tree to the kernel, or to StableHLO where it cannot run."""
    reason = 'implementation="xla"' if spec.implementation == "xla" else _refusal(ctx, spec)
    if reason is None:
        return _lower_native(ctx, operands, spec)
    if spec.implementation == "native":
        raise NativeUnavailableError(
            f'{UPDATE_NAME}: implementation="native" cannot run here: {reason}; '
            'use implementation=None (choose for me) or "xla" (StableHLO).'
        )
    native.logger.debug("%s: %d leaves in StableHLO: %s", UPDATE_NAME, spec.num_leaves, reason)
    return stablehlo.lower(ctx, *operands, spec=spec)


def _refusal(ctx: mlir.LoweringRuleContext, spec: UpdateSpec) -> str | None:
    """Why the kernel cannot run this equation; None if it can."""
    # Asked for by name, jax.export itself decides whether it lets a custom call pass.
    if spec.implementation is None and is_exporting(ctx):
        return "an exported program must run where this kernel is not"
    if tuple(ctx.module_context.platforms) != ("cpu",):
        return "the program is lowered for several platforms at once"
    if not devices_hold_whole_operands(ctx):
        return "the program is partitioned over several devices (outside of shard_map)"
    if not all(isinstance(size, int) for aval in ctx.avals_in for size in aval.shape):
        return "shapes are symbolic"
    return native.unavailable_reason()


def _lower_native(
    ctx: mlir.LoweringRuleContext, operands: Sequence[ir.Value], spec: UpdateSpec
) -> Sequence[ir.Value]:
    values, avals = split_operands(spec, operands), split_operands(spec, ctx.avals_in)
    n = spec.num_leaves
    outs = [ctx.avals_out[leaf::n] for leaf in range(n)]
    results: list[Sequence[ir.Value]] = []
    calls = 0
    for bucket in _buckets(avals.leaves):
        avals_in = [
            *ctx.avals_in[: spec.num_scalars],
            *join_leaves([avals.leaves[i] for i in bucket]),
        ]
        avals_out = join_leaves([outs[i] for i in bucket])
        call = jax.ffi.ffi_lowering(
            native.TARGET_NAME,
            operand_output_aliases=_aliases(spec, len(bucket), avals_in, avals_out),
        )
        flat = call(
            ctx.replace(avals_in=avals_in, avals_out=avals_out),
            *operands[: spec.num_scalars],
            *join_leaves([values.leaves[i] for i in bucket]),
            leaves=np.array(bucket, np.int64),
            groups=np.array([spec.groups[i] for i in bucket], np.int64),
            batch_rank=np.int64(spec.batch_rank),
            **spec.options(),
        )
        flat = [
            lower_with_sharding_in_types(ctx, x, aval)
            for x, aval in zip(flat, avals_out, strict=True)
        ]
        results.extend(zip(*_columns(flat, len(bucket)), strict=True))
        calls += 1
    native.logger.debug("%s: %d leaves in %d calls of the CPU kernel", UPDATE_NAME, n, calls)
    return join_leaves(results)


def _buckets(leaves: Sequence[Sequence[Any]]) -> Iterator[list[int]]:
    """Neighbours in the tree, bounded in number and in bytes of gradients."""
    bucket: list[int] = []
    filled = 0
    for leaf, (_, grads, *_) in enumerate(leaves):
        size = math.prod(grads.shape) * grads.dtype.itemsize
        if bucket and (len(bucket) == MAX_BUCKET_LEAVES or filled + size > MAX_BUCKET_BYTES):
            yield bucket
            bucket, filled = [], 0
        bucket.append(leaf)
        filled += size
    if bucket:
        yield bucket


def _aliases(
    spec: UpdateSpec, leaves: int, avals_in: Sequence[Any], avals_out: Sequence[Any]
) -> dict[int, int]:
    """Operand -> result that takes its place: all, but what the batch broadcasts."""
    kinds = [spec.operand_kinds.index(kind) for kind in spec.result_kinds]
    pairs = {
        spec.num_scalars + kind * leaves + leaf: r * leaves + leaf
        for r, kind in enumerate(kinds)
        for leaf in range(leaves)
    }
    return {i: o for i, o in pairs.items() if avals_in[i].shape == avals_out[o].shape}


def _columns(flat: Sequence[Any], n: int) -> list[Sequence[Any]]:
    return [flat[i : i + n] for i in range(0, len(flat), n)]
