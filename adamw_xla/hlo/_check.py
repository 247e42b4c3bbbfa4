"""What a compiled train step was meant to be, and where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import dataclasses

from adamw_xla.hlo._collectives import Collective
from adamw_xla.hlo._inputs import Input
from adamw_xla.hlo._kernels import UPDATE
from adamw_xla.hlo._leaves import Leaf

SMALL = 4096
"""Of leaves of fewer elements the state may be whole: ``adamw_xla.sharding.zero1`` keeps it so."""

LARGE_COPY = 1 << 16
"""Bytes; a copy of less costs about what knowing costs that it need not be."""

_BRINGS_TOGETHER = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


class CheckError(AssertionError):
    """A program is not what it was meant to be; the message lists all that is wrong."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a program is to be; see ``Report.check``."""

    donated: bool = False
    no_gather_of_state: bool = False
    state_sharded_over: str | None = None
    in_host_memory: bool = False
    kernels_at_most: int | None = None

    def violations(
        self,
        count: int,
        inputs: Sequence[Input],
        leaves: Sequence[Leaf],
        collectives: Sequence[Collective],
    ) -> Iterator[str]:
        """Each thing that is wrong, in a line.

        Args:
          count: launches of the program.
          inputs: its arguments.
          leaves: those of the params.
          collectives: what devices exchange.
        """
        if self.kernels_at_most is not None and count > self.kernels_at_most:
            yield f"{count} kernels, and {self.kernels_at_most} are allowed"
        axis = self.state_sharded_over
        if not (self.donated or self.no_gather_of_state or self.in_host_memory or axis):
            return
        if not leaves:
            yield (
                "the state was not found among the arguments: their paths must end as "
                "state.m['w'] and state.v['w'] do (or mu and nu), or this package update them"
            )
        used = {name for x in inputs for names in x.axes or () for name in names}
        if axis is not None and used and axis not in used:
            yield f"no argument is cut over {axis!r}; they are over {', '.join(sorted(used))}"
            axis = None
        if self.donated:
            yield from _kept(inputs, leaves)
        if self.no_gather_of_state:
            yield from _gathers(inputs, leaves, collectives)
        for leaf in leaves:
            for moment in (inputs[number] for number in leaf.moments):
                if axis is not None and leaf.elements >= SMALL:
                    yield from _not_cut(moment, axis)
                if self.in_host_memory:
                    yield from _not_in_host(moment)


def _kept(inputs: Sequence[Input], leaves: Sequence[Leaf]) -> Iterator[str]:
    numbers = [n for leaf in leaves for n in (leaf.param, *leaf.moments) if n is not None]
    for x in (inputs[number] for number in dict.fromkeys(numbers)):
        if x.output is not None and not (x.copied and x.bytes >= LARGE_COPY):
            continue
        if x.output is not None:
            why = "is copied all the same, since its old value is read later"
        elif x.donated:
            why = "was donated, and no result takes its buffer"
        else:
            why = "was not donated: name it in donate_argnums or donate_argnames"
        yield f"{_name(x)} is not updated in place: it {why}"


def _gathers(
    inputs: Sequence[Input], leaves: Sequence[Leaf], collectives: Sequence[Collective]
) -> Iterator[str]:
    moments = {number: inputs[number] for leaf in leaves for number in leaf.moments}
    outputs = {x.output: x for x in moments.values() if x.output is not None}
    params = {inputs[leaf.param].output for leaf in leaves if leaf.param is not None}
    for c in collectives:
        if c.kind not in _BRINGS_TOGETHER:
            continue
        found = [moments[n] for n in c.inputs if n in moments]
        found += [outputs[n] for n in c.outputs if n in outputs and outputs[n] not in found]
        names = ", ".join(map(_name, found))
        if found:
            yield f"{c.name} ({c.kind}, {c.bytes} bytes) exchanges the state: {names}"
        elif {*c.outputs} - params and (names := _grown(c, moments.values())):
            yield f"{c.name} ({c.kind}, {c.bytes} bytes) makes a result as large as all of {names}"
        elif c.bytes_of.get(UPDATE) and not {*c.outputs} <= params and c.kind != "all-reduce":
            yield (
                f"{c.name} ({c.kind}, {c.bytes} bytes) exchanges what the update made, and it is "
                "no new param"
            )


def _grown(gather: Collective, moments: Iterable[Input]) -> str:
    """Those that may come out of it whole, and then fit into no old buffer."""
    found = [
        x for x in moments if x.output is None and x.bytes * (gather.devices or 0) == gather.bytes
    ]
    return " or ".join(map(_name, found))


def _not_cut(moment: Input, axis: str) -> Iterator[str]:
    if moment.axes is None:
        yield f"{_name(moment)}: a text does not say how it is cut; pass the compiled program"
    elif not any(axis in names for names in moment.axes):
        cut = [" and ".join(names) or "-" for names in moment.axes]
        how = f"cut over ({', '.join(cut)})" if any(moment.axes) else "whole on each device"
        yield f"{_name(moment)} is not cut over {axis!r}: it is {how}, {moment.bytes} bytes"


def _not_in_host(moment: Input) -> Iterator[str]:
    if moment.memory is None or "host" not in moment.memory:
        where = moment.memory or "not known to lie there (a text does not say); perhaps device"
        yield f"{_name(moment)} does not lie in the host's memory: it is {where}"


def _name(x: Input) -> str:
    return x.name or f"parameter {x.number}"
