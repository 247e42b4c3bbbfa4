"""A report in words, for a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adamw_xla.hlo import Part, Report

MAX_LINES = 24
"""Longer lists are cut; the report's attributes have all of them."""


def summary(report: Report) -> str:
    """The report as some lines of plain text."""
    lines = [f"{report.name}, compiled for {report.platform}"]
    for title, part in _parts(report).items():
        lines.append(f"  {title:<17}{_kernels(part)}")
        lines.append(f"  {'':<17}{_traffic(report, title, part)}")
    lines += [f"  {'inputs':<17}{_inputs(report)}", *_names(report)]
    memory = "not in the text; pass the compiled program"
    if report.temporary_bytes is not None and report.peak_bytes is not None:
        memory = f"{size(report.temporary_bytes)}, {size(report.peak_bytes)} with all buffers"
    lines.append(f"  {'temporaries':<17}{memory}")
    return "\n".join([*lines, *_landings(report)])


def size(number_of_bytes: int) -> str:
    """Bytes for people: ``1.24 MB``."""
    value, units = float(number_of_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{number_of_bytes} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def _parts(report: Report) -> dict[str, Part]:
    parts = {"whole program": report.program, "the update": report.update, "the norm": report.norm}
    return {title: part for title, part in parts.items() if part.kernels}


def _kernels(part: Part) -> str:
    kinds = ", ".join(f"{n} {kind}" for kind, n in part.by_kind.items())
    text = f"{part.count} kernel{'s' * (part.count != 1)} ({kinds})"
    if part.launches is None:
        text += "; some in loops of unknown length"
    elif part.launches != part.count:
        text += f"; with loops {part.launches} launches"
    return text


def _traffic(report: Report, title: str, part: Part) -> str:
    text = f"reads {size(part.read)}, writes {size(part.written)}"
    each = report.per_parameter(part.read + part.written)
    least = report.per_parameter(part.least_bytes)
    if each is not None and least is not None:
        text += f": {each:.1f} bytes per param, {least:.1f} at least"
    if part.estimated_cycles is not None:
        text += f"; {part.estimated_cycles} cycles by the compiler's estimate"
    return text


def _inputs(report: Report) -> str:
    text = f"{len(report.inputs)}, of which {len(report.in_place)} are updated in place"
    copied = [x for x in report.in_place if x.copied]
    if copied:
        text += f" ({len(copied)} after a copy)"
    return f"{text}; donated, but not in place: {len(report.undonated) or 'none'}"


def _names(report: Report) -> list[str]:
    lines = [f"    {x.name or f'parameter {x.number}'}: {x.shape}" for x in report.undonated]
    return _cut(lines, "report.undonated")


def _landings(report: Report) -> list[str]:
    """One line for each kernel that updates leaves."""
    if not report.leaves:
        return []
    leaves = Counter(kernel for leaf in report.leaves for kernel in leaf.kernels)
    first = {kernel: leaf for leaf in reversed(report.leaves) for kernel in leaf.kernels}
    lines = [f"  {len(report.leaves)} leaves, {report.parameters} params, land in"]
    found = []
    for kernel, n in leaves.items():
        more = f" and {n - 1} more" if n > 1 else ""
        found.append(f"    {kernel}: {first[kernel].name} {first[kernel].shape}{more}")
    return lines + _cut(found, "report.leaves")


def _cut(lines: list[str], where: str) -> list[str]:
    if len(lines) <= MAX_LINES:
        return lines
    return [*lines[:MAX_LINES], f"    and {len(lines) - MAX_LINES} more, in {where}"]
