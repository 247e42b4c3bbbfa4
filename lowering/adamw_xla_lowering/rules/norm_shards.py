"""The squared norm of a tree of which each device holds parts: what one of them runs."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir
import numpy as np

from ..contract import NormSpec
from ..norm_stablehlo import axis, numbers, splat, sum_over, with_types


def lower(
    ctx: mlir.LoweringRuleContext,
    norm: Callable[..., Sequence[ir.Value]],
    scale: ir.Value,
    *leaves: ir.Value,
    spec: NormSpec,
) -> list[ir.Value]:
    """The platform's ``norm`` of this device's parts, and one sum over all devices."""
    shards = spec.shards
    assert shards is not None
    device = hlo.PartitionIdOp().result
    parts = [
        x if sizes is None else _without_padding(x, row_of(device, np.array(sizes)))
        for x, sizes in zip(leaves, shards.sizes, strict=True)
    ]
    if spec.per_leaf:
        runs, counted = [list(range(len(leaves)))], list(shards.counted)
    else:
        kinds: dict[tuple[bool, ...], list[int]] = {}
        for i, devices in enumerate(shards.counted):
            kinds.setdefault(devices, []).append(i)
        runs, counted = list(kinds.values()), list(kinds)
    whole, sums = dataclasses.replace(spec, shards=None), []
    for run in runs:
        members = [ctx.avals_in[0], *(ctx.avals_in[1 + i] for i in run)]
        own = ctx.replace(avals_in=members)
        sums.append(_in_both_units(*norm(own, scale, *(parts[i] for i in run), spec=whole)))
    both = hlo.concatenate(sums, axis(1)) if len(sums) > 1 else sums[0]
    both = where(row_of(device, np.transpose(counted)), both)
    if not spec.per_leaf:
        both = sum_over(both, [1])
    first, second = _unpacked(all_reduced(both, len(counted[0])))
    fits = hlo.is_finite(first)
    one, unit = (splat(first.type, x) for x in numbers(first))
    return with_types(ctx, [hlo.select(fits, first, second), hlo.select(fits, one, unit)])


def _in_both_units(sums: ir.Value, units: ir.Value) -> ir.Value:
    """[2, n]: infinite where the sum overflows in units of 1; and in the small unit.

    What does not overflow may vanish in the small unit, beside what does.
    """
    kind = ir.RankedTensorType(sums.type)
    row = ir.RankedTensorType.get([1, *(kind.shape or [1])], kind.element_type)
    sums, units = (hlo.reshape(row, x) for x in (sums, units))
    is_plain = hlo.compare(units, splat(row, 1.0), hlo.ComparisonDirectionAttr.get("EQ"))
    small = splat(row, numbers(sums)[1])
    plain = hlo.select(is_plain, sums, splat(row, float("inf")))
    # In two steps: the square of the small unit is 0.
    other = hlo.select(is_plain, hlo.multiply(hlo.multiply(sums, small), small), sums)
    return hlo.concatenate([plain, other], axis(0))


def _unpacked(both: ir.Value) -> list[ir.Value]:
    """[2, ...] -> two of [...]."""
    kind = ir.RankedTensorType(both.type)
    rest = kind.shape[1:]
    ones, zeros = [1] * kind.rank, [0] * len(rest)
    halves = [
        hlo.slice(both, *(mlir.dense_int_array(x) for x in ([k, *zeros], [k + 1, *rest], ones)))
        for k in range(2)
    ]
    return [hlo.reshape(ir.RankedTensorType.get(rest, kind.element_type), x) for x in halves]


def row_of(device: ir.Value, table: np.ndarray[Any, Any]) -> ir.Value:
    """This device's row of a table of whole numbers."""
    rows = hlo.constant(ir.DenseElementsAttr.get(np.ascontiguousarray(table, np.int32)))
    start = [hlo.convert(_int32(), device), _zeros(_int32())]
    row = hlo.dynamic_slice(rows, start, mlir.dense_int_array([1, table.shape[1]]))
    return hlo.reshape(_int32(table.shape[1]), row)


def _int32(*shape: int) -> ir.Type:
    return ir.RankedTensorType.get(shape, ir.IntegerType.get_signless(32))


def _zeros(kind: ir.Type) -> ir.Value:
    number = ir.IntegerAttr.get(ir.RankedTensorType(kind).element_type, 0)
    return hlo.constant(ir.DenseElementsAttr.get_splat(kind, number))


def where(flags: ir.Value, x: ir.Value) -> ir.Value:
    """``x`` [2, n] in the columns whose flag is set, else 0."""
    kind = _int32(*ir.RankedTensorType(x.type).shape)
    spread = hlo.broadcast_in_dim(kind, flags, mlir.dense_int_array([1]))
    is_set = hlo.compare(spread, _zeros(kind), hlo.ComparisonDirectionAttr.get("NE"))
    return hlo.select(is_set, x, splat(x.type, 0.0))


def _without_padding(x: ir.Value, sizes: ir.Value) -> ir.Value:
    """A part of a leaf, with zeros behind what it holds."""
    kind = _int32(*ir.RankedTensorType(x.type).shape)
    for d in range(ir.RankedTensorType(kind).rank):
        size = hlo.slice(sizes, *(mlir.dense_int_array([k]) for k in (d, d + 1, 1)))
        bound = hlo.broadcast_in_dim(kind, hlo.reshape(_int32(), size), mlir.dense_int_array([]))
        index = hlo.iota(kind, axis(d))
        inside = hlo.compare(index, bound, hlo.ComparisonDirectionAttr.get("LT"))
        x = hlo.select(inside, x, splat(x.type, 0.0))
    return x


def all_reduced(x: ir.Value, devices: int) -> ir.Value:
    """The sum over all devices of a partitioned program."""
    op = hlo.AllReduceOp(
        [x.type],
        [x],
        replica_groups=ir.DenseElementsAttr.get(np.arange(devices, dtype=np.int64)[None]),
        channel_handle=hlo.ChannelHandle.get(1, 1),  # XLA numbers it anew in the whole program
        use_global_device_ids=ir.UnitAttr.get(),
    )
    scalar = ir.RankedTensorType.get([], ir.RankedTensorType(x.type).element_type)
    with ir.InsertionPoint(op.regions[0].blocks.append(scalar, scalar)) as point:
        hlo.return_([hlo.add(*point.block.arguments)])
    return op.results[0]
