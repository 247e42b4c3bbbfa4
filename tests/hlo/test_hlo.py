"""``adamw_xla.hlo`` on what the three compilers wrote (tests/hlo/goldens).

Counts are taken a second time in the manner of ``grep``, and bytes by hand.
"""

from __future__ import annotations

from collections import Counter
import dataclasses
import inspect
import json
import math
from pathlib import Path
import re
from typing import NamedTuple

import pytest

from adamw_xla import sharding
from adamw_xla.hlo import _check, report

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(str(x.relative_to(GOLDENS).with_suffix("")) for x in GOLDENS.rglob("*.hlo"))
"""Of jaxlib 0.10's compilers, and of 0.12's in the folder of that name."""
STEP = {"a": (256, 128), "b": (256, 128), "c": (128,), "d": (128,), "e": (3, 5, 7)}
TRAIN = {"embed": (64, 32), "layers.b": (4, 32), "layers.w": (4, 32, 32)}
SCALARS = 1024
"""More bytes than the numbers of a step and the partial sums of a norm here have."""


def golden(name: str) -> str:
    return (GOLDENS / f"{name}.hlo").read_text()


def elements(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# ------------------------------------------------------------------------------- the goldens


class Expected(NamedTuple):
    """Read in the text by a person: launches of the program, of the update and the norm."""

    platform: str
    program: int
    update: int
    norm: int
    by_kind: dict[str, int]


EXPECTED = {
    "cpu.step": Expected("cpu", 4, 2, 0, {"fusion": 2, "custom-call": 2}),
    "cpu.clip": Expected("cpu", 10, 2, 5, {"fusion": 8, "custom-call": 2}),
    "cpu.train": Expected("cpu", 48, 1, 3, {"fusion": 38, "copy": 7, "dot": 2, "custom-call": 1}),
    "h100.step": Expected("cuda", 4, 3, 0, {"fusion": 4}),
    "h100.clip": Expected("cuda", 7, 3, 3, {"fusion": 7}),
    "h100.train": Expected("cuda", 33, 3, 2, {"fusion": 31, "copy": 2}),
    "h100.accumulate": Expected("cuda", 55, 3, 0, {"copy": 41, "fusion": 14}),
    "v5e.step": Expected("tpu", 5, 5, 0, {"async-copy": 24, "scalar": 14, "fusion": 5}),
    "v5e.clip": Expected("tpu", 10, 5, 5, {"async-copy": 31, "scalar": 23, "fusion": 10}),
    "v5e.train": Expected(
        "tpu",
        30,
        4,
        3,
        {
            "scalar": 31,
            "fusion": 23,
            "async-copy": 20,
            "copy": 3,
            "broadcast": 2,
            "convert": 1,
            "dynamic-update-slice": 1,
        },
    ),
    "0.12/cpu.clip": Expected("cpu", 23, 1, 14, {"fusion": 20, "copy": 2, "custom-call": 1}),
    "0.12/h100.train": Expected("cuda", 34, 3, 3, {"fusion": 32, "copy": 2}),
    "0.12/v5e.train": Expected(
        "tpu",
        31,
        4,
        3,
        {
            "scalar": 41,
            "fusion": 23,
            "async-copy": 20,
            "copy": 4,
            "broadcast": 2,
            "convert": 1,
            "dynamic-update-slice": 1,
        },
    ),
    "v5e.accumulate": Expected(
        "tpu", 15, 5, 0, {"async-copy": 37, "scalar": 19, "fusion": 5, "add": 5, "broadcast": 5}
    ),
}


def test_every_golden_is_expected():
    assert sorted(EXPECTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_counts(name):
    found, expected = report(golden(name)), EXPECTED[name]
    assert found.platform == expected.platform
    counts = (found.program.count, found.update.count, found.norm.count)
    assert counts == (expected.program, expected.update, expected.norm)
    assert found.program.by_kind == expected.by_kind


NO_LAUNCH = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier")
NO_LAUNCH += ("while", "conditional", "copy-done", "fusion-done", "slice-done")


@pytest.mark.parametrize("name", NAMES)
def test_counts_as_grep_sees_them(name):
    text = golden(name)
    called = set(
        re.findall(r"(?:body|condition|true_computation|false_computation)=%([\w.-]+)", text)
    )
    for names in re.findall(r"branch_computations={([^}]*)}", text):
        called |= {x.strip(" %") for x in names.split(",")}
    for line in re.findall(r".* while\(.*known_trip_count.*", text):
        called -= set(re.findall(r"condition=%([\w.-]+)", line))
    opcodes: Counter[str] = Counter()
    for block in re.split(r"\n}\n", text):
        head = re.search(r"^(ENTRY )?%([\w.-]+) \(", block, re.MULTILINE)
        if head is not None and (head[1] or head[2] in called):
            # The first word behind the shape that stands before a bracket.
            body = block[head.end() :].split("{\n", 1)[1]
            opcodes.update(re.findall(r" = .*?[\])}] ([a-z-]+)\(", body))
    for opcode in NO_LAUNCH:
        opcodes.pop(opcode, None)
    views = text.count('custom_call_target="ConcatBitcast"')
    views += text.count('custom_call_target="AllocateBuffer"')
    assert sum(opcodes.values()) - views == len(report(text).program.kernels)


@pytest.mark.parametrize("name", NAMES)
def test_update_reads_and_writes_what_adamw_must(name):
    found = report(golden(name))
    params = elements(TRAIN if "train" in name else STEP)
    assert found.parameters == params
    update = found.update
    # Gradient, param, m and v come; param, m and v go. What a TPU still has in its vector
    # memory is not read again, and in a branch all of it may be there.
    moved = update.read + update.written
    assert update.written <= 12 * params + SCALARS
    assert moved <= 28 * params + SCALARS
    assert moved - SCALARS <= update.least_bytes <= moved
    if "v5e" not in name:
        assert update.read >= 16 * params
        assert update.written == 12 * params


@pytest.mark.parametrize("name", NAMES)
def test_leaves_land_where_they_are_read(name):
    text = golden(name)
    found = report(text)
    shapes = TRAIN if "train" in name else STEP
    assert [leaf.name for leaf in found.leaves] == [f"params['{key}']" for key in shapes]
    for leaf in found.leaves:
        assert leaf.elements == math.prod(shapes[leaf.name[8:-2]])
        assert leaf.in_place
        assert len(leaf.kernels) == 1
        (line,) = re.findall(
            rf"^ *(?:ROOT )?%{re.escape(leaf.kernels[0])} = .*", text, re.MULTILINE
        )
        assert " fusion(" in line or "adamw_xla_update_cpu" in line
    merged = Counter(leaf.kernels[0] for leaf in found.leaves)
    assert len(merged) == len({k.name for k in found.update.kernels if k.kind in _COMPUTING})


_COMPUTING = ("fusion", "custom-call")


@pytest.mark.parametrize("name", NAMES)
def test_leaves_are_known_without_the_names_of_moments(name):
    # Gradients that are added up cannot be told from the gradient.
    named = report(golden(name)).leaves
    leaves = [dataclasses.replace(leaf, moments=leaf.moments[:2]) for leaf in named]
    assert all(len(leaf.moments) == 2 + ("accumulate" in name) for leaf in named)
    found = report(re.sub(r'op_name="state\.\w+', 'op_name="state', golden(name)))
    assert [*found.leaves] == leaves
    assert found.parameters == sum(leaf.elements for leaf in leaves) > 0


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_those_of_the_kernels(name):
    text = golden(name)
    lines = text.splitlines()
    for kernel in report(text).program.kernels:
        assert lines[kernel.line - 1].lstrip().removeprefix("ROOT ").startswith(f"%{kernel.name} =")


@pytest.mark.parametrize("name", NAMES)
def test_inputs(name):
    found = report(golden(name))
    assert found.undonated == ()
    kept = {x.name for x in found.inputs} - {x.name for x in found.in_place}
    shapes = TRAIN if "train" in name else STEP
    assert kept == ({"tokens"} if "train" in name else {f"grads['{key}']" for key in shapes})
    sizes = {x.name: (x.shape, x.bytes) for x in found.inputs}
    assert {x.donated for x in found.in_place} == {True}
    assert {x.donated for x in found.inputs if x.output is None} == {None}
    key, shape = next(iter(shapes.items()))
    dims = ",".join(map(str, shape))
    assert sizes[f"state.m['{key}']"] == (f"f32[{dims}]", 4 * math.prod(shape))


@pytest.mark.parametrize("version", ["", "0.12/"])
def test_loops(version):
    h100, v5e = f"{version}h100.train", f"{version}v5e.train"
    found = report(golden(h100))
    # Two loops over four layers, whose conditions never run; all else runs once.
    inside = [k for k in found.program.kernels if k.times == 4]
    assert {k.times for k in found.program.kernels} == {1, 4}
    assert found.program.launches == found.program.count + 3 * len(inside)
    bodies = re.findall(r" while\(.*body=%([\w.-]+)", golden(h100))
    assert {k.computation for k in inside} == set(bodies)
    # TPU's compiler notes no lengths; they are in the loops' counters.
    assert "known_trip_count" not in golden(v5e)
    found = report(golden(v5e)).program
    bodies = re.findall(r" while\(.*body=%([\w.-]+)", golden(v5e))
    inside = [k for k in found.kernels if k.computation in bodies]
    assert {k.times for k in inside} == {4}
    assert found.launches == found.count + 3 * sum(k.counted for k in inside)


def test_estimated_cycles():
    text = golden("v5e.clip")
    by_grep = sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text))
    assert report(text).program.estimated_cycles == by_grep > 0
    assert report(golden("h100.clip")).program.estimated_cycles is None


