"""The sentences of a report, read back: whether the parts of each sum to its total."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import re

import pytest

from adamw_xla.hlo import Part, Report

_SIZE = r"[\d.]+ [kMGTP]?B"
_LOOPS = r"(?:; (?:(?P<unknown>some in loops of unknown length)|with loops (?P<runs>\d+) \w+))?"
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}


def adds_up(found: Report) -> None:
    """Raises AssertionError where a sentence does not, or is none that is known here."""
    said = str(found).splitlines()
    checked = 0
    for pattern, check in _sentences(found):
        match = re.fullmatch(pattern, said[checked]) if checked < len(said) else None
        assert match, f"{said[checked:]} is not {pattern}"
        check(match)
        checked += 1
    assert checked == len(said), f"nobody knows {said[checked:]}"


def bytes_in(text: str) -> float:
    """Of ``1.05 MB``."""
    number, unit = text.split()
    return float(number) * _UNITS[unit]


def _is_near(text: str, exact: float) -> None:
    """Sizes are said with three digits."""
    assert bytes_in(text) == pytest.approx(exact, rel=0.0051), (text, exact)


Sentence = tuple[str, Callable[[re.Match[str]], None]]


def _sentences(found: Report) -> Iterator[Sentence]:
    """The lines that a report has, in order, each with what must be true of it."""
    devices = (
        "" if found.devices == 1 else f", {found.devices} devices; figures are of each of them"
    )
    head = f"{found.name}, compiled for {found.platform}{devices}"
    yield re.escape(head), lambda match: None
    parts = {"whole program": None, "the update": "update", "the norm": "norm"}
    assert {k.name for k in (*found.update.kernels, *found.norm.kernels)} <= {
        k.name for k in found.program.kernels
    }
    for (title, whose), part in zip(
        parts.items(), (found.program, found.update, found.norm), strict=True
    ):
        if part.kernels:
            yield _kernels(title, part)
            yield _traffic(title, part, found.parameters)
            if found.devices > 1:
                yield _exchanged(whose, found)
    if not found.update.kernels and (found.leaves or found.in_place):
        yield _others(found)
    yield _inputs(found)
    yield from _listed(
        [f"    {x.name or f'parameter {x.number}'}: {x.shape}" for x in found.undonated]
    )
    yield _temporaries(found)
    if found.leaves:
        yield _kept(found)
        yield from _landings(found)


def _kernels(title: str, part: Part) -> Sentence:
    counted = [x for x in part.kernels if x.counted]
    pattern = rf"  {title} +(?P<all>\d+) kernels?(?: \((?P<kinds>[^)]*)\))?"
    pattern += rf"(?:, not counted: (?P<others>[^;]*))?{_LOOPS}"

    def check(match: re.Match[str]) -> None:
        assert int(match["all"]) == len(counted) == sum(_numbers(match["kinds"]))
        assert sum(_numbers(match["others"])) == len(part.kernels) - len(counted)
        _runs(match, [x.times for x in counted])

    return pattern, check


def _numbers(text: str | None) -> list[int]:
    """Of ``8 fusion, 2 copy``."""
    return [int(x.split()[0]) for x in text.split(", ")] if text else []


def _runs(match: re.Match[str], times: Sequence[int | None]) -> None:
    known = [n for n in times if n is not None]
    assert bool(match["unknown"]) == (len(known) < len(times))
    if match["unknown"] is None:
        assert int(match["runs"] or len(times)) == sum(known)


def _traffic(title: str, part: Part, params: int) -> Sentence:
    pattern = rf" +reads (?P<read>{_SIZE}), writes (?P<written>{_SIZE})"
    pattern += r"(?:: (?P<each>[\d.]+) bytes per param, (?P<least>[\d.]+) at least)?"
    pattern += r"(?:; (?P<cycles>\d+) cycles by the compiler's estimate)?"

    def check(match: re.Match[str]) -> None:
        read = sum(x.read * (x.times or 1) for x in part.kernels)
        written = sum(x.written * (x.times or 1) for x in part.kernels)
        _is_near(match["read"], read)
        _is_near(match["written"], written)
        assert (match["each"] is not None) == (title != "whole program" and params > 0)
        if match["each"]:
            assert float(match["each"]) == pytest.approx((read + written) / params, abs=0.051)
            least = part.least_bytes or 0
            assert least <= read + written
            assert float(match["least"]) == pytest.approx(least / params, abs=0.051)
        cycles = [x for x in part.kernels if x.estimated_cycles is not None]
        total = sum((x.estimated_cycles or 0) * (x.times or 1) for x in cycles)
        assert match["cycles"] == (str(total) if cycles else None)

    return pattern, check


def _exchanged(whose: str | None, found: Report) -> Sentence:
    own = [x for x in found.collectives if whose is None or whose in x.bytes_of]
    pattern = rf" +exchanges (?P<each>[^;]*){_LOOPS}(?:; (?P<all>{_SIZE}) in all)?"

    def check(match: re.Match[str]) -> None:
        kinds: Counter[str] = Counter()
        counts = Counter(x.kind for x in own)
        for x in own:
            assert sum(x.bytes_of.values()) == x.bytes, x
            kinds[x.kind] += (x.bytes if whose is None else x.bytes_of[whose]) * (x.times or 1)
        if not own:
            assert match["each"] == "nothing"
            return
        said = [re.fullmatch(rf"(\d+) (\S+) of ({_SIZE})", x) for x in match["each"].split(", ")]
        assert {x[2]: int(x[1]) for x in said if x} == counts, match[0]
        for x in said:
            assert x
            _is_near(x[3], kinds[x[2]])
        _runs(match, [x.times for x in own])
        assert (match["all"] is not None) == (len(own) > 1)
        if match["all"]:
            _is_near(match["all"], sum(kinds.values()))

    return pattern, check


def _others(found: Report) -> Sentence:
    makers = {name for leaf in found.leaves for name in leaf.kernels}
    told = f"{len(makers)} kernels? makes? the new leaves"
    if not makers:
        told = "which arguments are params and moments is not known, so neither are leaves"
    return rf"  the update +none of this package; {told}", lambda match: None


def _inputs(found: Report) -> Sentence:
    pattern = r"  inputs +(?P<all>\d+), of which (?P<reused>\d+) are updated in place"
    pattern += r"(?: \((?P<copied>\d+) after a copy\))?; donated, but not in place: (?P<lost>\w+)"

    def check(match: re.Match[str]) -> None:
        reused = [x for x in found.inputs if x.output is not None]
        lost = [x for x in found.inputs if x.donated and x.output is None]
        assert (int(match["all"]), int(match["reused"])) == (len(found.inputs), len(reused))
        assert int(match["copied"] or 0) == sum(x.copied for x in reused)
        assert match["lost"] == (str(len(lost)) if lost else "none")

    return pattern, check


def _temporaries(found: Report) -> Sentence:
    pattern = rf"  temporaries +(?:not in the text; .*|(?P<own>{_SIZE}), (?P<all>{_SIZE}) with .*)"

    def check(match: re.Match[str]) -> None:
        assert (match["own"] is None) == (found.temporary_bytes is None)
        if found.temporary_bytes is not None and found.peak_bytes is not None:
            _is_near(match["own"], found.temporary_bytes)
            _is_near(match["all"], found.peak_bytes)
            host = sum(x.bytes for x in found.inputs if x.memory == "pinned_host")
            here = sum(x.bytes for x in found.inputs) - host
            assert found.peak_bytes >= here + found.temporary_bytes

    return pattern, check


def _kept(found: Report) -> Sentence:
    pattern = rf"  params +(?P<params>{_SIZE}), their state (?P<state>{_SIZE})"
    pattern += rf"(?:, of which (?P<host>{_SIZE}) in the host's memory)?"

    def check(match: re.Match[str]) -> None:
        numbers = [leaf.param for leaf in found.leaves if leaf.param is not None]
        moments = [found.inputs[n] for leaf in found.leaves for n in leaf.moments]
        assert len({*numbers}) == len(numbers), "a param is of two leaves"
        assert len({x.number for x in moments}) == len(moments), "a moment is of two leaves"
        _is_near(match["params"], sum(found.inputs[n].bytes for n in numbers))
        _is_near(match["state"], sum(x.bytes for x in moments))
        host = sum(x.bytes for x in moments if "host" in (x.memory or ""))
        _is_near(match["host"] or "0 B", host)

    return pattern, check


def _landings(found: Report) -> Iterator[Sentence]:
    whose = "params" if found.devices == 1 else "params that a device updates"
    total = sum(leaf.elements for leaf in found.leaves)
    yield rf"  {len(found.leaves)} lea(?:f|ves), {total} {whose}, land in", lambda match: None
    groups = Counter(leaf.kernels for leaf in found.leaves)
    pattern = (
        r"    (?P<where>.+): (?P<name>.*) (?P<shape>\w+\[[\d,]*\])(?: and (?P<more>\d+) more)?"
    )

    def check(match: re.Match[str]) -> None:
        kernels = match["where"].split(", ")
        cut = re.fullmatch(r"(\d+) more", kernels[-1])
        (leaf,) = {x for x in found.leaves if (x.name, x.shape) == (match["name"], match["shape"])}
        assert (
            len(leaf.kernels) == len(kernels) + (int(cut[1]) - 1 if cut else 0) or not leaf.kernels
        )
        assert groups[leaf.kernels] == 1 + int(match["more"] or 0)

    yield from _cut([(pattern, check)] * len(groups))


def _listed(lines: Sequence[str]) -> Iterator[Sentence]:
    yield from _cut([(re.escape(line), lambda match: None) for line in lines])


def _cut(lines: Sequence[Sentence], most: int = 24) -> Iterator[Sentence]:
    yield from lines[:most]
    if len(lines) > most:
        yield rf"    and {len(lines) - most} more, in report\.\w+", lambda match: None
