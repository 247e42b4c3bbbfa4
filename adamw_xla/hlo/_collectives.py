"""What devices send one another: the collectives of a program, how large and whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, TypeAlias

from adamw_xla.hlo._kernels import NORM, OTHER, UPDATE, Schedule, named_part, part_of_maker
from adamw_xla.hlo._syntax.flow import entry_parameter, origin, result_shape, results_of
from adamw_xla.hlo._syntax.opcodes import CALLS_ONE, MOVES, VIEWS, is_collective
from adamw_xla.hlo._syntax.shapes import arrays
from adamw_xla.hlo._syntax.text import Computation, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      name: of its instruction; one that runs beside others may stand in their fusions.
      kind: such as ``all-reduce``; TPU's fusion of one with a slice is a ``reduce-scatter``.
      bytes: of what is exchanged, on one device and in one run: of each array what goes in or
        what comes out, whichever is more.
      bytes_of: how much of that is of the update, of the norm and of the rest: of whoever made
        it; of arguments of the program, of whoever alone reads them.
      devices: how many exchange with one another; None where the text does not say.
      inputs: arguments of the program that are exchanged as they are, or a part of them.
      outputs: results of the program that come out of it.
      computation: where it stands.
      line: in the text, from 1.
      times: runs per call of the program; None in a loop whose length is not known.
    """

    name: str
    kind: str
    bytes: int
    bytes_of: dict[str, int]
    devices: int | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    computation: str
    line: int
    times: int | None


def devices_of(module: Module) -> int:
    """How many devices run the program together."""
    found = re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", module.header)
    return math.prod(map(int, found))


Holders: TypeAlias = Mapping[tuple[str, str], Sequence[Collective]]
"""What an instruction is, or runs once: by its name and that of the computation it stands in."""


def collectives_of(
    module: Module, schedules: Sequence[Schedule]
) -> tuple[list[Collective], Holders]:
    """All of them, in the order of the schedule; each once, in however many steps it is made.

    The steps are of one channel, stand in one computation, and exchange the same. (XLA:TPU gives
    what stands in different computations the same channel, too.) Which instructions are steps of
    which is told beside them.
    """
    found: dict[Any, Collective] = {}
    holders: dict[tuple[str, str], list[Collective]] = {}
    outputs = results_of(module)
    for computation, times, parts in schedules:
        for instruction in computation.instructions:
            for one in _Found(module, parts, ((computation, instruction),)).inside():
                described = one.described(times, outputs)
                channel = one.instruction.attributes.get("channel_id", one.instruction.name)
                key = channel, computation.name, described.bytes
                held = holders.setdefault((instruction.name, computation.name), [])
                held.append(found.setdefault(key, described))
    return list(found.values()), holders


@dataclasses.dataclass(frozen=True)
class _Found:
    """A collective, and the instructions that hold it, each in its computation: from outside in."""

    module: Module
    parts: Mapping[str, str]
    chain: tuple[tuple[Computation, Instruction], ...]

    @property
    def instruction(self) -> Instruction:
        return self.chain[-1][1]

    def inside(self) -> Iterator[_Found]:
        """All collectives in what the last instruction calls, or itself."""
        if is_collective(self.instruction.opcode):
            yield self
        elif self.instruction.opcode in CALLS_ONE:
            for name in self.instruction.called:
                called = self.module.computations[name]
                for inner in called.instructions:
                    chain = (*self.chain, (called, inner))
                    yield from dataclasses.replace(self, chain=chain).inside()

    def described(self, times: int | None, outputs: Mapping[str, Sequence[int]]) -> Collective:
        (schedule, caller), (holder, instruction) = self.chain[0], self.chain[-1]
        shapes = [holder.by_name[name].shape for name in instruction.operands]
        given = [sum(x.bytes for x in arrays(shape)) for shape in shapes]
        made = [x.bytes for x in arrays(result_shape(instruction))]
        pairs = zip(given, made, strict=True) if len(made) == len(given) else zip(given)
        bytes_of: dict[str, int] = {}
        numbers: dict[int, None] = {}
        for name, pair in zip(instruction.operands, pairs, strict=True):
            number, part = self._source(name)
            bytes_of[part] = bytes_of.get(part, 0) + max(pair)
            numbers |= {} if number is None else {number: None}
        is_scattered = len(self.chain) > 1 and holder.name.startswith("all-reduce-scatter")
        kind = "reduce-scatter" if is_scattered else instruction.opcode.removesuffix("-start")
        in_entry = schedule is self.module.entry
        return Collective(
            name=instruction.name,
            kind=kind,
            bytes=sum(bytes_of.values()),
            bytes_of=bytes_of,
            devices=_group(self.module, instruction),
            inputs=tuple(numbers),
            outputs=tuple(outputs.get(caller.name, ())) if in_entry else (),
            computation=schedule.name,
            line=instruction.line,
            times=times,
        )

    def _source(self, name: str) -> tuple[int | None, str]:
        """The argument of the program that an operand is, if it is one, and whose it is."""
        schedule, caller = self.chain[0]
        for (_, holding), (called, _) in zip(self.chain[-2::-1], self.chain[:0:-1], strict=True):
            made = origin(self.module, called, name)
            if made.opcode != "parameter":
                return None, named_part(self.module, made) or self.parts[caller.name]
            name = holding.operands[made.index]
        number = entry_parameter(self.module, schedule, name)
        if number is None:
            made_by = part_of_maker(self.module, schedule, self.parts, name, self.instruction)
            return None, made_by
        readers = set(self._readers(caller.name))
        if not readers or OTHER in readers:
            return number, OTHER
        return number, UPDATE if UPDATE in readers else NORM

    def _readers(self, name: str) -> Iterator[str]:
        """Whose work it is that reads a value of the schedule."""
        for user in self.chain[0][0].users[name]:
            if user.opcode in (*MOVES, *VIEWS, "get-tuple-element"):
                yield from self._readers(user.name)
            elif not user.is_root:
                yield self.parts[user.name]


def _group(module: Module, instruction: Instruction) -> int | None:
    """Of ``{{0,1},{2,3}}``, ``[2,2]<=[4]`` or ``mesh['x'=2,'y'=2] {'x'}`` the two."""
    text = instruction.attributes.get("replica_groups")
    if text is None:
        return None
    if text.startswith("mesh["):
        # An attribute's value ends where its first bracket closes.
        at = instruction.tail.index("replica_groups=")
        named = re.match(r"[^{]*\{([^}]*)\}", instruction.tail[at:])
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
        axes = re.findall(r"'([^']+)'", named[1]) if named else []
        return math.prod(sizes[axis] for axis in axes) if {*axes} <= {*sizes} else None
    if text.startswith("["):
        return int(re.findall(r"\d+", text)[1])
    first = re.search(r"\{([\d,]+)\}", text)
    return len(first[1].split(",")) if first else devices_of(module)
