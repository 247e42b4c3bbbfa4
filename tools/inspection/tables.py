"""What is printed of programs: one column for each, their collectives, their heaviest kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from inspection.inspect_cases import Inspected
from rich.table import Table

from adamw_xla.hlo import Collective, Kernel, Report, size

HEAVIEST = 12
"""So many kernels are listed."""

Number = float | None
"""Of one program; None where it is not known, or there is none."""


class Row(NamedTuple):
    """A line of the table, whose number can be compared between programs.

    Attributes:
      label: of the line.
      number: of a program.
      words: for the number.
      summed: the kernels or collectives whose runs count in it.
    """

    label: str
    number: Callable[[Inspected], Number]
    words: Callable[[float], str]
    summed: Callable[[Report], Sequence[Kernel | Collective]] = lambda _: ()

    def cell(self, x: Inspected) -> str:
        """What is said of a program; empty for nothing."""
        number = self.number(x)
        return "" if number is None else at_least(self.words(number), self.summed(x.report))


def at_least(text: str, summed: Iterable[Kernel | Collective]) -> str:
    """A sum over these as words, with ``>`` where it is a lower bound."""
    return f">{text}" if is_least(summed) else text


def is_least(summed: Iterable[Kernel | Collective]) -> bool:
    """Whether one of them runs in a loop of unknown length, and is counted once in a sum."""
    return any(x.times is None for x in summed)


def programs(found: Sequence[Inspected], compared: bool = False) -> Table:
    """One column for each program; rows that say nothing of any are left out.

    Args:
      found: the programs.
      compared: whether each but the first gets a second column: what changed since the first.
    """
    table = Table()
    table.add_column("")
    for number, x in enumerate(found):
        table.add_column(f"{x.name}\n{x.target}", justify="right")
        if compared and number:
            table.add_column("against\nthe first", justify="right")
    for label, cells in rows(found, compared).items():
        if any(cells):
            table.add_row(label, *cells)
    return table


def rows(found: Sequence[Inspected], compared: bool = False) -> dict[str, list[str]]:
    """What the table says, by row."""
    cells: dict[str, list[str]] = {}
    for row in ROWS:
        numbers = [row.number(x) for x in found]
        for position, (x, number) in enumerate(zip(found, numbers, strict=True)):
            cells.setdefault(row.label, []).append(row.cell(x))
            if compared and position:
                cells[row.label].append(_change(numbers[0], number, row))
        if row.label == "kernels":
            cells["by kind"] = [_kinds(x) for x in _columns(found, compared)]
    return cells


def _columns(found: Sequence[Inspected], compared: bool) -> Iterator[Inspected | None]:
    for number, x in enumerate(found):
        yield x
        if compared and number:
            yield None


def _kinds(x: Inspected | None) -> str:
    kinds = x.report.program.by_kind.items() if x is not None else ()
    return "\n".join(f"{n} {kind}" for kind, n in kinds)


def _change(old: Number, new: Number, row: Row) -> str:
    """``-12 (-8 %)``; empty where nothing changed, and for what differs from run to run."""
    if (old or 0) == (new or 0) or row.label in OF_THIS_RUN:
        return ""
    difference = (new or 0) - (old or 0)
    sign = "+" if difference > 0 else "-"
    percent = f" ({difference / old:+.1%})" if old else ""
    return f"{sign}{row.words(abs(difference))}{percent}"


# ------------------------------------------------------------------------------- the rows


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _seconds(number: float) -> str:
    return f"{number:.2f} s"


def microseconds(number: float) -> str:
    """A time for people: ``12.3 us``."""
    return f"{number:.3g} us" if number < 1000 else f"{number:,.0f} us"


def _size(number: float) -> str:
    return size(round(number))


def _tenths(number: float) -> str:
    return f"{number:.1f}"


def _or_none(number: float | None) -> Number:
    return number or None


def _moved(report: Report) -> int:
    return report.program.read + report.program.written


def _per_param(x: Inspected) -> Number:
    # On many devices a param may be cut, its moments otherwise than itself.
    alone = x.report.devices == 1 and x.parameters
    return _moved(x.report) / x.parameters if alone else None


def _of_update(report: Report) -> Number:
    moved = report.per_parameter(report.update.read + report.update.written)
    return _or_none(moved) if report.devices == 1 else None


def exchanged(report: Report, part: str | None = None) -> int:
    """Bytes that a device exchanges in a step, of all or of a part of the program."""
    return sent(report.collectives, part)


def of_part(collectives: Sequence[Collective], part: str) -> list[Collective]:
    """Those that exchange what a part of the program made."""
    return [c for c in collectives if c.bytes_of.get(part)]


ROWS = (
    Row("kernels", lambda x: x.report.program.count, _count),
    Row("of which the update", lambda x: _or_none(x.report.update.count), _count),
    Row("of which the norm", lambda x: _or_none(x.report.norm.count), _count),
    Row("devices", lambda x: x.report.devices if x.report.devices > 1 else None, _count),
    Row("params, on each", lambda x: _or_none(x.report.param_bytes), _size),
    Row("their state", lambda x: _or_none(x.report.state_bytes), _size),
    Row("of it in the host", lambda x: _or_none(x.report.state_bytes_in_host), _size),
    Row("temporaries", lambda x: x.report.temporary_bytes, _size),
    Row("with all buffers", lambda x: x.report.peak_bytes, _size),
    Row("donated, not in place", lambda x: len(x.report.undonated), _count),
    Row("collectives", lambda x: _or_none(len(x.report.collectives)), _count),
    Row("exchanged", lambda x: _or_none(exchanged(x.report)), _size, lambda x: x.collectives),
    *(
        Row(
            f"of it by the {part}",
            lambda x, part=part: _or_none(exchanged(x.report, part)),
            _size,
            lambda x, part=part: of_part(x.collectives, part),
        )
        for part in ("update", "norm")
    ),
    Row("moved", lambda x: _moved(x.report), _size, lambda x: x.program.kernels),
    Row("takes at least", lambda x: x.microseconds(_moved(x.report)), microseconds),
    Row(
        "the update at least",
        lambda x: x.microseconds(x.report.update.least_bytes or 0) or None,
        microseconds,
    ),
    Row("bytes per param", _per_param, _tenths, lambda x: x.program.kernels),
    Row(
        "of which the update's",
        lambda x: _of_update(x.report),
        _tenths,
        lambda x: x.update.kernels,
    ),
    Row("trace and lower", lambda x: x.program.trace_seconds, _seconds),
    Row("compile", lambda x: x.program.compile_seconds, _seconds),
    Row(
        "cycles (estimate)",
        lambda x: x.report.program.estimated_cycles,
        _count,
        lambda x: x.program.kernels,
    ),
)

OF_THIS_RUN = ("trace and lower", "compile")
"""Rows whose figures are no property of the program."""


# ------------------------------------------------------------- collectives and kernels


def _headed(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table of columns of words, and then of numbers."""
    table = Table(title=title)
    for head in words:
        table.add_column(head)
    for head in numbers:
        table.add_column(head, justify="right")
    return table


