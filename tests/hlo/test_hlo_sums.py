"""The parts of each sentence of a report sum to its total: over goldens, and programs made up.

A program is made of what counts: kernels of three parts, in loops and out of them, exchanges,
arguments that are given away or not. What it has of each is known before it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import dataclasses
from pathlib import Path
import re

from hlo_words import adds_up, bytes_in
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from adamw_xla.hlo import Report, report, size

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(str(x.relative_to(GOLDENS).with_suffix("")) for x in GOLDENS.rglob("*.hlo"))
NAME_OF = {"update": "adamw_update", "norm": "adamw_sum_of_squares", "": "other"}


@pytest.mark.parametrize("name", NAMES)
def test_goldens(name: str) -> None:
    adds_up(report((GOLDENS / f"{name}.hlo").read_text()))


DIGITS = st.integers(1, 15)
NEAR_THE_NEXT_UNIT = st.builds(lambda n, d: 10**n - 10**d, DIGITS, DIGITS)


@given(st.integers(0, 2**50) | NEAR_THE_NEXT_UNIT)
def test_sizes_are_said_in_three_digits(number: int) -> None:
    said = size(abs(number))
    assert re.fullmatch(r"\d{1,3}(\.\d{1,2})? [kMGTP]?B", said)
    assert bytes_in(said) == pytest.approx(abs(number), rel=0.0051)


# ---------------------------------------------------------------------------- made-up programs


@dataclasses.dataclass(frozen=True)
class Work:
    """A kernel of one argument of so many float32, and how often an exchange of its result."""

    size: int
    opcode: str
    part: str
    exchange: str | None
    in_loop: bool


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A param and its moments of so many float32, and which of the three are given away."""

    size: int
    donated: tuple[bool, bool, bool]
    lost: bool


@dataclasses.dataclass(frozen=True)
class Program:
    leaves: tuple[Leaf, ...]
    work: tuple[Work, ...]
    devices: int
    rounds: int | None
    joined: bool = False
    """Whether something of the norm's is exchanged together with something else."""


SIZES = st.sampled_from([1, 7, 64, 1000, 123_456, 5_000_000])
WORK = st.builds(
    Work,
    SIZES,
    st.sampled_from(["negate", "sine", "copy", "exponential"]),
    st.sampled_from(["norm", ""]),
    st.sampled_from([None, "all-reduce", "all-gather", "collective-permute"]),
    st.booleans(),
)
LEAVES = st.builds(
    Leaf, SIZES.filter(lambda n: n > 1), st.tuples(*[st.booleans()] * 3), st.booleans()
)
PROGRAMS = st.builds(
    Program,
    st.lists(LEAVES, max_size=30).map(tuple),
    st.lists(WORK, max_size=8).map(tuple),
    st.sampled_from([1, 8]),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
).map(lambda x: dataclasses.replace(x, joined=x.joined and x.devices > 1))


JOINED = (3, 1_000_000)


