"""A call that XLA's partitioner replaces by a program which it asks for.

XLA says how operands and results are sharded, and is told how they are to be and what each
device runs on its shards. ``jax.experimental.custom_partitioning`` offers the same, but its
primitive must stand in the jaxpr, where only ours does, and programs that have it cannot be
lowered for an abstract mesh. XLA:TPU knows of neither: it refuses to compile such calls.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import functools
from typing import Any, TypeAlias

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from .._jax_private import register_partitioner

Shardings: TypeAlias = Sequence[Any]
"""``HloSharding``, one per operand or result; None where it is not known yet."""


def call(
    ctx: mlir.LoweringRuleContext,
    target: str,
    partition: Callable[..., Any],
    operands: Sequence[ir.Value],
    rule: str,
    config: str,
) -> list[ir.Value]:
    """The call.

    Args:
      ctx: of the equation that it stands for; its results are of ``ctx.avals_out``.
      target: its name in the program, until XLA partitions that.
      partition: is called back: ``(shapes, shardings, result, result_sharding, config)``.
      operands: of the equation.
      rule: Shardy's, as text: which dimensions belong together.
      config: what ``partition`` gets, as bytes.
    """
    _ask_xla_to_call_back(target, partition)
    op = hlo.CustomCallOp(
        [_tensor(aval) for aval in ctx.avals_out],
        list(operands),
        call_target_name=ir.StringAttr.get(target),
        has_side_effect=ir.BoolAttr.get(False),
        api_version=mlir.i32_attr(2),
        called_computations=ir.ArrayAttr.get([]),
        backend_config=ir.StringAttr.get(config),
        operand_layouts=None,
        result_layouts=None,
    )
    op.attributes["sdy.sharding_rule"] = ir.Attribute.parse(rule)
    return list(op.results)


@functools.cache
def _ask_xla_to_call_back(target: str, partition: Callable[..., Any]) -> None:
    register_partitioner(target, partition)


def _tensor(aval: Any) -> ir.Type:
    return ir.RankedTensorType.get(aval.shape, mlir.dtype_to_ir_type(aval.dtype))


def factor(index: int) -> str:
    """The name of a rule's factor, by the dialect's grammar: i, j, ... z, z_1, z_2, ..."""
    return chr(ord("i") + index) if index < 18 else f"z_{index - 17}"


def program(traced: Callable[[], Any], platform: str) -> bytes:
    """What ``traced`` traces for one device, lowered for a platform: MLIR bytecode.

    XLA calls back on the thread of whoever compiles (up to jax 0.10 on one of its own), whose
    mesh and precision are those of the whole program, and who may be tracing another. A
    new thread has none of these.
    """

    def lowered() -> bytes:
        with jax.enable_x64(True):  # dtypes are as given
            module = traced().lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
        return mlir.module_to_bytecode(module)

    with ThreadPoolExecutor(1) as alone:
        return alone.submit(lowered).result()
