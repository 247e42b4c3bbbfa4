"""The update, and the norm, of a whole tree as one Triton-dialect kernel each."""

from collections.abc import Iterable, Sequence
import dataclasses
import math
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf
from jax.interpreters import mlir
import jax.numpy as jnp
import numpy as np

from ... import arithmetic
from ...contract import (
    NORM_NAME,
    UPDATE_NAME,
    Slot,
    UpdateSpec,
    compute_dtype,
    join_leaves,
    small_unit,
)
from ..call import Kernel, build, tt
from ..pieces import Kind, Launch, Leaf, Section, cut
from .ops import (
    BlockOps,
    constant,
    convert,
    load_scalar,
    offset_by,
    over_threads,
    splat_constant,
)
from .sums import PartialSums
from .tree import Work, find, for_each_section, member_of


def update_kernel(
    spec: UpdateSpec,
    leaves: Sequence[Leaf],
    scalars: Sequence[tuple[tuple[int, ...], Any]],
    launch: Launch,
) -> Kernel:
    """The update of ``leaves``: parameters are hyper, leaf_scale, operands, results.

    With sums there is one parameter more, [kinds, programs] in the dtype of hyper: what each
    program has of them.

    Args:
      spec: what kind of update it is.
      leaves: none of them empty.
      scalars: shape and dtype of hyper, and of leaf_scale.
      launch: the launch's shape.
    """
    sections = cut(leaves, launch.block)
    n, first = len(leaves), len(scalars)

    end = first + n * (len(spec.operand_kinds) + len(spec.result_kinds))

    def body(args: Sequence[ir.Value]) -> None:
        columns = [args[i : i + n] for i in range(first, end, n)]
        shapes = [tuple(shape) for shape, _ in scalars]
        sums = PartialSums(args[end], sections[-1].end) if spec.sums else None
        update = _Update(spec, shapes, args[:first], columns, sums)
        for_each_section(sections, update.body)

    pointers = [dtype for _, dtype in scalars]
    pointers += join_leaves([(*leaf.kind.operands, *leaf.kind.results) for leaf in leaves])
    pointers += pointers[:1] * (spec.sums is not None)
    return build(f"{UPDATE_NAME}_kernel", pointers, body, sections[-1].end, launch.num_warps)


def norm_kernel(leaves: Sequence[Leaf], scale_dtype: Any, launch: Launch, span: int) -> Kernel:
    """Partial sums of ``(scale * x)**2``: parameters are scale, leaves, one number per program.

    The number is the sum, or where that overflows minus the sum in the small unit.

    Args:
      leaves: none of them empty, each of one operand and no batch.
      scale_dtype: the dtype of the arithmetic and of the sums.
      launch: the launch's shape.
      span: how many blocks each program walks.
    """
    sections = cut(leaves, launch.block, span)

    def body(args: Sequence[ir.Value]) -> None:
        norm = _Norm(args[0], args[1:-1], args[-1], np.dtype(scale_dtype), span)
        for_each_section(sections, norm.body)

    pointers = [scale_dtype, *(leaf.kind.operands[0] for leaf in leaves), scale_dtype]
    return build(f"{NORM_NAME}_kernel", pointers, body, sections[-1].end, launch.num_warps)