def test_json_and_words():
    found = report(golden("h100.clip"))
    data = json.loads(json.dumps(found.to_json()))
    assert data["program"]["count"] == 7
    assert len(data["inputs"]) == 21
    assert len(data["leaves"]) == 5
    words = str(found)
    assert "7 kernels (7 fusion)" in words
    assert "28.0 bytes per param, 28.0 at least" in words
    assert "donated, but not in place: none" in words
    assert "params['a'] f32[256,128] and 1 more" in words


@pytest.mark.parametrize("name", NAMES)
def test_the_kinds_of_a_line_add_up(name):
    found = report(golden(name))
    lines = [line for line in str(found).splitlines() if re.search(r" \d+ kernels?\b", line)]
    parts = [x for x in (found.program, found.update, found.norm) if x.kernels]
    for line, part in zip(lines, parts, strict=True):
        total, counted, others = re.search(
            r" (\d+) kernels?(?: \(([^)]*)\))?(?:, not counted: ([^;]*))?", line
        ).groups()
        sums = [sum(map(int, re.findall(r"\d+", kinds or ""))) for kinds in (counted, others)]
        assert sums == [int(total), len(part.kernels) - part.count]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("path", ["out/h100.step.hlo", "module_0001.after_optimizations.txt"])
def test_a_path_is_no_text(kind, path):
    with pytest.raises((TypeError, ValueError), match=rf"got the path '{path}'; pass what is in"):
        report(kind(path))


def test_refuses_other_arguments():
    text = golden("cpu.step")
    with pytest.raises(TypeError, match=r"must be a compiled program or its text, got int"):
        report(3)
    with pytest.raises(ValueError, match="platform must be one of"):
        report(text, platform="gpu")
    with pytest.raises(ValueError, match="donated has 1 entries, and the program has 21"):
        report(text, donated=[True])


def test_what_zero1_keeps_whole_may_be_whole():
    smallest = inspect.signature(sharding.zero1).parameters["min_size"].default
    assert smallest == _check.SMALL


def test_a_check_of_nothing():
    with pytest.raises(TypeError, match="nothing was asked of the program"):
        report(golden("cpu.step")).check()


def test_donation_may_be_said():
    found = report(golden("cpu.step"), donated=[True] * 21)
    assert {x.name for x in found.undonated} == {f"grads['{key}']" for key in STEP}
