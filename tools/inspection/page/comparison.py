"""The page of several programs for one target, side by side; what differs is marked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from html import escape
from typing import Generic, TypeVar

from inspection import tables
from inspection.inspect_cases import Inspected
from inspection.page import document, leaf_map, listings, markup
from inspection.page.markup import Column, Row, address, link, number, sized, words

from adamw_xla.hlo import Collective, Kernel, size

T = TypeVar("T", Kernel, Collective)

DIFFERS = {"class": "differs"}


def page(found: Sequence[Inspected]) -> str:
    """The whole page; beside it stand those of each program, to which it links."""
    names = " and ".join(x.name for x in found)
    title = f"{names} on {found[0].target}"
    links = ", ".join(link(f"{_file(x)}", x.name) for x in found)
    head = (
        f"<h1>{escape(names)} <small>on {escape(found[0].target)}</small></h1>"
        "<p>Compiled, not run. Rows that differ are marked; changes are since "
        f"{escape(found[0].name)}. {escape(document.bound(found[0]))}</p>"
        f"<p>Each by itself: {links}.</p>"
    )
    shown = {
        "figures": ("Figures", _figures(found)),
        "params": ("Params", _maps(found)),
        "collectives": ("Collectives", _COLLECTIVES.drawn(found)),
        "kernels": ("Kernels", _KERNELS.drawn(found)),
    }
    places = "".join(link(f"#{name}", title) for name, (title, text) in shown.items() if text)
    body = "".join(document.section(name, *x) for name, x in shown.items() if x[1])
    return document.whole(title, f"{head}<nav>{places}</nav>{body}")


def _file(x: Inspected) -> str:
    return f"{document.stem(x)}.html"


def _figures(found: Sequence[Inspected]) -> str:
    """The table that the tool prints, with what changed since the first beside each."""
    rows = []
    for label, (first, *rest) in tables.rows(found, compared=True).items():
        if label == "by kind":
            rows += _kinds(found)
        elif any([first, *rest]):
            differs = label not in tables.OF_THIS_RUN and any([*rest[1::2], *_others(first, rest)])
            cells = [words(label), *(_shown(text) for text in [first, *rest])]
            rows.append(Row(cells, DIFFERS if differs else {}))
    return markup.table("figures", _columns(found), rows)


def _others(first: str, rest: Sequence[str]) -> list[str]:
    return [text for text in rest[::2] if text != first]


def _kinds(found: Sequence[Inspected]) -> list[Row]:
    """How many kernels of each kind."""
    counts = [x.report.program.by_kind for x in found]
    rows = []
    for kind in dict.fromkeys(kind for of_one in counts for kind in of_one):
        first, *rest = (of_one.get(kind, 0) for of_one in counts)
        cells = [words(f"of kind {kind}"), number(first)]
        for count in rest:
            cells += [number(count), number(count - first, f"{count - first:+,}")]
            if count == first:
                cells[-1] = markup.NOTHING
        rows.append(Row(cells, DIFFERS if {first} != {first, *rest} else {}))
    return rows


def _shown(text: str) -> str:
    return f'<td class="n">{escape(text)}</td>'


def _columns(found: Sequence[Inspected]) -> list[Column]:
    columns = [Column("figure", width=130), Column(found[0].name, "", "n")]
    for x in found[1:]:
        columns += [Column(x.name, "", "n"), Column("change", f"Since {found[0].name}", "n")]
    return columns


def _maps(found: Sequence[Inspected]) -> str:
    if not any(x.report.leaves for x in found):
        return ""
    maps = "".join(
        f"<div><h3>{escape(x.name)}</h3>"
        f"{leaf_map.leaf_map(x, f'map-{n}', _file(x), halved=True)}</div>"
        for n, x in enumerate(found, start=1)
    )
    return f'<div class="pair">{maps}</div>'


# ------------------------------------------------------------------------ kernels, collectives


@dataclasses.dataclass(frozen=True)
class _Table(Generic[T]):
    """A table of what programs have of some kind, where rows are what is alike in them.

    Attributes:
      name: of the table.
      keys: columns of what is alike; of the first two are the filter's choices.
      of: all that a program has.
      key: what is alike, as words.
      weigh: bytes of some of them, in a step.
      opening: the cells of a key.
      timed: whether their bytes go through the main memory, and take time there.
    """

    name: str
    keys: Sequence[Column]
    of: Callable[[Inspected], Sequence[T]]
    key: Callable[[T], tuple[str, ...]]
    weigh: Callable[[Sequence[T]], int]
    opening: Callable[[tuple[str, ...]], list[str]]
    timed: bool

    def columns(self, found: Sequence[Inspected]) -> list[Column]:
        columns = list(self.keys)
        for i, x in enumerate(found):
            columns += [Column("count", "", "n", x.name), Column("bytes", "In a step", "n", x.name)]
            if self.timed:
                columns.append(Column("at least", "A lower bound of their time", "n", x.name, 88))
            if i:
                about = f"Of bytes, since {found[0].name}"
                columns.append(Column("change", about, "n", x.name, width=120))
        return columns

    def drawn(self, found: Sequence[Inspected]) -> str:
        """The table; empty where no program has any."""
        groups = [self._groups(x) for x in found]
        keys = list(dict.fromkeys(key for group in groups for key in group))
        if not keys:
            return ""
        rows = {key: self._row(found, groups, key) for key in keys}

        def place(key: tuple[str, ...]) -> tuple[bool, int]:
            heaviest = max(self.weigh(group.get(key, [])) for group in groups)
            return "class" not in rows[key].attributes, -heaviest

        names = [column.head for column in self.keys[:2]]
        chosen = {name: {key[i]: key[i] for key in keys} for i, name in enumerate(names)}
        chosen["rows"] = {"differ": "that differ"}
        form = listings.filter_form(self.name, "name", chosen)
        return form + markup.table(
            self.name, self.columns(found), [rows[key] for key in sorted(keys, key=place)]
        )

    def _groups(self, x: Inspected) -> dict[tuple[str, ...], list[T]]:
        groups: dict[tuple[str, ...], list[T]] = {}
        for one in self.of(x):
            groups.setdefault(self.key(one), []).append(one)
        return groups

    def _row(
        self,
        found: Sequence[Inspected],
        groups: Sequence[Mapping[tuple[str, ...], Sequence[T]]],
        key: tuple[str, ...],
    ) -> Row:
        cells, first = self.opening(key), self.weigh(groups[0].get(key, []))
        figures = []
        for i, (x, group) in enumerate(zip(found, groups, strict=True)):
            members = group.get(key, [])
            moved = self.weigh(members)
            figures.append((len(members), moved))
            cells += [_count(members, _file(x)), sized(moved, tables.is_least(members))]
            if self.timed:
                cells.append(listings.least(x, moved))
            if i:
                cells.append(_change(first, moved))
        differs = len(set(figures)) > 1
        attributes = {f"data-{c.head}": key[i] for i, c in enumerate(self.keys[:2])}
        return Row(cells, attributes | (DIFFERS | {"data-rows": "differ"} if differs else {}))


def _count(members: Sequence[T], file: str) -> str:
    """How many there are; of one kernel, a link to it."""
    if len(members) == 1 and isinstance(members[0], Kernel):
        to = link(address(kernel=members[0].name, file=file), "1")
        return f'<td class="n" data-v="1">{to}</td>'
    return number(len(members)) if members else NONE


NONE = '<td class="n" data-v="0">\N{EN DASH}</td>'


def _change(old: int, new: int) -> str:
    if old == new:
        return '<td class="n" data-v="0"></td>'
    sign = "+" if new > old else "\N{MINUS SIGN}"
    percent = f" ({new / old - 1:+.1%})" if old else ""
    return number(new - old, f"{sign}{size(abs(new - old))}{percent}")


def _part(part: str) -> str:
    return f'<td><span class="part {part}">{escape(part)}</span></td>'


def _causes(collective: Collective) -> str:
    """Whose it is; XLA joins exchanges, so it may be several's."""
    return " and ".join(listings.PARTS[x] for x in listings.PARTS if x in collective.bytes_of)


_KERNELS = _Table[Kernel](
    name="kernels",
    keys=(Column("part"), Column("kind"), Column("op_name", "JAX's name stack", "s")),
    of=lambda x: x.report.program.kernels,
    key=lambda k: (listings.PARTS[k.part], k.kind, k.op_name),
    weigh=lambda group: sum(map(tables.bytes_of, group)),
    opening=lambda key: [_part(key[0]), words(key[1]), markup.scrolled(escape(key[2]))],
    timed=True,
)
_COLLECTIVES = _Table[Collective](
    name="collectives",
    keys=(Column("kind"), Column("cause", "Whose work it is"), Column("bytes each", "", "n")),
    of=lambda x: x.report.collectives,
    key=lambda c: (c.kind, _causes(c), str(c.bytes)),
    weigh=tables.sent,
    opening=lambda key: [words(key[0]), words(key[1]), sized(int(key[2]))],
    timed=False,
)
