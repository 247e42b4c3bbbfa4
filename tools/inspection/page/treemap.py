"""Boxes in a box, each with the area of its size and as near to a square as may be."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
import dataclasses
import re
from typing import NamedTuple

DEEPEST = 2
"""So many groups stand in one another; what a path has more is the name of its leaf."""

HEAD, GAP = 17.0, 2.0
"""Of a group: what its name takes of its height, and the margin around what is in it."""

SMALLEST_NAMED = (46.0, 36.0)
"""Width and height below which a group has no room for its name."""


class Box(NamedTuple):
    """A rectangle: its upper left corner and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclasses.dataclass(frozen=True)
class Node:
    """A leaf of the tree, or a group of what begins alike.

    Attributes:
      name: what its path has more than its group's.
      size: of a leaf; of a group what is in it, together.
      number: of a leaf, in the order in which they were given; None of a group.
      children: of a group.
    """

    name: str
    size: float
    number: int | None = None
    children: tuple[Node, ...] = ()


class Tile(NamedTuple):
    """A node in its place; groups come before what is in them."""

    node: Node
    box: Box
    named: bool


# --------------------------------------------------------------------------------- the tree

_KEY = re.compile(
    r"""\['((?:[^'\\]|\\.)*)'\] | \["((?:[^"\\]|\\.)*)"\] | \[(\d+)\] | \.?([^.\[]+)""",
    re.VERBOSE,
)


def parts(path: str) -> tuple[str, ...]:
    """``params['h.0.attn'][1].w`` -> params, h, 0, attn, 1, w; what is no path stays whole."""
    found: list[str] = []
    at = 0
    while at < len(path):
        match = _KEY.match(path, at)
        if match is None:
            return (path,)
        key = next(group for group in match.groups() if group is not None)
        is_text = match[1] is not None or match[2] is not None
        found += [part for part in re.split("[./]", key) if part] if is_text else [key]
        at = match.end()
    return tuple(found) or (path,)


def tree(paths: Sequence[str], sizes: Sequence[float]) -> Node:
    """Groups leaves by the beginnings of their paths; what is without size is left out."""
    split = [
        (parts(path), number)
        for number, (path, size) in enumerate(zip(paths, sizes, strict=True))
        if size > 0
    ]
    return _group("", split, sizes, DEEPEST)


def _group(
    name: str, split: list[tuple[tuple[str, ...], int]], sizes: Sequence[float], depth: int
) -> Node:
    shared = _shared([path for path, _ in split])
    name = ".".join(filter(None, [name, *shared]))
    split = [(path[len(shared) :], number) for path, number in split]
    together: dict[Hashable, list[tuple[tuple[str, ...], int]]] = {}
    for path, number in split:
        # A leaf stands by itself, and below the last level all do.
        key: Hashable = path[0] if depth and len(path) > 1 else (number,)
        together.setdefault(key, []).append((path, number))
    children = []
    for key, members in sorted(together.items(), key=lambda item: _natural(item[1][0][0])):
        if len(members) == 1:
            (path, number), *_ = members
            children.append(Node(".".join(path), sizes[number], number))
        else:
            inner = [(path[1:], number) for path, number in members]
            children.append(_group(str(key), inner, sizes, depth - 1))
    return Node(name, sum(child.size for child in children), children=tuple(children))


def _natural(path: tuple[str, ...]) -> list[tuple[int, str]]:
    """Sorts 2 before 10."""
    return [(int(x) if x.isdecimal() else -1, x) for x in path]


def _shared(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    """What all begin with, but for the last part of each."""
    if not paths:
        return ()
    first, last = min(paths), max(paths)
    count = min(map(len, paths)) - 1
    same = (i for i in range(count) if first[i] != last[i])
    return first[: next(same, max(count, 0))]


# ------------------------------------------------------------------------------ the layout


def squarified(sizes: Sequence[float], box: Box) -> list[Box]:
    """A box for each size, in the order of the sizes; together they fill ``box``.

    By Bruls, Huizing and van Wijk, *Squarified Treemaps* (2000): rows along the shorter side, each
    closed where one more would make its worst box longer.

    Args:
      sizes: of any unit; those of nothing get a box without area.
      box: to fill.
    """
    total = sum(sizes)
    if total <= 0:
        return [Box(box.x, box.y, 0.0, 0.0) for _ in sizes]
    scale = box.width * box.height / total
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    found = [Box(box.x, box.y, 0.0, 0.0)] * len(sizes)
    at, rest = 0, box
    while at < len(order):
        side = min(rest.width, rest.height)
        end, area = at + 1, sizes[order[at]] * scale
        worst = _worst(area, area, area, side)
        while end < len(order):
            more = area + sizes[order[end]] * scale
            longest = _worst(sizes[order[at]] * scale, sizes[order[end]] * scale, more, side)
            if longest > worst:
                break
            worst, area, end = longest, more, end + 1
        row = [sizes[i] * scale for i in order[at:end]]
        placed, rest = _row(row, area, rest)
        for i, one in zip(order[at:end], placed, strict=True):
            found[i] = one
        at = end
    return found


def _worst(largest: float, smallest: float, area: float, side: float) -> float:
    """How many times as long as wide the worst box of a row is."""
    if smallest <= 0 or side <= 0:
        return float("inf")
    return max(side**2 * largest / area**2, area**2 / (side**2 * smallest))


def _row(areas: Sequence[float], area: float, box: Box) -> tuple[list[Box], Box]:
    """Boxes along the shorter side of ``box``, and what is left of it."""
    side = min(box.width, box.height)
    depth = min(area / side, max(box.width, box.height)) if side > 0 else 0.0
    found, along = [], 0.0
    for each in areas:
        length = each / depth if depth > 0 else 0.0
        if box.width >= box.height:
            found.append(Box(box.x, box.y + along, depth, length))
        else:
            found.append(Box(box.x + along, box.y, length, depth))
        along += length
    if box.width >= box.height:
        return found, Box(box.x + depth, box.y, box.width - depth, box.height)
    return found, Box(box.x, box.y + depth, box.width, box.height - depth)


def tiles(root: Node, box: Box) -> Iterator[Tile]:
    """Places all that is below ``root``, which itself has no box."""
    boxes = squarified([child.size for child in root.children], box)
    for child, place in zip(root.children, boxes, strict=True):
        room = place.width >= SMALLEST_NAMED[0] and place.height >= SMALLEST_NAMED[1]
        yield Tile(child, place, named=room)
        if child.children:
            yield from tiles(child, _inside(place, HEAD if room else GAP))


def _inside(box: Box, head: float) -> Box:
    gap = GAP if min(box.width, box.height) > 4 * GAP else 0.0
    head = head if box.height > 2 * head else gap
    return Box(
        box.x + gap,
        box.y + head,
        max(box.width - 2 * gap, 0.0),
        max(box.height - head - gap, 0.0),
    )
