"""The sums beside the update as StableHLO: reductions that XLA fuses with it where it can."""

from collections.abc import Callable, Sequence
import functools

from jax.extend.mlir import ir, lower_with_sharding_in_types
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from ..contract import UpdateSpec
from ..norm_stablehlo import axis, converted, splat, sum_over, units


def squares(
    spec: UpdateSpec, values: dict[str, ir.Value], spread: Callable[[ir.Value], ir.Value]
) -> list[ir.Value]:
    """What is summed, an array for each of ``spec.sum_kinds``.

    Args:
      spec: of the equation.
      values: ``grads``, ``params`` and ``updates`` of one leaf, in the compute dtype.
      spread: makes a tensor of the leaf's shape of a scalar.

    The last takes its zeros, where there would be negative squares, from the one before: XLA:TPU
    would make a kernel of its own for it, which reads all again, but makes what needs new params
    where these are made (GPT-2 small on v5e: 9.76 M estimated cycles in place of 14.8 M).
    """
    found = []
    for kind in spec.sum_kinds:
        x = values[kind.removeprefix("small_")]
        if kind.startswith("small_"):
            scalar = ir.RankedTensorType.get([], ir.RankedTensorType(x.type).element_type)
            _, unit = units(splat(scalar, 1.0))
            x = hlo.multiply(x, spread(unit))
        found.append(hlo.multiply(x, x))
    *_, params, updates = found
    bound = splat(params.type, -1.0)  # of 0 XLA knows that no square is below it
    below = hlo.compare(params, bound, hlo.ComparisonDirectionAttr.get("LT"))
    return [*found[:-1], hlo.select(below, params, updates)]


class Summing:
    """How a leaf's sums leave its composite: here each as a sum, of the shape of the batch."""

    def types(self, spec: UpdateSpec, shape: Sequence[int], dtype: ir.Type) -> list[ir.Type]:
        """The types of what ``made`` makes, for a leaf of this shape, the batch in front."""
        return [ir.RankedTensorType.get(shape[: spec.batch_rank], dtype)] * len(spec.sum_kinds)

    def made(self, spec: UpdateSpec, arrays: Sequence[ir.Value]) -> list[ir.Value]:
        """What leaves the composite, from an array of squares for each of ``spec.sum_kinds``."""
        return of_leaf(arrays, spec.batch_rank)


def of_leaf(arrays: Sequence[ir.Value], batch_rank: int) -> list[ir.Value]:
    """The sums of one leaf, each of the shape of the batch."""
    rank = ir.RankedTensorType(arrays[0].type).rank
    return [sum_over(x, range(batch_rank, rank)) for x in arrays]


def result(
    ctx: mlir.LoweringRuleContext, spec: UpdateSpec, leaves: Sequence[Sequence[ir.Value]]
) -> ir.Value:
    """The equation's last result, from the sums of each leaf."""
    aval = ctx.avals_out[-1]
    dtype = mlir.dtype_to_ir_type(aval.dtype)
    r = spec.batch_rank

    def column(xs: Sequence[ir.Value]) -> ir.Value:
        """[*batch] of each leaf -> [*batch, 1], or [*batch, leaves, 1]."""
        batch = list(aval.shape[:r])
        wide = [_spread(x, batch, dtype) for x in xs]
        if spec.sums == "tree":
            return _reshaped(functools.reduce(hlo.add, wide), [*batch, 1])
        return _joined([_reshaped(x, [*batch, 1, 1]) for x in wide], r)

    columns = [column(xs) for xs in zip(*leaves, strict=True)]
    return with_type(ctx, _joined(columns, len(aval.shape) - 1))


def with_type(ctx: mlir.LoweringRuleContext, sums: ir.Value) -> ir.Value:
    """In explicit mode, the last result's sharding is part of its type."""
    return lower_with_sharding_in_types(ctx, sums, ctx.avals_out[-1])


def _spread(x: ir.Value, batch: Sequence[int], dtype: ir.Type) -> ir.Value:
    """With the whole batch, in the dtype of the result."""
    own = ir.RankedTensorType(x.type).shape
    x = converted(x, dtype)
    whole = ir.RankedTensorType.get(batch, dtype)
    return hlo.broadcast_in_dim(whole, x, mlir.dense_int_array(list(range(len(own)))))


def _reshaped(x: ir.Value, shape: Sequence[int]) -> ir.Value:
    return hlo.reshape(ir.RankedTensorType.get(shape, ir.RankedTensorType(x.type).element_type), x)


def _joined(xs: Sequence[ir.Value], dim: int) -> ir.Value:
    return hlo.concatenate(xs, axis(dim)) if len(xs) > 1 else xs[0]
