"""The tree of the params as a map: areas are bytes, colours say where each leaf landed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
import dataclasses
from html import escape
from typing import NamedTuple
from urllib.parse import quote

from inspection.inspect_cases import Inspected
from inspection.page import treemap
from inspection.page.leaf_facts import LeafFacts
from inspection.page.markup import address, link

from adamw_xla.hlo import Leaf, Report, size

COLOURS = 8
"""So many categories have a colour of their own, in the style sheet ``--0`` to ``--7``."""

NOTABLE = 0.02
"""Share of the bytes from which on a leaf that is alone in its kernel has a colour of its own."""

LINE = 13.0
"""Height of one, in pixels."""

LETTER = 6.4
"""Width of one, in pixels, at the size of the names on the map."""


class _Layout(NamedTuple):
    """For a range of widths of the screen.

    Attributes:
      name: of its class in the style sheet, which says which is shown.
      width: that boxes are laid out for; they stretch with the screen.
      height: that it has on the screen.
      narrowest: the least width that it is shown at.
    """

    name: str
    width: float
    height: float
    narrowest: float


_LAYOUTS = (_Layout("wide", 1344, 600, 848), _Layout("narrow", 420, 640, 312))
_HALVES = (_Layout("wide", 660, 480, 416), _Layout("narrow", 420, 480, 312))


@dataclasses.dataclass(frozen=True)
class _Colouring:
    """One way to colour the leaves.

    Attributes:
      name: of its radio button, and of the class that shows it: what is coloured by.
      colours: of each leaf the number of its colour.
      legend: number of the colour and what it stands for, as HTML.
    """

    name: str
    colours: Sequence[int]
    legend: Sequence[tuple[int, str]]


NOT_KNOWN = "no kernel that is known"

REST, OWN = COLOURS, COLOURS + 1
"""Colours of what has none of its own, and of leaves that share a kernel with no other."""

STYLE = "".join(
    f".map:has([value={name}]:checked) a rect{{fill:var(--{name})}}"
    f".map:has([value={name}]:checked) .of-{name}{{display:flex}}"
    + "".join(f".{name[0]}{i}{{--{name}:var(--{i})}}" for i in range(OWN + 1))
    for name in ("kernel", "collective", "sharding")
)
"""Which colour a leaf has, in each way; without a script."""


def leaf_map(x: Inspected, name: str = "map", file: str = "", halved: bool = False) -> str:
    """The map with its legend and the switch of its colours; a sentence where there is none.

    Args:
      x: whose leaves.
      name: prefix of ids.
      file: the page where its kernels are listed; empty for this one.
      halved: whether two maps stand side by side.
    """
    report, facts = x.report, LeafFacts(x.report)
    sizes = [facts.bytes_of(leaf) for leaf in report.leaves]
    if not sum(sizes):
        return (
            '<p class="none">There is no map: which arguments are params is not known of this '
            "program.</p>"
        )
    colourings = list(_colourings(facts, sizes, file))
    titles = [
        _title(facts, leaf, number) for leaf, number in zip(report.leaves, sizes, strict=True)
    ]
    drawn = "".join(
        _drawn(report, layout, sizes, titles, colourings, file)
        for layout in (_HALVES if halved else _LAYOUTS)
    )
    radios = "".join(
        f'<label><input type="radio" name="{name}-colour" value="{c.name}"'
        f"{' checked' * (not i)}>by {c.name}</label>"
        for i, c in enumerate(colourings)
    )
    legends = "".join(_legend(c) for c in colourings)
    hidden = " hidden" * (len(colourings) == 1)
    return (
        f'<div class="map" id="{name}"><fieldset{hidden}><legend>Colours</legend>{radios}'
        f"</fieldset>{drawn}{legends}</div>"
    )


# --------------------------------------------------------------------------------- colours


def _colourings(facts: LeafFacts, sizes: Sequence[int], file: str) -> Iterator[_Colouring]:
    report = facts.report
    yield _by_kernel(report, sizes, file)
    if report.collectives:
        said = [facts.exchanges(leaf) for leaf in report.leaves]
        yield _by_words("collective", said, sizes, "not exchanged")
    if report.devices > 1:
        said = [facts.cut(leaf) for leaf in report.leaves]
        yield _by_words("sharding", said, sizes, "not known")


def _by_kernel(report: Report, sizes: Sequence[int], file: str) -> _Colouring:
    """The kernels of most bytes have a colour each: of several leaves, or of a large one."""
    leaves = Counter(leaf.kernels for leaf in report.leaves)
    weights: Counter[tuple[str, ...]] = Counter()
    for leaf, number in zip(report.leaves, sizes, strict=True):
        weights[leaf.kernels] += number
    least = 0 if len(weights) <= COLOURS else NOTABLE * sum(sizes)
    named = [x for x, n in weights.most_common() if leaves[x] > 1 or n >= least][:COLOURS]
    colours = {kernels: i for i, kernels in enumerate(named)}
    own = {kernels for kernels in weights if leaves[kernels] == 1} - {*named}
    others = weights.keys() - own - {*named}
    legend = []
    for kernels, i in colours.items():
        shown = ", ".join(link(address(kernel=name, file=file), name) for name in kernels[:2])
        more = f" and {len(kernels) - 2} more" if len(kernels) > 2 else ""
        legend.append((i, f"{shown or NOT_KNOWN}{more}, {_leaves(leaves[kernels])}"))
    if others:
        count = sum(leaves[kernels] for kernels in others)
        legend.append((REST, f"{len(others)} more kernels, {_leaves(count)}"))
    if own:
        legend.append((OWN, f"a kernel of its own, {_leaves(len(own))}"))
    of = [colours.get(x.kernels, OWN if x.kernels in own else REST) for x in report.leaves]
    return _Colouring("kernel", of, legend)


def _by_words(name: str, found: Sequence[str], sizes: Sequence[int], nothing: str) -> _Colouring:
    """What is said of most bytes has a colour each; ``nothing`` stands for an empty text."""
    weights: Counter[str] = Counter()
    for text, number in zip(found, sizes, strict=True):
        weights[text] += number
    texts = [text for text, _ in weights.most_common() if text]
    colours = {text: i for i, text in enumerate(texts[:COLOURS])}
    counts = Counter(found)
    legend = [(i, f"{escape(text)}, {_leaves(counts[text])}") for text, i in colours.items()]
    if rest := sum(counts[text] for text in texts[COLOURS:]):
        legend.append((REST, f"other, {_leaves(rest)}"))
    if counts[""]:
        legend.append((OWN, f"{nothing}, {_leaves(counts[''])}"))
    of = [colours.get(text, REST if text else OWN) for text in found]
    return _Colouring(name, of, legend)


def _leaves(count: int) -> str:
    return f"{count} leaf" if count == 1 else f"{count} leaves"


def _legend(colouring: _Colouring) -> str:
    entries = "".join(
        f'<li><i style="background:var(--{i})"></i><span>{text}</span></li>'
        for i, text in colouring.legend
    )
    return f'<ul class="legend of-{colouring.name}">{entries}</ul>'


# --------------------------------------------------------------------------------- drawing


def _title(facts: LeafFacts, leaf: Leaf, number_of_bytes: int) -> str:
    """What is said of a leaf: path and shape, bytes, where it landed, how it is cut."""
    report = facts.report
    on = " on each device" if report.devices > 1 else ""
    said = [f"{leaf.name}  {leaf.shape}", f"{size(number_of_bytes)}{on}, with its state"]
    said.append(f"lands in {', '.join(leaf.kernels) or NOT_KNOWN}")
    if exchanged := facts.exchanges(leaf):
        said.append(exchanged)
    if report.devices > 1 and (where := facts.cut(leaf)):
        said.append(where)
    if not leaf.in_place:
        said.append("its state is not updated in place")
    return "\n".join(said)


def _drawn(
    report: Report,
    layout: _Layout,
    sizes: Sequence[int],
    titles: Sequence[str],
    colourings: Sequence[_Colouring],
    file: str,
) -> str:
    root = treemap.tree([leaf.name for leaf in report.leaves], sizes)
    box = treemap.Box(0.0, 0.0, layout.width, layout.height)
    found = []
    for tile in treemap.tiles(root, box):
        number = tile.node.number
        if number is None:
            found.append(_framed(tile, layout))
            continue
        leaf = report.leaves[number]
        marks = " ".join(f"{c.name[0]}{c.colours[number]}" for c in colourings)
        to = address(kernel=leaf.kernels[0], file=file) if leaf.kernels else f"{quote(file)}#params"
        found.append(
            f'<a href="{escape(to)}" class="{marks}"><title>{escape(titles[number])}</title>'
            f"{_box(tile.box, layout)}{_rectangle(tile, layout, sizes[number])}</svg></a>"
        )
    about = f"{len(report.leaves)} leaves by their bytes, {size(sum(sizes))} in all"
    return (
        f'<svg class="{layout.name}" height="{layout.height:g}" role="group" '
        f'aria-label="{about}">{"".join(found)}</svg>'
    )


def _box(box: treemap.Box, layout: _Layout) -> str:
    """The beginning of an ``svg`` that is as wide as its share of the screen, and cuts off."""
    return (
        f'<svg x="{100 * box.x / layout.width:.3f}%" y="{box.y:.1f}" '
        f'width="{100 * box.width / layout.width:.3f}%" height="{box.height:.2f}">'
    )


def _rectangle(tile: treemap.Tile, layout: _Layout, number_of_bytes: int) -> str:
    """A box with as many lines of its name as have room, and then its bytes."""
    lines = int((tile.box.height - 3) / LINE)
    texts = [(text, "") for text in _wrapped(tile.node.name, tile.box, layout)[: max(lines, 0)]]
    text = size(number_of_bytes)
    if texts and len(texts) < lines and len(text) <= _room(tile.box, layout):
        texts.append((text, ' class="z"'))
    drawn = (
        f'<text x="4" y="{LINE * n:g}"{mark}>{escape(text)}</text>'
        for n, (text, mark) in enumerate(texts, start=1)
    )
    return f'<rect width="100%" height="100%"/>{"".join(drawn)}'


def _framed(tile: treemap.Tile, layout: _Layout) -> str:
    text = ""
    if tile.named and (lines := _wrapped(tile.node.name, tile.box, layout)):
        text = f'<text x="4" y="12.5">{escape(lines[0])}</text>'
    box = _box(tile.box, layout)
    return f'<g class="g">{box}<rect width="100%" height="100%"/>{text}</svg></g>'


def _room(box: treemap.Box, layout: _Layout) -> int:
    """So many letters have room in a line where the map is narrowest."""
    return int((box.width * layout.narrowest / layout.width - 6) / LETTER)


def _wrapped(name: str, box: treemap.Box, layout: _Layout) -> list[str]:
    """A name in lines, broken at its dots; none where there is no room."""
    room = _room(box, layout)
    if room < 3:
        return []
    first, *rest = name.split(".")
    lines = [first]
    for part in rest:
        if len(lines[-1]) + 1 + len(part) > room:
            lines.append(part)
        else:
            lines[-1] += f".{part}"
    ends = "\N{HORIZONTAL ELLIPSIS}"
    return [line if len(line) <= room else line[: room - 1] + ends for line in lines]
