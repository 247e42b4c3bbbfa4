"""The squared norm as StableHLO: leaf by leaf, and in sums of leaves of one type.

CPUs have no kernel of their own for it: XLA reads 268 MB of gradients at 30 to 33 GB/s on two
cores where a loop written for it read them at 36 to 37, one millisecond sooner.
"""

from collections.abc import Sequence
import functools

from jax.extend.mlir import ir, lower_with_sharding_in_types
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from ._jax_private import devices_hold_whole_operands
from .contract import NormSpec, cut_evenly

MAX_ADDED_SUMMANDS = 16
"""More make no difference to XLA:TPU's estimate, and keep more gradients alive."""


def lower_by_leaf(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, *leaves: ir.Value, spec: NormSpec
) -> list[ir.Value]:
    """One reduction per leaf: right under any sharding of the leaves."""
    (aval_out,) = ctx.avals_out
    sums = [
        reduce(square(x, scale, spec.batch_rank), spec.batch_rank, aval_out.shape) for x in leaves
    ]
    return finish(ctx, sums, spec)


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
        alike.setdefault(x.type, []).append(square(x, scale, spec.batch_rank))
    runs = (run for group in alike.values() for run in cut_evenly(group, MAX_ADDED_SUMMANDS))
    sums = [reduce(functools.reduce(hlo.add, run), spec.batch_rank, aval_out.shape) for run in runs]
    return finish(ctx, sums, spec)


def square(x: ir.Value, scale: ir.Value, batch_rank: int) -> ir.Value:
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


def reduce(x: ir.Value, batch_rank: int, shape_out: Sequence[int]) -> ir.Value:
    """Sums all dimensions behind the batch, and spreads the result over the whole batch."""
    kind = ir.RankedTensorType(x.type)
    own = sum_over(x, range(batch_rank, len(kind.shape)))
    whole = ir.RankedTensorType.get(shape_out[:batch_rank], kind.element_type)
    return hlo.broadcast_in_dim(whole, own, mlir.dense_int_array(list(range(batch_rank))))


def sum_over(x: ir.Value, dims: Sequence[int]) -> ir.Value:
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


def axis(index: int) -> ir.IntegerAttr:
    """A dimension's number, as an attribute."""
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), index)


def finish(ctx: mlir.LoweringRuleContext, sums: list[ir.Value], spec: NormSpec) -> list[ir.Value]:
    """The one result: the sum of ``sums``, or all of them in an array."""
    (aval_out,) = ctx.avals_out
    if spec.per_leaf:
        dtype = mlir.dtype_to_ir_type(aval_out.dtype)
        column = ir.RankedTensorType.get([*aval_out.shape[:-1], 1], dtype)
        result = hlo.concatenate([hlo.reshape(column, x) for x in sums], axis(spec.batch_rank))
    else:
        result = functools.reduce(hlo.add, sums)
    return [lower_with_sharding_in_types(ctx, result, aval_out)]
