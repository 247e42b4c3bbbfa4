"""The update, and the norm, of a whole tree as one Triton-dialect kernel each.

A program (a block of threads) looks for its work in a balanced tree of branches on its
number. The branches yield *pointers*, so the body that reads and writes through them
stands once however many leaves there are; one body per leaf would take a minute to
compile. Leaves of the same dtypes share a body; those of other dtypes have one in
another branch of the same kernel.

Accesses of 128 bits need more than aligned pointers: the compiler must see that a mask
does not cut one in two. A leaf is therefore cut into as many elements as a multiple of
``UNIT`` has, whose count is given in units, and at most 15 that follow, which are the
work of another body.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import itertools
import math
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf
from jax.extend.mlir.dialects import math as math_dialect
from jax.interpreters import mlir
import numpy as np

from . import arithmetic
from .contract import UPDATE_NAME, Slot, UpdateSpec, compute_dtype, join_leaves
from .gpu_call import Kernel, build, tt

UNIT = 16
"""Elements: 128 bits of the narrowest dtype are 8."""

NORM_NAME = "adamw_sum_of_squares"


@dataclasses.dataclass(frozen=True)
class Launch:
    """The shape of a launch: elements per program, and warps that share them."""

    block: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """What leaves must have in common to share a body.

    Attributes:
      operands: their dtypes.
      results: likewise.
      batch: the sizes of the batch in front of every result.
      operand_batches: those of each operand; 1 where it does not vary.
    """

    operands: tuple[np.dtype, ...]
    results: tuple[np.dtype, ...]
    batch: tuple[int, ...] = ()
    operand_batches: tuple[tuple[int, ...], ...] = ()

    @property
    def members(self) -> int:
        """How many updates of the leaf there are."""
        return math.prod(self.batch)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf as the kernel sees it: ``size`` elements for each member of the batch."""

    kind: Kind
    size: int
    group: int = 0
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """Elements ``start : start + length`` of each member of a leaf, and who works on them."""

    leaf: int
    size: int
    start: int
    length: int
    first: int
    group: int
    index: int


@dataclasses.dataclass(frozen=True)
class Section:
    """Pieces that share a body; their lengths, starts and sizes are multiples of ``unit``."""

    kind: Kind
    unit: int
    block: int
    pieces: tuple[Piece, ...]
    end: int

    @property
    def first(self) -> int:
        """The number of the first program."""
        return self.pieces[0].first


