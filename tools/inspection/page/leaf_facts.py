"""What is said of the leaves of a program: their bytes, how they are cut, what sends them."""

from __future__ import annotations

from collections.abc import Sequence
import functools

from adamw_xla.hlo import Leaf, Report


class LeafFacts:
    """Of all leaves of a report."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._inputs = {x.number: x for x in report.inputs}

    def bytes_of(self, leaf: Leaf) -> int:
        """Of the param and of what is kept of it, on each device."""
        return sum(self._inputs[n].bytes for n in _numbers(leaf))

    def cut(self, leaf: Leaf) -> str:
        """How it lies on the devices: ``param whole, state over data``; empty where not known."""
        param = self._axes([leaf.param] if leaf.param is not None else [])
        state = self._axes(leaf.moments)
        if param == state or not param or not state:
            return param or state
        return f"param {param}, state {state}"

    def exchanges(self, leaf: Leaf) -> str:
        """What collectives send as it is, by their kinds: ``all-gather of the new param``."""
        found = {f"{self._kinds[name]} of the gradient": None for name in leaf.gradient_sums}
        for number in _numbers(leaf):
            what = "param" if number == leaf.param else "state"
            output = self._inputs[number].output
            sent, made = self._collectives
            found |= {f"{kind} of the {what}": None for kind in sent.get(number, ())}
            if output is not None:
                found |= {f"{kind} of the new {what}": None for kind in made.get(output, ())}
        return ", ".join(found)

    def _axes(self, numbers: Sequence[int]) -> str:
        found = dict.fromkeys(self._inputs[n].axes for n in numbers)
        if not found or None in found:
            return ""
        names = ["\N{MULTIPLICATION SIGN}".join(a for axes in x or () for a in axes) for x in found]
        return " or ".join(f"over {name}" if name else "whole" for name in dict.fromkeys(names))

    @functools.cached_property
    def _kinds(self) -> dict[str, str]:
        return {c.name: c.kind for c in self.report.collectives}

    @functools.cached_property
    def _collectives(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """Kinds of those that send an argument, and of those that a result comes out of."""
        sent: dict[int, list[str]] = {}
        made: dict[int, list[str]] = {}
        for c in self.report.collectives:
            for number in c.inputs:
                sent.setdefault(number, []).append(c.kind)
            for number in c.outputs:
                made.setdefault(number, []).append(c.kind)
        return sent, made


def _numbers(leaf: Leaf) -> list[int]:
    return [*([] if leaf.param is None else [leaf.param]), *leaf.moments]
