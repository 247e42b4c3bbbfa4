"""``adamw_xla.hlo`` on damaged texts: they are refused, by the line, or read right all the same."""

from __future__ import annotations

from collections.abc import Callable
import functools
from pathlib import Path
import random
import re
import sys
from typing import Any

from hlo_words import adds_up
import pytest

from adamw_xla.hlo import HloSyntaxError, Report, report

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ("cpu.step", "h100.step", "v5e.step", "0.12/cpu.clip", "0.12/h100.train", "0.12/v5e.train")
EACH = 2
"""Of each kind of damage to each text, in the tests; by hand as many as one likes."""

SHAPE = re.compile(r"(?<= = )\(?(?:pred|bf16|[a-z]\d+)\[[\d,]*\]")
OPCODE = re.compile(r"(?<=[\])}] )[a-z][a-z-]*(?=\()")
OPERAND = re.compile(r"(?<=[(, ])%[\w.-]+")


@functools.cache
def golden(name: str) -> str:
    return (GOLDENS / f"{name}.hlo").read_text()


def figures(found: Report, text: str, name: str) -> Any:
    """All that adds up; what is known by names only where the damage left the names."""
    parts = [found.program]
    inputs: Any = [(x.shape, x.bytes, x.output, x.copied) for x in found.inputs]
    if NAMED.findall(text) == NAMED.findall(golden(name)):
        parts += [found.update, found.norm]
        inputs += [found.parameters, found.param_bytes, found.state_bytes]
    sums = [(x.count, x.launches, x.read, x.written, x.least_bytes, x.by_kind) for x in parts]
    return sums, inputs, found.devices


NAMED = re.compile(r'op_name="[^"]*"|custom_call_target="[^"]*"')


@functools.cache
def right(name: str, names: bool) -> Any:
    return figures(report(golden(name)), golden(name) if names else "", name)


# ------------------------------------------------------------------------------ damages


def one_line(text: str, rng: random.Random, change: Callable[[str], str]) -> str:
    """Changes a line that can be changed so."""
    lines = text.splitlines(keepends=True)
    for number in rng.sample(range(1, len(lines)), len(lines) - 1):
        new = change(lines[number])
        if new != lines[number]:
            return "".join([*lines[:number], new, *lines[number + 1 :]])
    return text  # such as one that calls nothing


def replaced(pattern: re.Pattern[str], to: Callable[[str], str]) -> Callable[[str], str]:
    return lambda line: pattern.sub(lambda found: to(found[0]), line, count=1)


def deleted(text: str, rng: random.Random) -> str:
    return one_line(text, rng, lambda line: "" if line.strip() else line)


def doubled(text: str, rng: random.Random) -> str:
    return one_line(text, rng, lambda line: line * 2 if line.strip() else line)


def cut_off(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text.rstrip()) - 1)]


def without_a_piece(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text) - 100)
    return text[:start] + text[start + rng.randrange(1, 100) :]


def other_size(text: str, rng: random.Random) -> str:
    def other(shape: str) -> str:
        sizes = list(re.finditer(r"(?<=[\[,])\d+", shape))
        if not sizes:
            return shape.replace("[]", "[2]")
        at = rng.choice(sizes)
        return shape[: at.start()] + str(int(at[0]) + rng.choice((1, 8))) + shape[at.end() :]

    return one_line(text, rng, replaced(SHAPE, other))


def other_dtype(text: str, rng: random.Random) -> str:
    def other(shape: str) -> str:
        return re.sub(r"[a-z]+\d*(?=\[)", "f64" if "f32[" in shape else "f32", shape, count=1)

    return one_line(text, rng, replaced(SHAPE, other))


def unknown_opcode(text: str, rng: random.Random) -> str:
    return one_line(text, rng, replaced(OPCODE, lambda opcode: f"{opcode}x"))


def other_opcode(text: str, rng: random.Random) -> str:
    others = ("copy", "parameter", "constant", "get-tuple-element", "tuple", "fusion", "while")
    return one_line(text, rng, replaced(OPCODE, lambda opcode: rng.choice(others)))


def other_operand(text: str, rng: random.Random) -> str:
    names = sorted(set(re.findall(r"%[\w.-]+(?= = )", text)))
    return one_line(text, rng, replaced(OPERAND, lambda name: rng.choice(names)))


def other_callee(text: str, rng: random.Random) -> str:
    names = sorted(set(re.findall(r"^%[\w.-]+", text, re.MULTILINE)))
    called = re.compile(r"(?<=calls=|.body=|ition=)%[\w.-]+")
    return one_line(text, rng, replaced(called, lambda name: rng.choice(names)))


def other_number(text: str, rng: random.Random) -> str:
    numbers = re.compile(r"(?<=parameter\()\d+|(?<=, index=)\d+")
    return one_line(text, rng, replaced(numbers, lambda n: str(int(n) + 99)))


DAMAGES = (
    deleted,
    doubled,
    cut_off,
    without_a_piece,
    other_size,
    other_dtype,
    unknown_opcode,
    other_opcode,
    other_operand,
    other_callee,
    other_number,
)


def wrong(name: str, damage: Callable[[str, random.Random], str], seed: int) -> str | None:
    """What a report of a damaged text gets wrong; None where it is refused, or right."""
    text = damage(golden(name), random.Random(f"{name} {damage.__name__} {seed}"))
    try:
        read = report(text)
        adds_up(read)
        found = figures(read, text, name)
    except HloSyntaxError as error:
        where = re.search(r"line \d+|no line|no ENTRY|not scheduled", str(error))
        return None if where else f"names no line: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wanted = right(name, len(found[0]) > 1)
    return None if found == wanted else f"{found} is not {wanted}"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_text_is_refused_or_read_right(damage):
    found = {(name, seed): wrong(name, damage, seed) for name in NAMES for seed in range(EACH)}
    assert not {key: what for key, what in found.items() if what}


if __name__ == "__main__":  # python tests/hlo/test_hlo_damaged.py 1000
    for damage in DAMAGES:
        keys = [(name, seed) for name in NAMES for seed in range(int(sys.argv[1]))]
        bad = {key: what for key in keys if (what := wrong(key[0], damage, key[1]))}
        print(damage.__name__, len(keys), "damaged,", len(bad), "read wrong")
        for key, what in list(bad.items())[:5]:
            print("   ", *key, what[:150])
