"""How a program finds its work: a balanced tree of branches on the program's number.

The branches yield *pointers*, so the body that reads and writes through them stands once
however many leaves there are; one body per leaf would take a minute to compile. Leaves
of the same dtypes share a body; those of other dtypes have one in another branch of the
same kernel.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf

from ..call import tt
from ..pieces import Piece, Section
from .ops import arange, constant, offset_by


@dataclasses.dataclass(frozen=True)
class Work:
    """One program's piece, found: ``local`` is the program's number within the piece."""

    section: Section
    columns: Sequence[ir.Value]
    local: ir.Value
    length: ir.Value
    start: ir.Value
    size: ir.Value
    group: ir.Value
    index: ir.Value

    def block_and_member(self) -> tuple[ir.Value, ir.Value | None]:
        """Which block, and of which member of the batch; None if there is one."""
        if self.section.kind.members == 1:
            return self.local, None
        i64, block = self.length.type, self.section.block
        last = arith.addi(self.length, constant(block - 1, i64))
        blocks = arith.trunci(self.local.type, arith.divsi(last, constant(block, i64)))
        return arith.remsi(self.local, blocks), arith.divsi(self.local, blocks)

    def base(self, block: ir.Value) -> ir.Value:
        """The number of the block's first element, counted from the piece's."""
        i64 = self.length.type
        return arith.muli(arith.extsi(i64, block), constant(self.section.block, i64))

    def mask(self, base: ir.Value) -> ir.Value:
        """Which elements of the block the piece has."""
        width, i64 = self.section.block, self.length.type
        wide = ir.RankedTensorType.get([width], i64)
        element = arith.addi(tt.splat(wide, base), arith.extsi(wide, arange(width)))
        return arith.cmpi(arith.CmpIPredicate.slt, element, tt.splat(wide, self.length))

    def pointers(self, column: int, base: ir.Value, member: ir.Value | None) -> ir.Value:
        """Pointers to the block's elements in one column, for a member of the batch."""
        offset = arith.addi(base, self.start)
        if member is not None:
            member = arith.extsi(self.size.type, member)
            offset = arith.addi(offset, arith.muli(member, self.size))
        first = offset_by(self.columns[column], offset)
        width = self.section.block
        return offset_by(
            tt.splat(ir.RankedTensorType.get([width], first.type), first), arange(width)
        )


def for_each_section(
    sections: Sequence[Section], body: Callable[[Section, ir.Value], None]
) -> None:
    """Branches on the program's number to the body of its section."""
    program = tt.get_program_id(tt.ProgramIDDim.X)
    _branch(sections, body, program)


def _branch(
    sections: Sequence[Section], body: Callable[[Section, ir.Value], None], program: ir.Value
) -> None:
    if len(sections) == 1:
        body(sections[0], program)
        return
    middle = len(sections) // 2
    branch = scf.IfOp(_is_before(program, sections[middle].first), has_else=True)
    for block, part in (
        (branch.then_block, sections[:middle]),
        (branch.else_block, sections[middle:]),
    ):
        with ir.InsertionPoint(block):
            _branch(part, body, program)
            scf.yield_([])


def find(section: Section, program: ir.Value, columns: Sequence[Sequence[ir.Value]]) -> Work:
    """The program's piece: what differs between pieces is yielded by the tree."""
    numbers = [
        (piece.first, piece.length // section.unit, piece.start // section.unit,
         piece.size // section.unit if section.kind.members > 1 else 0,
         piece.group, piece.index)
        for piece in section.pieces
    ]  # fmt: skip
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    types = (i32, i64, i64, i64, i32, i32)
    varies = [len(set(column)) > 1 for column in zip(*numbers, strict=True)]
    choice = _Choice(section.pieces, columns, numbers, types, varies)
    chosen = choice.make(program, 0, len(section.pieces))
    pointers, rest = chosen[: len(columns)], iter(chosen[len(columns) :])
    first, length, start, size, group, index = (
        next(rest) if vary else constant(number, kind)
        for vary, number, kind in zip(varies, numbers[0], types, strict=True)
    )
    unit = constant(section.unit, i64)
    length, start, size = (arith.muli(x, unit) for x in (length, start, size))
    return Work(section, pointers, arith.subi(program, first), length, start, size, group, index)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The balanced tree that finds a program's piece."""

    pieces: Sequence[Piece]
    columns: Sequence[Sequence[ir.Value]]
    numbers: Sequence[Sequence[int]]
    types: Sequence[ir.Type]
    varies: Sequence[bool]

    def make(self, program: ir.Value, low: int, high: int) -> list[ir.Value]:
        """Pointers and numbers of the piece among ``low : high`` that has the program."""
        if high - low == 1:
            pointers = [column[self.pieces[low].leaf] for column in self.columns]
            if len(self.pieces) == 1:
                return pointers
            first, *numbers = itertools.compress(self.numbers[low], self.varies)
            kind, *kinds = itertools.compress(self.types, self.varies)
            values = map(constant, numbers, kinds)
            return [*pointers, _pinned(first, kind), *values]
        middle = (low + high) // 2
        kinds = [column[self.pieces[0].leaf].type for column in self.columns]
        kinds += itertools.compress(self.types, self.varies)
        before = _is_before(program, self.pieces[middle].first)
        branch = scf.IfOp(before, kinds, has_else=True)
        for block, part in (
            (branch.then_block, (low, middle)),
            (branch.else_block, (middle, high)),
        ):
            with ir.InsertionPoint(block):
                scf.yield_(self.make(program, *part))
        return list(branch.results)


def _pinned(number: int, kind: ir.Type) -> ir.Value:
    """``number``, by an instruction that the compiler leaves in its branch.

    Without one it turns branches into selections, for which it keeps the pointers of all
    leaves in registers, and spills them. The number stands in the text: instructions of one
    text would be made one.
    """
    unused = constant(0, kind)
    return tt.elementwise_inline_asm([kind], f"mov.u32 $0, {number};", "=r,r", False, 1, [unused])


def _is_before(program: ir.Value, first: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, program, constant(first, program.type))


def member_of(batch: Sequence[int], own: Sequence[int], member: Any) -> Any:
    """A member of the whole batch -> that of an operand that has ``own`` of it; None: 0."""
    if member is None or all(size == 1 for size in own):
        return None
    if tuple(own) == tuple(batch):
        return member
    total, stride = None, 1
    for size, there in zip(reversed(batch), reversed(own), strict=True):
        divisor = constant(size, member.type)
        digit, member = arith.remsi(member, divisor), arith.divsi(member, divisor)
        if there != 1:
            term = arith.muli(digit, constant(stride, digit.type))
            total = term if total is None else arith.addi(total, term)
            stride *= there
    return total
