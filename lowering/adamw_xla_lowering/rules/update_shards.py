"""The sums beside an update of which each device has a part: what one of them runs."""

from collections.abc import Callable, Sequence
import dataclasses

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir
import numpy as np

from ..contract import UpdateSpec
from ..norm_stablehlo import sum_over, with_types
from .norm_shards import all_reduced, row_of, where


def lower(
    ctx: mlir.LoweringRuleContext,
    update: Callable[..., Sequence[ir.Value]],
    *operands: ir.Value,
    spec: UpdateSpec,
) -> list[ir.Value]:
    """The platform's ``update`` of this device's parts, and one sum over all devices."""
    shards, aval = spec.shards, ctx.avals_out[-1]
    assert shards is not None
    own = dataclasses.replace(spec, shards=None, sums="leaves")
    shape = (spec.num_leaves, len(spec.sum_kinds))
    inner = ctx.replace(avals_out=[*ctx.avals_out[:-1], aval.update(shape=shape)])
    *leaves, sums = update(inner, *operands, spec=own)
    # Of the devices that have the same part one counts it.
    flags = row_of(hlo.PartitionIdOp().result, np.transpose(shards.counted))
    counted = where(flags, _transposed(sums))
    if spec.sums == "tree":
        counted = sum_over(counted, [1])
    whole = all_reduced(counted, len(shards.counted[0]))
    whole = _transposed(whole) if spec.sums == "leaves" else whole
    return [*leaves, *with_types(ctx.replace(avals_out=[aval]), [whole])]


def _transposed(x: ir.Value) -> ir.Value:
    return hlo.transpose(x, mlir.dense_int_array([1, 0]))
