"""The squared norm of a tree on NVIDIA GPUs: partial sums of all leaves by one kernel.

Each program writes one sum, and XLA adds them up; the order of the additions is the same
in every run. It goes with the update's kernel: compiled and interpreted, not run.
"""

from collections.abc import Sequence
import math

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from ..contract import cut_evenly
from . import call
from .kernel import can_run, launch_shape
from .pieces import Kind, Leaf
from .triton_builder import norm_kernel

MAX_NORM_LEAVES = 512
"""Leaves of one kernel, whose compile time grows with the square of them: 2 s for so many."""

MAX_SUMS = 4096
"""About how many programs there are in a large tree; XLA:GPU adds 8,192 in one kernel."""


def partial_sums(
    ctx: mlir.LoweringRuleContext, scale: ir.Value, leaves: Sequence[ir.Value]
) -> ir.Value | None:
    """Sums of ``(scale * x)**2`` over parts of a tree without a batch, by few kernels.

    Args:
      ctx: of the equation, whose operands are ``scale`` and ``leaves``.
      scale: a scalar.
      leaves: tensors of any shapes.

    Returns:
      A tensor [programs] in the dtype of ``scale``; None where the kernel cannot be used.
    """
    scale_aval, *avals = ctx.avals_in
    full = [i for i, aval in enumerate(avals) if 0 not in aval.shape]
    if not can_run(ctx) or not full:
        return None
    launch = launch_shape()
    span = -(-sum(math.prod(avals[i].shape) for i in full) // (launch.block * MAX_SUMS))
    found: list[ir.Value] = []
    for part in cut_evenly(full, MAX_NORM_LEAVES):
        tree = [Leaf(Kind((avals[i].dtype,), ()), math.prod(avals[i].shape)) for i in part]
        kernel = norm_kernel(tree, scale_aval.dtype, launch, span)
        aval_out = jax.core.ShapedArray((kernel.programs,), scale_aval.dtype)
        operands, avals_in = [leaves[i] for i in part], [avals[i] for i in part]
        found += call.call(ctx, kernel, [scale, *operands], [scale_aval, *avals_in], [aval_out], {})
    if len(found) == 1:
        return found[0]
    return hlo.concatenate(found, ir.IntegerAttr.get(ir.IntegerType.get_signless(64), 0))
