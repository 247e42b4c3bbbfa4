"""The tables of a page: kernels, collectives, leaves and arguments, each found by its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from inspection import tables
from inspection.inspect_cases import Inspected
from inspection.page import markup
from inspection.page.leaf_facts import LeafFacts
from inspection.page.markup import (
    NOTHING,
    Column,
    Row,
    address,
    link,
    number,
    scrolled,
    sized,
    words,
)

from adamw_xla.hlo import Collective, Kernel, Report

PARTS = {"update": "update", "norm": "norm", "": "rest"}
"""Whose work a kernel does, in the order of the table: what this page is about comes first."""

SHORTEST = 0.01
"""Least times below this one, in microseconds, are not told apart."""

_KERNELS = (
    Column("kernel", "Name of its instruction", "s", width=175),
    Column("part", "Whose work it does"),
    Column("kind", width=100),
    Column("leaves", "How many leaves it updates", "n", width=80),
    Column("read", "Bytes from main memory, each run", "n", width=86),
    Column("written", "Bytes to main memory, each run", "n", width=86),
    Column("runs", "Runs in a step", "n", width=66),
    Column("share", "Of all that is read and written in a step; bars: of the largest", "b"),
    Column("at least", "Its bytes of a step over the bandwidth: a lower bound", "n", width=88),
    Column("cycles", "The compiler's estimate for one run", "n", width=84),
    Column("op_name", "JAX's name stack", "s", width=215),
    Column("HLO", "Its line in the optimized HLO", "n", width=66),
)
_COLLECTIVES = (
    Column("kind", width=112),
    Column("count", "", "n"),
    Column("among", "How many devices exchange with one another", "n", width=78),
    Column("runs", "Of each, in a step", "n"),
    Column("bytes each", "On a device, in one run", "n"),
    Column("in all", "On a device, in a step", "n"),
    Column("share", "Of all that is exchanged; bars: of the largest", "b"),
    Column("of the update", "", "n", width=82),
    Column("of the norm", "", "n"),
    Column("of the rest", "", "n"),
    Column("exchanges", "Arguments and results of the program that are exchanged as they are", "s"),
    Column("instructions", "Their lines in the optimized HLO", "s"),
)
_LEAVES = (
    Column("leaf", "", "s"),
    Column("shape", "Of its state, on a device", width=130),
    Column("params", "", "n"),
    Column("bytes", "Of the param and its state, on a device", "n"),
    Column("lands in", "The kernels that update it", "s"),
    Column("in place", "Whether the buffers of its state are reused", width=70),
    Column("on devices", "Which axes of the mesh it is cut over", width=190),
    Column("exchanged", "What collectives send as it is", width=130),
)
_ARGUMENTS = (
    Column("argument", "", "s"),
    Column("shape"),
    Column("bytes", "On a device", "n"),
    Column("donated"),
    Column("its buffer becomes"),
    Column("memory"),
)

# --------------------------------------------------------------------------------- kernels


def kernels(x: Inspected) -> str:
    """All launches, the update's first, and of each part what moves most; with a filter."""
    found = ordered(x.report.program.kernels)
    if not found:
        return '<p class="none">The program launches nothing.</p>'
    leaves: dict[str, list[str]] = {}
    for leaf in x.report.leaves:
        for name in leaf.kernels:
            leaves.setdefault(name, []).append(leaf.name)
    total = sum(map(tables.bytes_of, found)) or 1
    largest = max(map(tables.bytes_of, found)) / total or 1.0
    taken: set[str] = set()
    rows = [
        _kernel(x, kernel, leaves.get(kernel.name, []), total, largest, taken) for kernel in found
    ]
    kinds = [kind for kind, _ in Counter(kernel.kind for kernel in found).most_common()]
    parts = [part for part in PARTS if any(kernel.part == part for kernel in found)]
    chosen = {
        "part": {PARTS[part]: PARTS[part] for part in parts},
        "kind": {kind: kind for kind in kinds},
    }
    form = filter_form("kernels", "name, op_name or leaf", chosen)
    return form + markup.table("kernels", _KERNELS, rows)