def collectives(x: Inspected) -> Table:
    """What a device exchanges in a step; what is alike stands in one row. Rows add up."""
    title = f"exchanged by each of {x.report.devices} devices: {x.name}, {x.target}"
    numbers = ("bytes each", "in all", "of the update", "of the norm")
    table = _headed(title, ("", "among", "runs"), numbers)
    for group in alike(x.report.collectives):
        first, n = group[0], len(group)
        parts = [_sent(group, part) for part in ("update", "norm")]
        runs = "?" if first.times is None else str(first.times)
        table.add_row(
            f"{n} {first.kind}",
            "?" if first.devices is None else str(first.devices),
            runs,
            size(first.bytes),
            _sent(group),
            *("" if text == "0 B" else text for text in parts),
        )
    sums = [_sent(x.report.collectives, part) for part in (None, "update", "norm")]
    table.add_section()
    table.add_row("all", "", "", "", *sums)
    return table


def _sent(group: Sequence[Collective], part: str | None = None) -> str:
    of_it = group if part is None else of_part(group, part)
    return at_least(size(sent(of_it, part)), of_it)


def alike(collectives: Sequence[Collective]) -> list[list[Collective]]:
    """Those of one kind, size and cause together; what sends most comes first."""
    groups: dict[tuple[object, ...], list[Collective]] = {}
    for c in collectives:
        key = (c.kind, c.bytes, c.devices, c.times, *sorted(c.bytes_of.items()))
        groups.setdefault(key, []).append(c)
    return sorted(groups.values(), key=lambda group: -sent(group))


def sent(group: Sequence[Collective], part: str | None = None) -> int:
    """Bytes that a device exchanges in them in a step, of all or of a part of the program."""
    return sum(
        (c.bytes if part is None else c.bytes_of.get(part, 0)) * (c.times or 1) for c in group
    )


def kernels(x: Inspected) -> Table:
    """Those that move most, with the least time that this takes."""
    title = f"the heaviest kernels: {x.name}, {x.target}"
    table = _headed(title, ("", "kind", "of"), ("runs", "bytes each", "in all", "at least"))
    found = sorted(x.report.program.kernels, key=lambda kernel: -bytes_of(kernel))
    rest = found[HEAVIEST:]
    for kernel in found[:HEAVIEST]:
        runs = "?" if kernel.times is None else str(kernel.times)
        each = size(kernel.read + kernel.written)
        cells = (kernel.name, kernel.kind, kernel.part, runs, each)
        table.add_row(*cells, *_bound(x, [kernel]))
    if rest:
        others = f"and {len(rest)} more"
        table.add_row(others, "", "", "", "", *_bound(x, rest))
    table.add_section()
    table.add_row("all", "", "", "", "", *_bound(x, found))
    return table


def bytes_of(kernel: Kernel) -> int:
    """Read and written in a step; a loop of unknown length counts once."""
    return (kernel.read + kernel.written) * (kernel.times or 1)


def _bound(x: Inspected, kernels: Sequence[Kernel]) -> tuple[str, str]:
    number_of_bytes = sum(map(bytes_of, kernels))
    least = x.microseconds(number_of_bytes)
    return at_least(size(number_of_bytes), kernels), "" if least is None else microseconds(least)
