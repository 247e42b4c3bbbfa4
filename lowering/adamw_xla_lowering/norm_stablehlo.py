"""The squared norm as StableHLO: leaf by leaf, and in sums of leaves of one type.

CPUs have no kernel of their own for it: XLA reads 268 MB of gradients at 30 to 33 GB/s on two
cores where a loop written for it read them at 36 to 37, one millisecond sooner.
"""

from collections.abc import Sequence
import functools

from jax.extend.mlir import ir, lower_with_sharding_in_types
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir
import numpy as np

from ._jax_private import devices_hold_whole_operands
from .contract import NormSpec, cut_evenly, small_unit

MAX_ADDED_SUMMANDS = 16
"""More make no difference to XLA:TPU's estimate, and keep more gradients alive."""


def lower_by_leaf(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, *leaves: ir.Value, spec: NormSpec
) -> list[ir.Value]:
    """Two reductions per leaf: right under any sharding of the leaves."""
    plain, small = (_by_leaf(ctx, scale, leaves, spec, unit) for unit in units(scale))
    return finish(ctx, plain, small, spec)


def lower_in_turn(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, *leaves: ir.Value, spec: NormSpec
) -> list[ir.Value]:
    """The leaves are read again where the first sum overflows, and only there; for CPUs.

    A branch costs nothing there. Two sums in one loop are not vectorized: on two cores, 96 ms for
    268 MB in place of 14 (float64 as much, and a reduction of both at once 156).
    """
    if not devices_hold_whole_operands(ctx):
        return lower_by_leaf(ctx, scale, *leaves, spec=spec)
    plain, small = units(scale)
    unscaled = splat(scale.type, 1.0)

    def total(unit: ir.Value | None) -> ir.Value:
        sums = join(_by_leaf(ctx, unscaled, leaves, spec, unit), spec)
        return scaled(sums, scale, spec.batch_rank)

    first = total(plain)
    _, number = numbers(scale)
    fits = hlo.is_finite(first)
    bad = hlo.not_(fits)
    # By a number: of a branch by a bool XLA would make both, reductions being cheap to it.
    i32 = ir.IntegerType.get_signless(32)
    index = hlo.convert(ir.RankedTensorType.get([], i32), _any(bad))
    branch = hlo.CaseOp([first.type] * 2, index, 2)
    for region, again in zip(branch.branches, (False, True), strict=True):
        with ir.InsertionPoint(region.blocks.append()):
            ones = splat(first.type, 1.0)
            found = [first, ones]
            if again:
                second = total(small)
                smaller = splat(first.type, number)
                found = [hlo.select(fits, first, second), hlo.select(fits, ones, smaller)]
            hlo.return_(found)
    return with_types(ctx, branch.results)


def lower_added(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, *leaves: ir.Value, spec: NormSpec
) -> list[ir.Value]:
    """Squares of leaves of one type are added before one reduction; for TPUs.

    Nothing is reshaped, which would move data there. For GPT-2 small on v5e, 163 fusions
    instead of 296 with the update, a third less of temporaries and 9 % fewer of the
    compiler's estimated cycles. Both sums are made by one kernel, and cost no cycles.
    """
    if spec.per_leaf or not devices_hold_whole_operands(ctx):
        return lower_by_leaf(ctx, scale, *leaves, spec=spec)
    aval_out, _ = ctx.avals_out
    r = spec.batch_rank
    alike: dict[ir.Type, list[ir.Value]] = {}
    for x in leaves:
        alike.setdefault(x.type, []).append(x)
    runs = [run for group in alike.values() for run in cut_evenly(group, MAX_ADDED_SUMMANDS)]
    plain, small = (
        [
            reduce(
                functools.reduce(hlo.add, [square(x, scale, r, unit) for x in run]),
                r,
                aval_out.shape,
            )
            for run in runs
        ]
        for unit in units(scale)
    )
    return finish(ctx, plain, small, spec)


def numbers(scale: ir.Value) -> tuple[float, float]:
    """The units of the two sums, in the dtype of ``scale``."""
    wide = ir.RankedTensorType(scale.type).element_type == ir.F64Type.get()
    return 1.0, small_unit(np.float64 if wide else np.float32)


def units(scale: ir.Value) -> tuple[None, ir.Value]:
    """What the two sums' numbers are multiplied by before they are squared; None: nothing.

    XLA would take the constants out of the square and multiply them first: the square of the
    small unit is 0. So it must not know the number.
    """
    kind = ir.RankedTensorType.get([], ir.RankedTensorType(scale.type).element_type)
    small = splat(kind, numbers(scale)[1])
    return None, hlo.OptimizationBarrierOp([small]).results[0]


def _by_leaf(
    ctx: mlir.LoweringRuleContext,
    scale: ir.Value,
    leaves: Sequence[ir.Value],
    spec: NormSpec,
    unit: ir.Value | None,
) -> list[ir.Value]:
    r, shape = spec.batch_rank, ctx.avals_out[0].shape
    return [reduce(square(x, scale, r, unit), r, shape) for x in leaves]


