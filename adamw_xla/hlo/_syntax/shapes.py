"""The shapes of HLO values: arrays and tuples of them."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math
import re

HOST = 5
"""The memory space that is the host's."""


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of an array.

    Attributes:
      dtype: as HLO writes it, such as ``f32`` or ``pred``.
      dims: the sizes.
      space: the memory space in the layout; 0 is the device's main memory. On TPU 1 is
        VMEM, 2 are flags and 6 is SMEM; 5 is the host.
      tiled: the sizes in the order in which they lie in memory, each rounded up to whole tiles.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    tiled: tuple[int, ...] = dataclasses.field(default=(), compare=False)

    @property
    def elements(self) -> int:
        """How many elements there are."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The elements' bytes; a layout's padding is not counted."""
        return _bytes(self.elements, self.dtype)

    @property
    def padded_bytes(self) -> int:
        """The same with a layout's padding."""
        return _bytes(math.prod(self.tiled or self.dims), self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Tuple:
    """The shape of a tuple."""

    parts: tuple[Shape, ...]


Shape = Array | Tuple


def arrays(shape: Shape) -> Iterator[Array]:
    """All arrays in a shape, in order."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape.parts:
            yield from arrays(part)


def _bytes(elements: int, dtype: str) -> int:
    return -(-elements * _bits(dtype) // 8)


def _bits(dtype: str) -> int:
    """``bf16`` -> 16, ``f8e4m3fn`` -> 8, ``c64`` -> 64; tokens and opaques have none."""
    if dtype == "pred":
        return 8
    digits = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return int(digits[1]) if digits else 0


def read_shape(line: str, at: int) -> tuple[Shape, int]:
    """The shape that begins at ``at``, and where it ends; ValueError if there is none."""
    at = _SPACE.match(line, at).end()  # type: ignore[union-attr]
    if line[at] != "(":
        found = _ARRAY.match(line, at)
        if found is None:
            raise ValueError
        layout, dims = found[3] or "", ints(found[2])
        space = re.search(r"S\((\d+)\)", layout)
        shape = Array(found[1], dims, int(space[1]) if space else 0, _tiled(dims, layout))
        return shape, found.end()
    parts: list[Shape] = []
    at = _SPACE.match(line, at + 1).end()  # type: ignore[union-attr]
    while line[at] != ")":
        part, at = read_shape(line, at)
        parts.append(part)
        at = _SPACE.match(line, at).end()  # type: ignore[union-attr]
    return Tuple(tuple(parts)), at + 1


def _tiled(dims: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """What a layout such as ``{1,0:T(8,128)(2,1)}`` makes of the sizes; () where it has no tiles.

    The first tile pads: those behind it divide it.
    """
    found = re.match(r"\{([\d,]*):T\(([\d,]+)\)", layout)
    if found is None:
        return ()
    order, tile = ints(found[1])[::-1], ints(found[2])
    if sorted(order) != list(range(len(dims))) or 0 in tile:
        raise ValueError
    sizes = [1] * (len(tile) - len(order)) + [dims[number] for number in order]
    whole = len(sizes) - len(tile)
    inner = (-(-size // t) * t for size, t in zip(sizes[whole:], tile, strict=True))
    return (*sizes[:whole], *inner)


def ints(text: str) -> tuple[int, ...]:
    """``3,<=4`` -> ``(3, 4)``: a dynamic dimension is as large as it may get."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"(?:\s|,|/\*[^*]*\*/)*")
