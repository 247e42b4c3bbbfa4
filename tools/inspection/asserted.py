"""What ``--assert`` asks of programs: ``Report.check`` from a command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from inspection.inspect_cases import CaseError, Inspected

from adamw_xla.hlo import CheckError


def _flag(name: str, value: str | None) -> bool:
    if value is not None:
        raise CaseError(f"--assert {name}={value}: takes no value.")
    return True


def _text(name: str, value: str | None) -> str:
    if not value:
        raise CaseError(f"--assert {name}: needs a value: {EXAMPLES[name]}.")
    return value


def _number(name: str, value: str | None) -> int:
    if value is None or not value.isdecimal():
        raise CaseError(f"--assert {name}: needs a number: {EXAMPLES[name]}.")
    return int(value)


KINDS: dict[str, Callable[[str, str | None], Any]] = {
    "donated": _flag,
    "no-gather-of-state": _flag,
    "state-sharded-over": _text,
    "in-host-memory": _flag,
    "kernels-at-most": _number,
}
"""By name what may be asked; with underscores these are the arguments of ``Report.check``."""

EXAMPLES = {
    "state-sharded-over": "state-sharded-over=data",
    "kernels-at-most": "kernels-at-most=40",
}


def wanted(asked: Sequence[str]) -> dict[str, Any]:
    """``["donated", "kernels-at-most=40"]`` as arguments of ``Report.check``.

    Raises:
      CaseError: one is unknown, or its value is.
    """
    found: dict[str, Any] = {}
    for one in asked:
        name, equals, value = one.partition("=")
        if name not in KINDS:
            raise CaseError(f"--assert {one}: must be one of {', '.join(map(_shown, KINDS))}.")
        field, meant = name.replace("-", "_"), KINDS[name](name, value if equals else None)
        if found.setdefault(field, meant) != meant:
            raise CaseError(f"--assert {name}: is given twice: {found[field]} and {meant}.")
    return found


def _shown(name: str) -> str:
    return EXAMPLES.get(name, name)


def violations(found: Sequence[Inspected], asked: dict[str, Any]) -> list[str]:
    """What is not as it was asked, of all the programs: a heading for each, and its lines."""
    lines: list[str] = []
    for x in found:
        try:
            x.report.check(**asked)
        except CheckError as error:
            head, *wrong = str(error).splitlines()
            del head
            lines += [f"{x.name} on {x.target} is not what it was to be:", *wrong]
    return lines