def square(x: ir.Value, scale: ir.Value, batch_rank: int, unit: ir.Value | None) -> ir.Value:
    """``(unit * scale * x)**2`` in the dtype of ``scale``, with the batch of both."""
    dtype = ir.RankedTensorType(scale.type).element_type
    shape = ir.RankedTensorType(x.type).shape
    batch = ir.RankedTensorType(scale.type).shape
    joined = [max(a, b) if 0 not in (a, b) else 0 for a, b in zip(batch, shape, strict=False)]
    kind = ir.RankedTensorType.get([*joined, *shape[batch_rank:]], dtype)
    x = hlo.convert(ir.RankedTensorType.get(shape, dtype), x)
    x = hlo.broadcast_in_dim(kind, x, mlir.dense_int_array(list(range(len(shape)))))
    scale = hlo.broadcast_in_dim(kind, scale, mlir.dense_int_array(list(range(batch_rank))))
    x = hlo.multiply(x, scale)
    if unit is not None:
        x = hlo.multiply(x, hlo.broadcast_in_dim(kind, unit, mlir.dense_int_array([])))
    return hlo.multiply(x, x)


def scaled(sums: ir.Value, scale: ir.Value, batch_rank: int) -> ir.Value:
    """Sums of squares as they were if each element had been multiplied by ``scale``."""
    dims = mlir.dense_int_array(list(range(batch_rank)))
    factor = hlo.broadcast_in_dim(sums.type, scale, dims)
    # In two steps: the square of a small scale may be no number.
    return hlo.multiply(hlo.multiply(sums, factor), factor)


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
    kept = [size for d, size in enumerate(kind.shape) if d not in dims]
    own = ir.RankedTensorType.get(kept, dtype)
    op = hlo.ReduceOp([own], [x], [_zero(dtype)], mlir.dense_int_array(list(dims)))
    with ir.InsertionPoint(op.body.blocks.append(scalar, scalar)) as point:
        hlo.return_([hlo.add(*point.block.arguments)])
    return op.results[0]


def _zero(dtype: ir.Type) -> ir.Value:
    if isinstance(dtype, ir.ComplexType):
        part = splat(ir.RankedTensorType.get([], dtype.element_type), 0.0)
        return hlo.complex(part, part)
    return splat(ir.RankedTensorType.get([], dtype), 0.0)


def _any(flags: ir.Value) -> ir.Value:
    """Whether one of them is set: a scalar."""
    kind = ir.RankedTensorType(flags.type)
    scalar = ir.RankedTensorType.get([], kind.element_type)
    zero = hlo.constant(ir.DenseElementsAttr.get_splat(scalar, ir.BoolAttr.get(False)))
    dims = mlir.dense_int_array(list(range(len(kind.shape))))
    op = hlo.ReduceOp([scalar], [flags], [zero], dims)
    with ir.InsertionPoint(op.body.blocks.append(scalar, scalar)) as point:
        hlo.return_([hlo.or_(*point.block.arguments)])
    return op.results[0]


def splat(kind: ir.Type, number: float) -> ir.Value:
    """One number everywhere in a tensor of this type."""
    attribute = ir.FloatAttr.get(ir.RankedTensorType(kind).element_type, number)
    return hlo.constant(ir.DenseElementsAttr.get_splat(kind, attribute))


def converted(x: ir.Value, dtype: ir.Type) -> ir.Value:
    """``x`` in another dtype; itself if it has that."""
    kind = ir.RankedTensorType(x.type)
    if kind.element_type == dtype:
        return x
    return hlo.convert(ir.RankedTensorType.get(kind.shape, dtype), x)


def axis(index: int) -> ir.IntegerAttr:
    """A dimension's number, as an attribute."""
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), index)


def join(sums: Sequence[ir.Value], spec: NormSpec) -> ir.Value:
    """The sum of ``sums``, or all of them in an array."""
    if not spec.per_leaf:
        return functools.reduce(hlo.add, sums)
    kind = ir.RankedTensorType(sums[0].type)
    column = ir.RankedTensorType.get([*kind.shape, 1], kind.element_type)
    return hlo.concatenate([hlo.reshape(column, x) for x in sums], axis(spec.batch_rank))


def finish(
    ctx: mlir.LoweringRuleContext,
    plain: Sequence[ir.Value],
    small: Sequence[ir.Value],
    spec: NormSpec,
) -> list[ir.Value]:
    """The results, from sums in both units."""
    first, second = join(plain, spec), join(small, spec)
    fits = hlo.is_finite(first)
    one, unit = (splat(first.type, x) for x in numbers(first))
    return with_types(ctx, [hlo.select(fits, first, second), hlo.select(fits, one, unit)])


def with_types(ctx: mlir.LoweringRuleContext, results: Sequence[ir.Value]) -> list[ir.Value]:
    """In explicit mode, the results' shardings are part of their types."""
    pairs = zip(results, ctx.avals_out, strict=True)
    return [lower_with_sharding_in_types(ctx, x, aval) for x, aval in pairs]