def text_of(program: Program) -> str:
    """HLO: four kernels for each leaf, of its param, gradient and moments, and the work."""
    args, lines, results, aliases, lost = [], [], [], [], []
    for i, leaf in enumerate(program.leaves):
        shape, named = f"f32[{leaf.size}]{{0}}", meta("update")
        for name, path in (("p", "params"), ("g", "grads"), ("m", "state.m"), ("v", "state.v")):
            args.append((f"{name}{i}", shape, f"{path}[\\'{i}\\']"))
        lines += [
            f"%nm{i} = {shape} add(%m{i}, %g{i}){named}",
            f"%nv{i} = {shape} add(%v{i}, %g{i}){named}",
            f"%half{i} = {shape} add(%p{i}, %nm{i}){named}",
            f"%np{i} = {shape} add(%half{i}, %nv{i}){named}",
        ]
        for new, (old, given_away) in zip(
            ("np", "nm", "nv"), zip((0, 2, 3), leaf.donated, strict=True), strict=True
        ):
            aliases += [f"{{{len(results)}}}: ({4 * i + old}, {{}}, may-alias)"] * given_away
            results.append((f"%{new}{i}", shape))
        lost += [f"({4 * i + 1}, {{}})"] * leaf.lost
    if program.joined:
        shapes = [f"f32[{n}]{{0}}" for n in JOINED]
        for i, (shape, part) in enumerate(zip(shapes, ("norm", ""), strict=True)):
            args.append((f"j{i}", shape, f"j{i}"))
            lines.append(f"%k{i} = {shape} negate(%j{i}){meta(part)}")
        groups = "replica_groups={{0,1,2,3,4,5,6,7}}, channel_id=99, to_apply=%sum"
        lines.append(f"%both = ({', '.join(shapes)}) all-reduce(%k0, %k1), {groups}{meta('')}")
    inside: list[str] = []
    carried = [("%n", "s32[]")]
    for i, work in enumerate(program.work):
        shape = f"f32[{work.size}]{{0}}"
        args.append((f"x{i}", shape, f"x{i}"))
        if work.in_loop:
            inside.append(f"%c{i} = {shape} get-tuple-element(%b), index={len(carried)}")
            carried.append((f"%x{i}", shape))
        inner = f"%c{i}" if work.in_loop else f"%x{i}"
        into = inside if work.in_loop else lines
        into.append(f"%y{i} = {shape} {work.opcode}({inner}){meta(work.part)}")
        if work.exchange is not None and program.devices > 1:
            into.append(exchange(i, work, program.devices))
    if len(carried) == 1:
        return module(program, args, lines, results, aliases, lost)
    kinds = ", ".join(kind for _, kind in carried)
    loop = f"({kinds}) while(%t), condition=%cond, body=%body"
    if program.rounds is not None:
        loop += f', backend_config={{"known_trip_count":{{"n":"{program.rounds}"}}}}'
    lines += [
        "%n = s32[] constant(0)",
        f"%t = ({kinds}) tuple({', '.join(name for name, _ in carried)})",
        f"%w = {loop}",
    ]
    handed = ", ".join(f"%h{i}" for i in range(len(carried)))
    gets = [
        f"%h{i} = {kind} get-tuple-element(%b), index={i}" for i, (_, kind) in enumerate(carried)
    ]
    called = computation(
        "%cond", [f"%a = ({kinds}) parameter(0)", "ROOT %go = pred[] constant(true)"]
    )
    body = [
        f"%b = ({kinds}) parameter(0)",
        *inside,
        *gets,
        f"ROOT %next = ({kinds}) tuple({handed})",
    ]
    return module(program, args, lines, results, aliases, lost, called + computation("%body", body))


def meta(part: str) -> str:
    return f', metadata={{op_name="jit(f)/{NAME_OF[part]}"}}'


def exchange(i: int, work: Work, devices: int) -> str:
    # What is inside of the loop may have a channel of what is outside, as TPU's compiler does it.
    channel = f"channel_id={8 - i if work.in_loop else i + 1}"
    groups = f"replica_groups={{{{{','.join(map(str, range(devices)))}}}}}, {channel}"
    shape, more = f"f32[{work.size}]{{0}}", ""
    if work.exchange == "all-gather":
        shape, more = f"f32[{work.size * devices}]{{0}}", ", dimensions={0}"
    if work.exchange == "all-reduce":
        more = ", to_apply=%sum"
    if work.exchange == "collective-permute":
        groups = f"source_target_pairs={{{{0,1}},{{1,0}}}}, {channel}"
    return f"%z{i} = {shape} {work.exchange}(%y{i}), {groups}{more}{meta(work.part)}"


def computation(name: str, lines: Sequence[str], entry: bool = False) -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return f"{'ENTRY ' * entry}{name} {{\n{body}}}\n\n"


