"""The sums beside the GPU's update: each program's part of them, and a kernel that adds the parts.

The programs of a leaf, or of a member of its batch, have consecutive numbers, but for the few
elements behind its whole units. So one program for each leaf adds its parts in a fixed order:
one kernel for the sums of all leaves.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf
from jax.interpreters import mlir
import numpy as np

from ...contract import UPDATE_NAME, UpdateSpec, small_unit
from ..call import Kernel, build, tt
from ..pieces import Launch, Leaf, cut
from .ops import (
    BlockOps,
    arange,
    constant,
    convert,
    load_scalar,
    offset_by,
    over_threads,
    splat_constant,
)

RANGES = 2
"""A leaf's programs are those of its whole units, and those of what is left."""


@dataclasses.dataclass(frozen=True)
class PartialSums:
    """[kinds, programs] in the dtype of ``hyper``, as a kernel's parameter."""

    pointer: ir.Value
    programs: int

    def store(
        self,
        ops: BlockOps,
        spec: UpdateSpec,
        values: dict[str, ir.Value],
        mask: ir.Value,
        program: ir.Value,
    ) -> None:
        """What ``program`` has of each sum: ``values`` are of a block, some of it masked."""
        dtype = tt.PointerType(self.pointer.type).pointee_type
        i64 = ir.IntegerType.get_signless(64)
        for k, kind in enumerate(spec.sum_kinds):
            x = values[kind.removeprefix("small_")]
            if kind.startswith("small_"):
                wide = np.float64 if ops.is_wide else np.float32
                x = ops.multiply(x, ops.number(small_unit(wide)))
            square = ops.select(mask, ops.multiply(x, x), ops.number(0.0))
            total = convert(over_threads(ops, square), dtype)
            first = offset_by(self.pointer, constant(k * self.programs, i64))
            tt.store(offset_by(first, program), total)


def ranges(leaves: Sequence[Leaf], batch: Sequence[int], block: int) -> np.ndarray[Any, Any]:
    """int32[*batch, leaves, RANGES * 2]: where each sum's programs begin and end.

    Args:
      leaves: as the update's kernel sees them, each with a batch that repeats within ``batch``.
      batch: that of the equation's sums.
      block: elements that a program treats.
    """
    found = np.zeros((*batch, len(leaves), RANGES, 2), np.int32)
    count = np.zeros(len(leaves), int)
    for section in cut(leaves, block):
        for piece in section.pieces:
            own = section.kind.batch or (1,) * len(batch)
            programs = -(-piece.length // section.block)
            members = np.broadcast_to(np.arange(section.kind.members).reshape(own), batch)
            first = piece.first + members * programs
            found[..., piece.leaf, count[piece.leaf], :] = np.stack([first, first + programs], -1)
            count[piece.leaf] += 1
    return found.reshape(*batch, len(leaves), RANGES * 2)


PARTS = 32
"""Of a tree's sums: a few blocks that read fast enough, and rows that XLA adds where it reads them.

A power of two."""


def even_ranges(programs: int) -> np.ndarray[Any, Any]:
    """int32[PARTS, RANGES * 2]: all programs, cut evenly."""
    cuts = [i * programs // PARTS for i in range(PARTS + 1)]
    found = np.zeros((PARTS, RANGES * 2), np.int32)
    found[:, :2] = np.stack([cuts[:-1], cuts[1:]], -1)
    return found


def sums_kernel(dtype: Any, kinds: int, programs: int, sums: int, launch: Launch) -> Kernel:
    """Adds parts: parameters are ranges int32[sums, 4], [kinds, programs] and [sums, kinds].

    Args:
      dtype: that of the last two.
      kinds: of sums.
      programs: of the kernel that made the parts.
      sums: how many of each kind there are to be.
      launch: the launch's shape.
    """

    def body(args: Sequence[ir.Value]) -> None:
        table, parts, out = args
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        program = tt.get_program_id(tt.ProgramIDDim.X)
        ops = BlockOps(launch.block, mlir.dtype_to_ir_type(np.dtype(dtype)))
        rows = [offset_by(parts, constant(k * programs, i64)) for k in range(kinds)]
        zero = splat_constant(launch.block, ops.dtype, 0.0)
        row = arith.muli(program, constant(RANGES * 2, i32))
        bounds = [load_scalar(table, arith.addi(row, constant(k, i32))) for k in range(RANGES * 2)]
        totals = [zero] * kinds
        for first, end in zip(bounds[::2], bounds[1::2], strict=True):
            loop = scf.ForOp(first, end, constant(launch.block, i32), totals)
            with ir.InsertionPoint(loop.body):
                wide = ir.RankedTensorType.get([launch.block], i32)
                index = arith.addi(tt.splat(wide, loop.induction_variable), arange(launch.block))
                mask = arith.cmpi(arith.CmpIPredicate.slt, index, tt.splat(wide, end))
                blocks = [offset_by(ops.splat(x), index) for x in rows]
                new = [tt.load(x, mask=mask, other=zero) for x in blocks]
                pairs = zip(loop.inner_iter_args, new, strict=True)
                scf.yield_([ops.add(total, x) for total, x in pairs])
            totals = list(loop.results)
        own = offset_by(out, arith.muli(program, constant(kinds, i32)))
        for k, total in enumerate(totals):
            tt.store(offset_by(own, constant(k, i32)), over_threads(ops, total))

    name = f"{UPDATE_NAME}_sums_kernel"
    return build(name, [np.int32, dtype, dtype], body, sums, launch.num_warps)
