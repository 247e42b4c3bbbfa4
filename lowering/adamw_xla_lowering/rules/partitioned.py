"""A kernel of our own in a program that XLA partitions over several devices.

XLA's partitioner knows nothing of a kernel, and would gather its operands. Here Shardy is told
which dimensions belong together, and XLA is asked to call back: it says how operands and
results are sharded, and gets the program that each device runs on its shards, which is the
same equation on smaller leaves. Each leaf's state and gradient follow whichever of its
results is cut the smallest; if all are cut alike, nothing is moved.

"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import math
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir
import numpy as np

from .. import stablehlo
from .._jax_private import HloSharding, partitions_automatically, platforms_of, uses_shardy
from ..contract import (
    UPDATE_NAME,
    UpdateSpec,
    aliases,
    split_operands,
    split_results,
)
from ..errors import logger
from . import called_back, placing
from .called_back import Shardings, factor
from .partitioned_norm import parts_of, shards_of

TARGET_NAME = "adamw_xla_partitioned_update"
"""The custom call in lowered programs, until XLA partitions them."""


def refusal(ctx: mlir.LoweringRuleContext, spec: UpdateSpec) -> str | None:
    """Why XLA cannot be asked to partition this equation; None if it can."""
    if not partitions_automatically(ctx):
        return "the program is partitioned over several devices (partly inside of shard_map)"
    if not uses_shardy():
        return "jax_use_shardy_partitioner is off, and GSPMD cannot partition a kernel"
    if spec.batch_rank:
        return "a batch is partitioned over several devices (outside of shard_map)"
    return None


def gradients_beside_state(
    ctx: mlir.LoweringRuleContext, operands: Sequence[ir.Value], spec: UpdateSpec
) -> list[ir.Value]:
    """The operands of an update, each gradient sharded as its first moment is.

    Shardings pass from a gradient to all that is made of it. Where its param and state are cut
    otherwise, as small leaves are that every device has, three results would be gathered for
    one gradient.
    """
    tied = list(operands)
    n = spec.num_leaves
    for grad in range(spec.num_scalars + n, spec.num_scalars + 2 * n):
        # A value has one sharding, and the gradient is its producer's.
        tied[grad] = hlo.reshape(operands[grad].type, operands[grad])
        placing.tie(ctx, tied[grad], operands[grad + n])
    return tied


def lower(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: UpdateSpec
) -> Sequence[ir.Value]:
    """Lowers the whole tree to a call that the partitioner replaces."""
    (platform,) = platforms_of(ctx)
    config = json.dumps({"platform": platform, **dataclasses.asdict(spec)})
    rule = _sharding_rule(spec, ctx.avals_in, ctx.avals_out)
    results = called_back.call(ctx, TARGET_NAME, _partition, operands, rule, config)
    logger.debug("%s: %d leaves, to be partitioned by XLA", UPDATE_NAME, spec.num_leaves)
    return stablehlo.with_shardings(ctx, results, ctx.avals_out)


def _sharding_rule(spec: UpdateSpec, avals: Sequence[Any], avals_out: Sequence[Any]) -> str:
    """Shardy's rule: dimension d of leaf i is one factor in all its operands and results."""
    sizes: list[int] = []

    def factors(aval: Any) -> str:
        first = len(sizes)
        sizes.extend(aval.shape)
        return f"[{', '.join(factor(k) for k in range(first, len(sizes)))}]"

    scalars = [factors(aval) for aval in avals[: spec.num_scalars]]
    whole = list(range(len(sizes)))
    leaves = [factors(row[0]) for row in split_operands(spec, avals).leaves]
    operands = ", ".join([*scalars, *leaves * len(spec.operand_kinds)])
    end = len(sizes)
    sums = [factors(avals_out[-1])] if spec.sums else []
    whole += range(end, len(sizes))
    results = ", ".join(leaves * len(spec.result_kinds) + sums)
    replicated = ", ".join(map(factor, whole))
    extents = ", ".join(f"{factor(k)}={size}" for k, size in enumerate(sizes))
    return (
        f"#sdy.op_sharding_rule<({operands})->({results}) {{{extents}}} "
        f"need_replication={{{replicated}}}>"
    )


# ------------------------------------------------------------------- XLA's callback


def _decode(config: bytes) -> tuple[UpdateSpec, str]:
    fields = json.loads(config)
    platform = fields.pop("platform")
    return UpdateSpec(**{**fields, "groups": tuple(fields["groups"])}), platform


def _partition(
    shapes: Sequence[Any], shardings: Shardings, result: Any, result_sharding: Any, config: bytes
) -> tuple[bytes, list[Any], Any]:
    """The program of each device, and how its operands and results are to be sharded."""
    del shardings
    spec, platform = _decode(config)
    wanted, _ = split_results(spec, result_sharding.tuple_elements())
    results, _ = split_results(spec, result.tuple_shapes())
    smallest = [
        min(options, key=lambda s, shape=row[0]: math.prod(s.tile(shape).dimensions()))  # type: ignore[misc]
        for options, row in zip(wanted, results, strict=True)
    ]
    whole = HloSharding.replicate()
    if spec.sums:
        # Padding would count: such a leaf, which no program is given and few make, is gathered.
        shapes_of = [row[0] for row in results]
        parts = [parts_of(s, shape) for s, shape in zip(smallest, shapes_of, strict=True)]
        smallest = [s if p[1] is None else whole for s, p in zip(smallest, parts, strict=True)]
        parts = [parts_of(s, shape) for s, shape in zip(smallest, shapes_of, strict=True)]
        spec = dataclasses.replace(spec, shards=shards_of(parts))
    args = [*[whole] * spec.num_scalars, *smallest * len(spec.operand_kinds)]
    tiles = [s.tile(shape) for s, shape in zip(args, shapes, strict=True)]
    structs = [jax.ShapeDtypeStruct(t.dimensions(), np.dtype(t.numpy_dtype())) for t in tiles]
    places = [*smallest * len(spec.result_kinds), *[whole] * (spec.sums is not None)]
    packed = HloSharding.tuple_sharding(result, places)
    return _program(spec, platform, structs), args, packed


def _program(spec: UpdateSpec, platform: str, operands: Sequence[Any]) -> bytes:
    """The equation on these operands and one device, as MLIR bytecode."""

    def traced() -> Any:
        bind = functools.partial(_bind, spec=spec)
        written = tuple(aliases(spec, operands, jax.eval_shape(bind, *operands)))
        # It is put into the whole program, which knows whose arrays these are.
        return jax.jit(bind, donate_argnums=written).trace(*operands)

    return called_back.program(traced, platform)


_primitives: list[Primitive] = []


def _bind(*operands: jax.Array, spec: UpdateSpec) -> list[jax.Array]:
    (primitive,) = _primitives
    return primitive.bind(*operands, spec=spec)


def register(primitive: Primitive) -> None:
    """Says whose equation each device is to run."""
    _primitives.append(primitive)