@dataclasses.dataclass(frozen=True)
class _Update:
    """The parameters of the update's kernel."""

    spec: UpdateSpec
    shapes: Sequence[tuple[int, ...]]
    scalars: Sequence[ir.Value]
    columns: Sequence[Sequence[ir.Value]]
    sums: PartialSums | None

    def body(self, section: Section, program: ir.Value) -> None:
        """What a program does with its block of some leaf."""
        spec, kind = self.spec, section.kind
        work = find(section, program, self.columns)
        block, member = work.block_and_member()
        base = work.base(block)
        mask = work.mask(base)
        ops = BlockOps(section.block, mlir.dtype_to_ir_type(compute_dtype(kind.operands[0])))
        stored: dict[str, ir.Value] = {}
        for i, name in enumerate(spec.operand_kinds):
            own = kind.operand_batches[i] if kind.batch else ()
            at = work.pointers(i, base, member_of(kind.batch, own, member))
            stored[name] = tt.load(at, mask=mask)
        row = self._place(0, work.group, kind, member)
        row = arith.muli(row, constant(self.shapes[0][-1], row.type))
        slot = _Slots(ops, self.scalars[0], row)
        x = {name: ops.operand(value) for name, value in stored.items()}
        is_narrow = kind.operands[0] == jnp.bfloat16
        new = arithmetic.update(
            ops, spec, slot, x, self._scales(ops, work, member), is_narrow=is_narrow
        )
        after: dict[str, ir.Value] = {}
        for i, name in enumerate(spec.result_kinds):
            value = convert(new[name], mlir.dtype_to_ir_type(kind.results[i]))
            if spec.skip:
                value = arith.select(ops.is_set(slot(Slot.APPLY)), value, stored[name])
            tt.store(work.pointers(len(kind.operands) + i, base, member), value, mask=mask)
            after[name] = value
        if self.sums is not None:
            added = new["added"]
            if spec.skip:
                added = ops.select(ops.is_set(slot(Slot.APPLY)), added, ops.number(0.0))
            values = {"grads": x["grads"], "params": ops.operand(after["params"]), "updates": added}
            self.sums.store(ops, spec, values, mask, program)

    def _place(self, scalar: int, index: ir.Value, kind: Kind, member: Any) -> ir.Value:
        """``index`` in the scalar's dimension behind the batch, in that of the member."""
        rank = len(kind.batch)
        shape = self.shapes[scalar]
        own = member_of(kind.batch, shape[:rank], member)
        if own is None:
            return index
        length = shape[rank] if rank else shape[0]
        return arith.addi(index, arith.muli(own, constant(length, own.type)))

    def _scales(self, ops: "BlockOps", work: "Work", member: Any) -> Iterable[ir.Value]:
        if self.spec.leaf_scale:
            place = self._place(1, work.index, work.section.kind, member)
            yield ops.splat(convert(load_scalar(self.scalars[1], place), ops.dtype))


@dataclasses.dataclass(frozen=True)
class _Slots:
    """The columns of one row of hyper, each spread over the block."""

    ops: "BlockOps"
    hyper: ir.Value
    row: ir.Value
    known: dict[Slot, ir.Value] = dataclasses.field(default_factory=dict)

    def __call__(self, slot: Slot) -> ir.Value:
        if slot not in self.known:
            at = arith.addi(self.row, constant(int(slot), self.row.type))
            value = convert(load_scalar(self.hyper, at), self.ops.dtype)
            self.known[slot] = self.ops.splat(value)
        return self.known[slot]


@dataclasses.dataclass(frozen=True)
class _Norm:
    """The parameters of the norm's kernel."""

    scale: ir.Value
    leaves: Sequence[ir.Value]
    sums: ir.Value
    dtype: np.dtype
    span: int

    def body(self, section: Section, program: ir.Value) -> None:
        """Sums the blocks of a program one after another, and then over its threads."""
        work = find(section, program, [self.leaves])
        ops = BlockOps(section.block, mlir.dtype_to_ir_type(self.dtype))
        scale = ops.splat(tt.load(self.scale))
        i32 = ir.IntegerType.get_signless(32)
        first = arith.muli(work.local, constant(self.span, i32))
        low, high, one = (constant(x, i32) for x in (0, self.span, 1))
        unit = ops.number(small_unit(self.dtype))
        loop = scf.ForOp(low, high, one, [ops.number(0.0)] * 2)
        with ir.InsertionPoint(loop.body):
            base = work.base(arith.addi(first, loop.induction_variable))
            mask = work.mask(base)
            at = work.pointers(0, base, None)
            stored = mlir.dtype_to_ir_type(section.kind.operands[0])
            zero = splat_constant(section.block, stored, 0.0)
            x = ops.multiply(ops.operand(tt.load(at, mask=mask, other=zero)), scale)
            numbers = (x, ops.multiply(x, unit))
            pairs = zip(loop.inner_iter_args, numbers, strict=True)
            scf.yield_([ops.add(total, ops.multiply(y, y)) for total, y in pairs])
        plain, small = (over_threads(ops, total) for total in loop.results)
        infinity = arith.constant(ops.dtype, ir.FloatAttr.get(ops.dtype, math.inf))
        fits = arith.cmpf(arith.CmpFPredicate.OLT, plain, infinity)  # no sum is negative
        total = arith.select(fits, plain, arith.negf(small))
        tt.store(offset_by(self.sums, program), total)