def cut(leaves: Sequence[Leaf], block: int, span: int = 1) -> list[Section]:
    """Cuts leaves into pieces, and numbers their programs.

    Args:
      leaves: none of them empty.
      block: elements that a program treats at once.
      span: how many such blocks each program walks.
    """
    found: dict[tuple[Kind, int, int], list[tuple[int, int, int]]] = {}
    for i, leaf in enumerate(leaves):
        whole = leaf.size // UNIT * UNIT
        if leaf.kind.members > 1 and whole != leaf.size:
            # Most members start where accesses are not aligned.
            found.setdefault((leaf.kind, 1, block), []).append((i, 0, leaf.size))
            continue
        if whole:
            found.setdefault((leaf.kind, UNIT, block), []).append((i, 0, whole))
        if whole != leaf.size:
            found.setdefault((leaf.kind, 1, UNIT), []).append((i, whole, leaf.size - whole))
    sections = []
    program = 0
    for (kind, unit, width), parts in found.items():
        pieces = []
        for i, start, length in parts:
            leaf = leaves[i]
            pieces.append(Piece(i, leaf.size, start, length, program, leaf.group, leaf.index))
            program += kind.members * -(-length // (width * span))
        sections.append(Section(kind, unit, width, tuple(pieces), program))
    return sections


# ---------------------------------------------------------------------------- the kernels


def update_kernel(
    spec: UpdateSpec,
    leaves: Sequence[Leaf],
    scalars: Sequence[tuple[tuple[int, ...], Any]],
    launch: Launch,
) -> Kernel:
    """The update of ``leaves``: parameters are hyper, leaf_scale, operands, results.

    Args:
      spec: what kind of update it is.
      leaves: none of them empty.
      scalars: shape and dtype of hyper, and of leaf_scale.
      launch: the launch's shape.
    """
    sections = cut(leaves, launch.block)
    n, first = len(leaves), len(scalars)

    def body(args: Sequence[ir.Value]) -> None:
        columns = [args[i : i + n] for i in range(first, len(args), n)]
        shapes = [tuple(shape) for shape, _ in scalars]
        update = _Update(spec, shapes, args[:first], columns)
        _for_each_section(sections, update.body)

    pointers = [dtype for _, dtype in scalars]
    pointers += join_leaves([(*leaf.kind.operands, *leaf.kind.results) for leaf in leaves])
    return build(f"{UPDATE_NAME}_kernel", pointers, body, sections[-1].end, launch.num_warps)


def norm_kernel(leaves: Sequence[Leaf], scale_dtype: Any, launch: Launch, span: int) -> Kernel:
    """Partial sums of ``(scale * x)**2``: parameters are scale, leaves, one sum per program.

    Args:
      leaves: none of them empty, each of one operand and no batch.
      scale_dtype: the dtype of the arithmetic and of the sums.
      launch: the launch's shape.
      span: how many blocks each program walks.
    """
    sections = cut(leaves, launch.block, span)

    def body(args: Sequence[ir.Value]) -> None:
        norm = _Norm(args[0], args[1:-1], args[-1], np.dtype(scale_dtype), span)
        _for_each_section(sections, norm.body)

    pointers = [scale_dtype, *(leaf.kind.operands[0] for leaf in leaves), scale_dtype]
    return build(f"{NORM_NAME}_kernel", pointers, body, sections[-1].end, launch.num_warps)


@dataclasses.dataclass(frozen=True)
class _Update:
    """The parameters of the update's kernel."""

    spec: UpdateSpec
    shapes: Sequence[tuple[int, ...]]
    scalars: Sequence[ir.Value]
    columns: Sequence[Sequence[ir.Value]]

    def body(self, section: Section, program: ir.Value) -> None:
        """What a program does with its block of some leaf."""
        spec, kind = self.spec, section.kind
        work = _find(section, program, self.columns)
        block, member = work.block_and_member()
        base = work.base(block)
        mask = work.mask(base)
        ops = _Ops(section.block, mlir.dtype_to_ir_type(compute_dtype(kind.operands[0])))
        stored: dict[str, ir.Value] = {}
        for i, name in enumerate(spec.operand_kinds):
            own = kind.operand_batches[i] if kind.batch else ()
            at = work.pointers(i, base, _member_of(kind.batch, own, member))
            stored[name] = tt.load(at, mask=mask)
        row = self._place(0, work.group, kind, member)
        row = arith.muli(row, _constant(self.shapes[0][-1], row.type))
        slot = _Slots(ops, self.scalars[0], row)
        x = {name: ops.convert(value) for name, value in stored.items()}
        new = arithmetic.update(ops, spec, slot, ops.is_set, x, self._scales(ops, work, member))
        for i, name in enumerate(spec.result_kinds):
            value = _convert(new[name], mlir.dtype_to_ir_type(kind.results[i]))
            if spec.skip:
                value = arith.select(ops.is_set(slot(Slot.APPLY)), value, stored[name])
            tt.store(work.pointers(len(kind.operands) + i, base, member), value, mask=mask)

    def _place(self, scalar: int, index: ir.Value, kind: Kind, member: Any) -> ir.Value:
        """``index`` in the scalar's dimension behind the batch, in that of the member."""
        rank = len(kind.batch)
        shape = self.shapes[scalar]
        own = _member_of(kind.batch, shape[:rank], member)
        if own is None:
            return index
        length = shape[rank] if rank else shape[0]
        return arith.addi(index, arith.muli(own, _constant(length, own.type)))

    def _scales(self, ops: "_Ops", work: "_Work", member: Any) -> Iterable[ir.Value]:
        if self.spec.leaf_scale:
            place = self._place(1, work.index, work.section.kind, member)
            yield ops.splat(_convert(_load_scalar(self.scalars[1], place), ops.dtype))


@dataclasses.dataclass(frozen=True)
class _Slots:
    """The columns of one row of hyper, each spread over the block."""

    ops: "_Ops"
    hyper: ir.Value
    row: ir.Value
    known: dict[Slot, ir.Value] = dataclasses.field(default_factory=dict)

    def __call__(self, slot: Slot) -> ir.Value:
        if slot not in self.known:
            at = arith.addi(self.row, _constant(int(slot), self.row.type))
            value = _convert(_load_scalar(self.hyper, at), self.ops.dtype)
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
        work = _find(section, program, [self.leaves])
        ops = _Ops(section.block, mlir.dtype_to_ir_type(self.dtype))
        scale = ops.splat(tt.load(self.scale))
        i32 = ir.IntegerType.get_signless(32)
        first = arith.muli(work.local, _constant(self.span, i32))
        low, high, one = (_constant(x, i32) for x in (0, self.span, 1))
        loop = scf.ForOp(low, high, one, [ops.constant(0.0)])
        with ir.InsertionPoint(loop.body):
            base = work.base(arith.addi(first, loop.induction_variable))
            mask = work.mask(base)
            at = work.pointers(0, base, None)
            stored = mlir.dtype_to_ir_type(section.kind.operands[0])
            zero = _splat_constant(section.block, stored, 0.0)
            x = ops.multiply(ops.convert(tt.load(at, mask=mask, other=zero)), scale)
            scf.yield_([ops.add(loop.inner_iter_args[0], ops.multiply(x, x))])
        total = tt.ReduceOp([loop.results[0]], 0)
        combine = total.regions[0].blocks.append(ops.dtype, ops.dtype)
        with ir.InsertionPoint(combine):
            tt.reduce_return([arith.addf(*combine.arguments)])
        tt.store(_add(self.sums, program), total.result[0])


# -------------------------------------------------------------------- who works on what


@dataclasses.dataclass(frozen=True)
class _Work:
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
        last = arith.addi(self.length, _constant(block - 1, i64))
        blocks = arith.trunci(self.local.type, arith.divsi(last, _constant(block, i64)))
        return arith.remsi(self.local, blocks), arith.divsi(self.local, blocks)

    def base(self, block: ir.Value) -> ir.Value:
        """The number of the block's first element, counted from the piece's."""
        i64 = self.length.type
        return arith.muli(arith.extsi(i64, block), _constant(self.section.block, i64))

    def mask(self, base: ir.Value) -> ir.Value:
        """Which elements of the block the piece has."""
        width, i64 = self.section.block, self.length.type
        wide = ir.RankedTensorType.get([width], i64)
        element = arith.addi(tt.splat(wide, base), arith.extsi(wide, _range(width)))
        return arith.cmpi(arith.CmpIPredicate.slt, element, tt.splat(wide, self.length))

    def pointers(self, column: int, base: ir.Value, member: ir.Value | None) -> ir.Value:
        """Pointers to the block's elements in one column, for a member of the batch."""
        offset = arith.addi(base, self.start)
        if member is not None:
            member = arith.extsi(self.size.type, member)
            offset = arith.addi(offset, arith.muli(member, self.size))
        first = _add(self.columns[column], offset)
        width = self.section.block
        return _add(tt.splat(ir.RankedTensorType.get([width], first.type), first), _range(width))


def _for_each_section(
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


def _find(section: Section, program: ir.Value, columns: Sequence[Sequence[ir.Value]]) -> _Work:
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
        next(rest) if vary else _constant(number, kind)
        for vary, number, kind in zip(varies, numbers[0], types, strict=True)
    )
    unit = _constant(section.unit, i64)
    length, start, size = (arith.muli(x, unit) for x in (length, start, size))
    return _Work(section, pointers, arith.subi(program, first), length, start, size, group, index)


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
            values = map(_constant, numbers, kinds)
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
    unused = _constant(0, kind)
    return tt.elementwise_inline_asm([kind], f"mov.u32 $0, {number};", "=r,r", False, 1, [unused])


def _is_before(program: ir.Value, first: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, program, _constant(first, program.type))


def _member_of(batch: Sequence[int], own: Sequence[int], member: Any) -> Any:
    """A member of the whole batch -> that of an operand that has ``own`` of it; None: 0."""
    if member is None or all(size == 1 for size in own):
        return None
    if tuple(own) == tuple(batch):
        return member
    total, stride = None, 1
    for size, there in zip(reversed(batch), reversed(own), strict=True):
        constant = _constant(size, member.type)
        digit, member = arith.remsi(member, constant), arith.divsi(member, constant)
        if there != 1:
            term = arith.muli(digit, _constant(stride, digit.type))
            total = term if total is None else arith.addi(total, term)
            stride *= there
    return total


# ------------------------------------------------------------------------- operations


@dataclasses.dataclass(frozen=True)
class _Ops:
    """``arithmetic.Ops`` on blocks of one width and dtype."""

    width: int
    dtype: ir.Type

    @property
    def is_wide(self) -> bool:
        """Whether it is float64."""
        return self.dtype == ir.F64Type.get()

    def splat(self, x: ir.Value) -> ir.Value:
        """A scalar, spread over the block."""
        return tt.splat(ir.RankedTensorType.get([self.width], x.type), x)

    def convert(self, x: ir.Value) -> ir.Value:
        """A block of another dtype."""
        return _convert(x, self.dtype)

    def constant(self, number: float) -> ir.Value:
        """One number everywhere."""
        return _splat_constant(self.width, self.dtype, number)

    def is_set(self, flag: ir.Value) -> ir.Value:
        """Where a flag is not 0; NaN is not 0."""
        return arith.cmpf(arith.CmpFPredicate.UNE, flag, self.constant(0.0))

    add = staticmethod(arith.addf)
    subtract = staticmethod(arith.subf)
    multiply = staticmethod(arith.mulf)
    negate = staticmethod(arith.negf)
    select = staticmethod(arith.select)
    maximum = staticmethod(arith.maximumf)  # a NaN stays one

    def divide(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Rounded correctly, which ``arith.divf`` is not in float32."""
        return arith.divf(a, b) if self.is_wide else tt.precise_divf(a, b)

    def sqrt(self, x: ir.Value) -> ir.Value:
        """Rounded correctly."""
        return math_dialect.sqrt(x) if self.is_wide else tt.precise_sqrt(x)

    def clamp(self, low: ir.Value, x: ir.Value, high: ir.Value) -> ir.Value:
        """``x`` within bounds; a NaN stays one."""
        return arith.minimumf(arith.maximumf(x, low), high)


def _convert(x: ir.Value, dtype: ir.Type) -> ir.Value:
    """``x``, a scalar or a block, in another float dtype."""
    shaped = isinstance(x.type, ir.RankedTensorType)
    own = ir.RankedTensorType(x.type).element_type if shaped else x.type
    if own == dtype:
        return x
    target = ir.RankedTensorType.get(ir.RankedTensorType(x.type).shape, dtype) if shaped else dtype
    return (arith.extf if dtype.width > own.width else arith.truncf)(target, x)


def _load_scalar(pointer: ir.Value, index: ir.Value) -> ir.Value:
    return tt.load(_add(pointer, index))


def _add(pointer: ir.Value, offset: ir.Value) -> ir.Value:
    return tt.addptr(pointer.type, pointer, offset)


def _range(width: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return tt.make_range(ir.RankedTensorType.get([width], i32), 0, width)


def _constant(number: int, kind: ir.Type) -> ir.Value:
    return arith.constant(kind, ir.IntegerAttr.get(kind, number))


def _splat_constant(width: int, dtype: ir.Type, number: float) -> ir.Value:
    kind = ir.RankedTensorType.get([width], dtype)
    attribute = ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(dtype, number))
    return arith.constant(kind, attribute)
