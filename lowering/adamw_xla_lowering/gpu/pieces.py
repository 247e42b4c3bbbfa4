"""How a tree's leaves are cut up among the programs of one GPU kernel.

Accesses of 128 bits need more than aligned pointers: the compiler must see that a mask
does not cut one in two. A leaf is therefore cut into as many elements as a multiple of
``UNIT`` has, whose count is given in units, and at most 15 that follow, which are the
work of another body.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

UNIT = 16
"""Elements: 128 bits of the narrowest dtype are 8."""


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
