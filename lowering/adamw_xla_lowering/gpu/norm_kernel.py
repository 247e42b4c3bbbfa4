"""The squared norm of a tree on NVIDIA GPUs: partial sums of all leaves by one kernel.

Each program writes one number, and XLA adds them up; the order of the additions is the same
in every run. The number is the sum of squares, or where that overflows minus the sum in the
small unit. It goes with the update's kernel.
"""

from collections.abc import Sequence
import math

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from ..contract import cut_evenly
from ..norm_stablehlo import splat, units
from . import call
from .kernel import can_run, launch_shape
from .pieces import Kind, Leaf
from .triton.builder import norm_kernel

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
      A tensor [programs] in the dtype of ``scale``, as ``squeezed`` makes it; None where the
      kernel cannot be used.
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


def squeezed(sums: ir.Value) -> ir.Value:
    """Sums in both units -> one number each: the first, or minus the second if it overflowed."""
    plain, small = hlo.real(sums), hlo.imag(sums)
    return hlo.select(hlo.is_finite(plain), plain, hlo.negate(small))


def split_parts(x: ir.Value) -> ir.Value:
    """What ``squeezed`` made of sums -> these sums; the first is infinite where it overflowed."""
    is_small = hlo.compare(x, splat(x.type, 0.0), hlo.ComparisonDirectionAttr.get("LT"))
    plain = hlo.select(is_small, splat(x.type, math.inf), x)
    unit = hlo.broadcast_in_dim(x.type, units(x)[1], mlir.dense_int_array([]))
    root = hlo.multiply(hlo.sqrt(hlo.abs(x)), unit)
    return hlo.complex(plain, hlo.maximum(hlo.negate(x), hlo.multiply(root, root)))
