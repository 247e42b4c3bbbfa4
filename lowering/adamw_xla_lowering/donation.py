"""Which operands a kernel writes its results over, and which it must leave as they are.

A custom call says itself whether a result takes an operand's place, and XLA keeps that
promise by a copy where it must: of each argument of the program that its caller keeps. So
the promise is made for values that nobody needs any more, and else the kernel writes a
result of its own, which costs the same pass.
"""

from collections.abc import Sequence
import math
from typing import Any

from jax.extend.mlir import ir
from jax.interpreters import mlir

from ._jax_private import donated_arguments
from .contract import UpdateSpec, aliases

_VIEWS = (
    "sdy.sharding_constraint",
    "stablehlo.broadcast_in_dim",
    "stablehlo.optimization_barrier",
    "stablehlo.reshape",
)
"""What XLA makes no copy for, so long as the number of elements stays."""


class Donation:
    """What a program owns of its values: what is known while it is lowered, up to a call."""

    def __init__(self, ctx: mlir.LoweringRuleContext) -> None:
        self._donated = donated_arguments(ctx)

    def in_place(
        self,
        spec: UpdateSpec,
        operands: Sequence[ir.Value],
        avals_in: Sequence[Any],
        avals_out: Sequence[Any],
    ) -> dict[int, int]:
        """Operand index -> that of the result which is written over it.

        Args:
          spec: of the equation, or of a part of it.
          operands: its operands.
          avals_in: their types.
          avals_out: its results' types.
        """
        fit = aliases(spec, avals_in, avals_out)
        return {i: result for i, result in fit.items() if self._gives_up(operands[i])}

    def _gives_up(self, value: ir.Value) -> bool:
        """Whether ``value`` may be written over without a copy of it, as far as can be known."""
        viewed: ir.Value | None = value
        while viewed is not None:
            value = viewed
            if (donated := self._donated.get(value)) is not None:
                return donated
            viewed = _viewed(value)
        # Who calls a function (a jit within, a branch, or what a loop runs) is not known before
        # its call is lowered. A loop would have to copy, each time, what its body does not
        # write over: so what a function is called with counts as its own.
        owner = value.owner
        return isinstance(owner, ir.Block) or bool(owner.name != "stablehlo.constant")


def _viewed(value: ir.Value) -> ir.Value | None:
    """What this value is only a view of; None if it is none."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        inside, index = owner.owner.operation, ir.BlockArgument(value).arg_number
        # A device's part of an array.
        return inside.operands[index] if inside.name == "sdy.manual_computation" else None
    if owner.name not in _VIEWS:
        return None
    operand = owner.operands[ir.OpResult(value).result_number]
    is_whole = math.prod(operand.type.shape) == math.prod(value.type.shape)
    return operand if is_whole else None
