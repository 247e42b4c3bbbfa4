"""A kernel of our own in a program that XLA partitions over several devices.

XLA's partitioner knows nothing of a kernel, and would gather its operands. Here Shardy is told
which dimensions belong together, and XLA is asked to call back: it says how operands and
results are sharded, and gets the program that each device runs on its shards, which is the
same equation on smaller leaves. Each leaf's state and gradient follow whichever of its
results is cut the smallest; if all are cut alike, nothing is moved.

``jax.experimental.custom_partitioning`` offers the same, but its primitive must stand in
the jaxpr, where only ours does, and programs that have it cannot be lowered for an
abstract mesh.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import json
import math
from typing import Any, TypeAlias

import jax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir
import numpy as np

from .. import stablehlo
from .._jax_private import (
    HloSharding,
    partitions_automatically,
    platforms_of,
    register_partitioner,
    uses_shardy,
)
from ..contract import UPDATE_NAME, UpdateSpec, aliases, split_leaves, split_operands
from ..errors import logger

TARGET_NAME = "adamw_xla_partitioned_update"
"""The custom call in lowered programs, until XLA partitions them."""

Shardings: TypeAlias = Sequence[Any]
"""``HloSharding``, one per operand or result; None where it is not known yet."""


def refusal(ctx: mlir.LoweringRuleContext, spec: UpdateSpec) -> str | None:
    """Why XLA cannot be asked to partition this equation; None if it can."""
    if not partitions_automatically(ctx):
        return "the program is partitioned over several devices (partly inside of shard_map)"
    if not uses_shardy():
        return "jax_use_shardy_partitioner is off, and GSPMD cannot partition a kernel"
    if spec.batch_rank:
        return "a batch is partitioned over several devices (outside of shard_map)"
    return None


def lower(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: UpdateSpec
) -> Sequence[ir.Value]:
    """Lowers the whole tree to a call that the partitioner replaces."""
    _ask_xla_to_call_back()
    (platform,) = platforms_of(ctx)
    config = json.dumps({"platform": platform, **dataclasses.asdict(spec)})
    call = hlo.CustomCallOp(
        [_tensor(aval) for aval in ctx.avals_out],
        list(operands),
        call_target_name=ir.StringAttr.get(TARGET_NAME),
        has_side_effect=ir.BoolAttr.get(False),
        api_version=mlir.i32_attr(2),
        called_computations=ir.ArrayAttr.get([]),
        backend_config=ir.StringAttr.get(config),
        operand_layouts=None,
        result_layouts=None,
    )
    rule = _sharding_rule(spec, ctx.avals_in)
    call.attributes["sdy.sharding_rule"] = ir.Attribute.parse(rule)
    logger.debug("%s: %d leaves, to be partitioned by XLA", UPDATE_NAME, spec.num_leaves)
    return stablehlo.with_shardings(ctx, list(call.results), ctx.avals_out)


def _tensor(aval: Any) -> ir.Type:
    return ir.RankedTensorType.get(aval.shape, mlir.dtype_to_ir_type(aval.dtype))


def _sharding_rule(spec: UpdateSpec, avals: Sequence[Any]) -> str:
    """Shardy's rule: dimension d of leaf i is one factor in all its operands and results."""
    sizes: list[int] = []

    def factors(aval: Any) -> str:
        first = len(sizes)
        sizes.extend(aval.shape)
        return f"[{', '.join(_factor(k) for k in range(first, len(sizes)))}]"

    scalars = [factors(aval) for aval in avals[: spec.num_scalars]]
    whole = ", ".join(_factor(k) for k in range(len(sizes)))
    leaves = [factors(row[0]) for row in split_operands(spec, avals).leaves]
    operands = ", ".join([*scalars, *leaves * len(spec.operand_kinds)])
    results = ", ".join(leaves * len(spec.result_kinds))
    extents = ", ".join(f"{_factor(k)}={size}" for k, size in enumerate(sizes))
    return (
        f"#sdy.op_sharding_rule<({operands})->({results}) {{{extents}}} "
        f"need_replication={{{whole}}}>"
    )


def _factor(index: int) -> str:
    """By the dialect's grammar: i, j, ... z, z_1, z_2, ..."""
    return chr(ord("i") + index) if index < 18 else f"z_{index - 17}"


# ------------------------------------------------------------------- XLA's callbacks


@functools.cache
def _ask_xla_to_call_back() -> None:
    register_partitioner(TARGET_NAME, _partition)


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
    n = spec.num_leaves
    wanted = split_leaves(result_sharding.tuple_elements(), n)
    results = split_leaves(result.tuple_shapes(), n)
    smallest = [
        min(options, key=lambda s, shape=row[0]: math.prod(s.tile(shape).dimensions()))  # type: ignore[misc]
        for options, row in zip(wanted, results, strict=True)
    ]
    scalars = [HloSharding.replicate()] * spec.num_scalars
    args = [*scalars, *smallest * len(spec.operand_kinds)]
    tiles = [s.tile(shape) for s, shape in zip(args, shapes, strict=True)]
    structs = [jax.ShapeDtypeStruct(t.dimensions(), np.dtype(t.numpy_dtype())) for t in tiles]
    packed = HloSharding.tuple_sharding(result, smallest * len(spec.result_kinds))
    return _program(spec, platform, structs), args, packed


def _program(spec: UpdateSpec, platform: str, operands: Sequence[Any]) -> bytes:
    """The equation on these operands and one device, as MLIR bytecode.

    XLA calls back on the thread of whoever compiles (up to jax 0.10 on one of its own), whose
    mesh and precision are those of the whole program, and who may be tracing another. A
    new thread has none of these.
    """
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_lowered, spec, platform, operands).result()


def _lowered(spec: UpdateSpec, platform: str, operands: Sequence[Any]) -> bytes:
    with jax.enable_x64(True):  # dtypes are as given
        bind = functools.partial(_bind, spec=spec)
        written = tuple(aliases(spec, operands, jax.eval_shape(bind, *operands)))
        # It is put into the whole program, which knows whose arrays these are.
        traced = jax.jit(bind, donate_argnums=written).trace(*operands)
        module = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    return mlir.module_to_bytecode(module)


_primitives: list[Primitive] = []


def _bind(*operands: jax.Array, spec: UpdateSpec) -> list[jax.Array]:
    (primitive,) = _primitives
    return primitive.bind(*operands, spec=spec)


def register(primitive: Primitive) -> None:
    """Says whose equation each device is to run."""
    _primitives.append(primitive)