def ordered(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The update's first, then the norm's; of each part what moves most."""
    order = list(PARTS)
    return sorted(kernels, key=lambda k: (order.index(k.part), -tables.bytes_of(k), k.line))


def _kernel(
    x: Inspected, kernel: Kernel, leaves: Sequence[str], total: int, largest: float, taken: set[str]
) -> Row:
    moved = tables.bytes_of(kernel)
    part = PARTS[kernel.part]
    attributes = {"data-part": part, "data-kind": kernel.kind}
    if leaves:
        attributes["data-leaves"] = "\n".join(leaves)
    if kernel.name not in taken:
        attributes["id"] = f"kernel={kernel.name}"
        taken.add(kernel.name)
    cells = [
        scrolled(link(address(kernel=kernel.name), kernel.name)),
        f'<td><span class="part {part}">{part}</span></td>',
        words(kernel.kind),
        number(len(leaves), title=_some(leaves)) if leaves else NOTHING,
        sized(kernel.read),
        sized(kernel.written),
        '<td class="n" data-v="0">?</td>' if kernel.times is None else number(kernel.times),
        markup.share(moved / total, largest, part),
        least(x, moved),
        number(kernel.estimated_cycles),
        scrolled(escape(kernel.op_name)),
        number(kernel.line).replace(
            f">{kernel.line:,}<", f">{link(address(line=kernel.name), f'{kernel.line:,}')}<"
        ),
    ]
    return Row(cells, attributes)


def least(x: Inspected, number_of_bytes: int) -> str:
    """A cell of the least time; empty where the bandwidth is not known, or nothing moves."""
    time = x.microseconds(number_of_bytes) if number_of_bytes else None
    if time is None:
        return NOTHING
    return number(time, tables.microseconds(time) if time >= SHORTEST else f"<{SHORTEST} us")


def _some(names: Sequence[str]) -> str:
    more = f"\nand {len(names) - 12} more" if len(names) > 12 else ""
    return "\n".join(names[:12]) + more


def filter_form(table: str, hint: str, chosen: dict[str, dict[str, str]]) -> str:
    """A text box and choices; the script shows it, as without one it does nothing.

    Args:
      table: id of the table whose rows it chooses.
      hint: what the text is looked for in.
      chosen: for each attribute of the rows its values, and how they are called.
    """
    selects = "".join(
        f'<label>{name}<select name="{name}"><option value="">all</option>'
        + "".join(f'<option value="{escape(v)}">{escape(t)}</option>' for v, t in values.items())
        + "</select></label>"
        for name, values in chosen.items()
    )
    return (
        f'<form class="filter" data-of="{table}" hidden><label>Filter <input type="search" '
        f'name="text" placeholder="{escape(hint)}" autocomplete="off" spellcheck="false"></label>'
        f'{selects}<output aria-live="polite"></output></form>'
    )


# ----------------------------------------------------------------------------- collectives


def collectives(x: Inspected) -> str:
    """What devices exchange; what is alike stands in one row. Rows add up."""
    report = x.report
    total = tables.exchanged(report)
    groups = tables.alike(report.collectives)
    largest = max(map(tables.sent, groups)) / (total or 1) or 1.0
    rows = [_alike(report, group, total or 1, largest) for group in groups]
    sums = _sums(report.collectives)
    counts = [number(len(report.collectives)), NOTHING, NOTHING, NOTHING, sums[0], NOTHING]
    cells = [words("all"), *counts, *sums[1:], NOTHING, NOTHING]
    return markup.table("collectives", _COLLECTIVES, rows, Row(cells))


def _sums(group: Sequence[Collective]) -> list[str]:
    """Cells of what they send in a step: in all, and of each part."""
    of_parts = {part: tables.of_part(group, part) for part in PARTS}
    return [
        sized(tables.sent(group), tables.is_least(group)),
        *(sized(tables.sent(x, part), tables.is_least(x)) for part, x in of_parts.items()),
    ]


def _alike(report: Report, group: Sequence[Collective], total: int, largest: float) -> Row:
    first = group[0]
    causes = {part: tables.sent(group, part) for part in PARTS}
    main = max(causes, key=lambda part: causes[part])
    sums = _sums(group)
    names = [
        f'<a id="collective={escape(c.name)}" {_reference(c.name)}>{escape(c.name)}</a>'
        for c in group
    ]
    cells = [
        f'<td><span class="part {PARTS[main]}">{escape(first.kind)}</span></td>',
        number(len(group)),
        '<td class="n" data-v="0">?</td>' if first.devices is None else number(first.devices),
        '<td class="n" data-v="0">?</td>' if first.times is None else number(first.times),
        sized(first.bytes),
        sums[0],
        markup.share(tables.sent(group) / total, largest, PARTS[main]),
        *sums[1:],
        scrolled(escape(", ".join(_exchanged(report, group)))),
        scrolled(", ".join(names)),
    ]
    return Row(cells)


def _reference(name: str) -> str:
    return f'href="{escape(address(line=name))}"'


def _exchanged(report: Report, group: Sequence[Collective]) -> list[str]:
    names = {x.number: x.name or f"parameter {x.number}" for x in report.inputs}
    reused = {x.output: names[x.number] for x in report.inputs if x.output is not None}
    found = [names[n] for c in group for n in c.inputs if n in names]
    found += [
        f"new {reused[n]}" if n in reused else f"output {n}" for c in group for n in c.outputs
    ]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------- leaves and arguments


def leaves(x: Inspected) -> str:
    """Each leaf of the params."""
    report, facts = x.report, LeafFacts(x.report)
    rows = []
    for leaf in report.leaves:
        cells = [
            scrolled(escape(leaf.name)),
            words(leaf.shape),
            number(leaf.elements),
            sized(facts.bytes_of(leaf)),
            scrolled(", ".join(link(address(kernel=name), name) for name in leaf.kernels)),
            words("yes" if leaf.in_place else "no"),
            words(facts.cut(leaf) if report.devices > 1 else ""),
            words(facts.exchanges(leaf)),
        ]
        rows.append(Row(cells))
    return markup.table("leaves", _LEAVES, rows)


def arguments(x: Inspected) -> str:
    """What the program takes, and what becomes of it."""
    rows = []
    for i in x.report.inputs:
        reused = "" if i.output is None else f"output {i.output}" + " after a copy" * i.copied
        given = "not known" if i.donated is None else "yes" if i.donated else "no"
        name = i.name or f"parameter {i.number}"
        cells = [scrolled(escape(name)), words(i.shape), sized(i.bytes), words(given)]
        rows.append(Row([*cells, words(reused), words(i.memory or "")]))
    table = markup.table("arguments", _ARGUMENTS, rows)
    return f"<details><summary>{len(rows):,} arguments</summary>{table}</details>"


def lines_of(report: Report) -> dict[int, str]:
    """Which lines of the HLO have a name that is linked to: of kernels and of collectives."""
    found: dict[int, str] = {}
    taken: set[str] = set()
    for x in (*report.program.kernels, *report.collectives):
        if x.line not in found and x.name not in taken:
            found[x.line] = x.name
            taken.add(x.name)
    return found