def module(
    program: Program,
    args: Sequence[tuple[str, str, str]],
    lines: Sequence[str],
    results: Sequence[tuple[str, str]],
    aliases: Sequence[str],
    lost: Sequence[str],
    called: str = "",
) -> str:
    head = "HloModule made_up, is_scheduled=true"
    head += f", input_output_alias={{ {', '.join(aliases)} }}" if aliases else ""
    head += f", buffer_donor={{ {', '.join(lost)} }}" if lost else ""
    head += ", entry_computation_layout={()->()}"
    head += f", num_partitions={program.devices}" if program.devices > 1 else ""
    total = computation(
        "%sum",
        ["%l = f32[] parameter(0)", "%r = f32[] parameter(1)", "ROOT %s = f32[] add(%l, %r)"],
    )
    given_in = [
        f'%{name} = {shape} parameter({i}), metadata={{op_name="{path}"}}'
        for i, (name, shape, path) in enumerate(args)
    ]
    names, kinds = (", ".join(x) for x in zip(*results, strict=True)) if results else ("", "")
    root = f"ROOT %out = ({kinds}) tuple({names})"
    return f"{head}\n\n{total}{called}" + computation(
        "%main", [*given_in, *lines, root], entry=True
    )


@settings(max_examples=60)
@given(PROGRAMS)
def test_made_up_programs(program: Program) -> None:
    found = report(text_of(program), platform="cpu")
    adds_up(found)
    expected = Counter(x.opcode for x in program.work)
    expected["add"] = 4 * len(program.leaves)
    exchanges = [x for x in program.work if x.exchange and program.devices > 1]
    expected.update(x.exchange for x in exchanges)
    expected.update({"negate": 2, "all-reduce": 1} if program.joined else {})
    assert found.program.by_kind == +expected
    params = sum(leaf.size for leaf in program.leaves)
    # Each of the four adds reads two arrays and writes one; of all a kernel must move seven.
    update = found.update
    assert (update.count, update.read, update.written) == (
        4 * len(program.leaves),
        4 * 8 * params,
        4 * 4 * params,
    )
    assert update.least_bytes == 4 * 7 * params
    assert (found.parameters, found.state_bytes) == (params, 2 * 4 * params)
    reused = sum(sum(leaf.donated) for leaf in program.leaves)
    assert len(found.in_place) == reused
    assert len(found.undonated) == sum(leaf.lost for leaf in program.leaves)
    assert len(found.leaves) == len(program.leaves)
    moved = sum(4 * x.size * 2 * often(x, program) for x in program.work)
    sent = sum(4 * size_of(x, program) * often(x, program) for x in exchanges)
    read = sum(4 * x.size * often(x, program) for x in exchanges)
    written = sum(4 * made_by(x, program) * often(x, program) for x in exchanges)
    if program.joined:
        moved, sent = moved + 4 * 4 * sum(JOINED), sent + 4 * sum(JOINED)
        (both,) = [x for x in found.collectives if x.name == "both"]
        assert both.bytes_of == {"norm": 4 * JOINED[0], "": 4 * JOINED[1]}
    total = found.program.read + found.program.written
    assert total == moved + read + written + 4 * 12 * params
    assert sum(x.bytes * (x.times or 1) for x in found.collectives) == sent
    rounds = program.rounds if any(x.in_loop for x in program.work) else 1
    assert (found.program.launches is None) == (rounds is None)


def often(work: Work, program: Program) -> int:
    return program.rounds or 1 if work.in_loop else 1


def made_by(work: Work, program: Program) -> int:
    return work.size * (program.devices if work.exchange == "all-gather" else 1)


def size_of(work: Work, program: Program) -> int:
    return max(work.size, made_by(work, program))


# ------------------------------------------------------------------------- that it can fail


def test_a_sentence_that_does_not_add_up_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of each line, made larger, one at a time."""
    found = report(text_of(Program(
        (Leaf(7, (True, True, False), True), Leaf(64, (False, True, True), False)),
        (Work(64, "sine", "", "all-reduce", True), Work(7, "copy", "norm", "all-gather", False)),
        8,
        3,
    )))  # fmt: skip
    adds_up(found)
    said = str(found)
    start = said.index("devices")
    for number in re.finditer(r"(?<![\w.\[])\d+(?:\.\d+)?(?![\w\]])", said[start:]):
        at = start + number.start()
        other = f"{said[:at]}{float(number[0]) * 2 + 1:g}{said[at + len(number[0]) :]}"
        monkeypatch.setattr(Report, "__str__", lambda self, other=other: other)
        with pytest.raises((AssertionError, ValueError)):
            adds_up(found)
