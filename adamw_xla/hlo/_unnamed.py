"""Leaves of an update whose arguments' names do not tell them, found by what depends on what.

AdamW's new moments depend on the gradient and on one old moment each, the new param on all of
these and on itself. Keras and Flax NNX pass their variables as plain lists, but whatever they
are called, they can be told apart by that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import re

from adamw_xla.hlo._kernels import calls_kernel, does_update
from adamw_xla.hlo._syntax.flow import hands_on, result_shape
from adamw_xla.hlo._syntax.opcodes import CALLS_ONE, ELEMENTWISE
from adamw_xla.hlo._syntax.shapes import arrays
from adamw_xla.hlo._syntax.text import Computation, Instruction, Module

Path = tuple[int, ...]
Sources = frozenset[int]
"""Numbers of the entry's parameters."""

_ELEMENTWISE = frozenset({"add", "convert", "multiply", "reshape", "select", "subtract"})
"""What may stand between an update and the program's results, and yet be none of it."""

_SLICES = ("dynamic-slice", "slice")
_HANDS_ON = CALLS_ONE | {"get-tuple-element", "tuple"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One leaf: numbers of the program's parameters.

    Attributes:
      param: the param.
      moments: what else of its size is kept from step to step, and no param.
    """

    param: int
    moments: tuple[int, ...]


def families(module: Module, *, named: bool) -> list[Family]:
    """The leaves of more than one element; none if any of them cannot be told.

    A scalar's moments look like the step's numbers, so leaves of one element are left out.

    Args:
      module: the program.
      named: whether the update is this package's, whose name is in the metadata. If not, only
        what is computed element by element is followed, and results that belong to no leaf
        are passed over.
    """
    results: dict[int, list[Sources]] = {}
    for path, elements in _results(module.entry):
        walk = _Walk(module, path, elements, named)
        sources = walk.sources() if elements > 1 else None
        if sources is not None:
            results.setdefault(walk.elements, []).append(sources)
    found = []
    for sets in results.values():
        for related in _related(sets):
            family = _family(related)
            if family is None and named:
                return []
            if family is not None and (named or _has_adams_moments(family, related)):
                found.append(family)
    return sorted(found, key=lambda family: family.param)


def _has_adams_moments(family: Family, sets: Sequence[Sources]) -> bool:
    """Whether there are two, each made of itself, and a param that is made of all."""
    alone = [s for s in sets if family.param not in s]
    whole = frozenset({family.param, *family.moments})
    return len(family.moments) == 2 and sorted(map(len, alone)) == [1, 1] and whole in sets


def _family(sets: Sequence[Sources]) -> Family | None:
    """The param is what all results depend on that depend on all others.

    A moving average of the params is another such, which only its own new value depends on. If
    it overwrites the params at times, both are alike, and arguments have the params before it.
    """
    everything = frozenset().union(*sets)
    rank: dict[int, int] = {}
    for x in everything:
        users = [s for s in sets if x in s]
        others = [s for s in sets if x not in s]
        if len(set(others)) >= 2 and all(s >= other for s in users for other in others):
            rank[x] = len(users)
    if not rank:
        return None
    param = min(x for x, n in rank.items() if n == max(rank.values()))
    kept = frozenset().union(*(s for s in sets if param not in s))
    gradient = frozenset.intersection(*sets)
    return Family(param, tuple(sorted(kept - gradient)))


def _related(sets: Sequence[Sources]) -> list[list[Sources]]:
    """Sets that have members in common, directly or by way of others, together."""
    groups: dict[int, list[Sources]] = {}
    group_of: dict[int, int] = {}
    for number, new in enumerate(sets):
        joined = [new]
        for old in {group_of[x] for x in new if x in group_of}:
            joined += groups.pop(old)
        groups[number] = joined
        group_of.update((x, number) for s in joined for x in s)
    return list(groups.values())


def _results(entry: Computation) -> Iterator[tuple[Path, int]]:
    """The program's results, and how many elements each has."""
    shapes = list(arrays(entry.root.shape))
    single = entry.root.opcode != "tuple" and len(shapes) == 1
    for index, shape in enumerate(shapes):
        yield (() if single else (index,)), shape.elements


# ------------------------------------------------------------------------------ dependencies


@dataclasses.dataclass(frozen=True, eq=False)
class _Frame:
    """A computation, and the instruction that calls it; the entry has no caller.

    Of a conditional's branches ``branch`` is the number: each has an operand of its own.
    """

    computation: Computation
    caller: _Frame | None = None
    call: Instruction | None = None
    branch: int | None = None


_Value = tuple[_Frame, str, Path, bool]
"""Where, which instruction, which element of its tuple, and whether it is the update's doing."""


class _Walk:
    """From one result back through the update, among arrays of its size alone.

    A result that devices bring together, as ZeRO does with new params, is followed in the part
    that this device makes, and to the whole array that this is a part of.

    Attributes:
      elements: of the result, or of the part.
    """

    def __init__(self, module: Module, path: Path, elements: int, named: bool) -> None:
        self._module, self._named = module, named
        self._frames: dict[tuple[_Frame, str, int], _Frame] = {}
        self._found: set[int] = set()
        self._updated = False
        self.elements = self._whole = elements
        self._start: _Value = (_Frame(module.entry), module.entry.root.name, path, False)
        if (part := self._part(self._start)) is not None:
            self._start = part
            self.elements = _elements(part[0].computation.by_name[part[1]], part[2])

    def _part(self, value: _Value) -> _Value | None:
        """What a device makes of a result that is gathered; None if it is not.

        Small ones are gathered as a sum, of arrays that are zero but for that.
        """
        is_sum = False
        while True:
            frame, name, path, inside = value
            instruction = frame.computation.by_name[name]
            opcode, operands = instruction.opcode.removesuffix("-start"), instruction.operands
            if opcode in ("all-gather", "all-reduce"):
                operand = operands[path[-1] if path and len(operands) > 1 else 0]
                value, is_sum = (frame, operand, (), inside), opcode == "all-reduce"
                if not is_sum:
                    return value
            elif opcode == "dynamic-update-slice" and is_sum:
                return frame, operands[1], (), inside
            elif opcode in _HANDS_ON or hands_on(self._module, instruction, path):
                value = next(self._before(*value), value)
                if value == (frame, name, path, inside):
                    return None
            else:
                return None

    def sources(self) -> Sources | None:
        """What the result depends on by way of the update; None if it is none of the update's.

        What the gradient was made of is not followed: it is there before the update is.
        """
        seen, values = {self._start}, [self._start]
        while values:
            for value in self._before(*values.pop()):
                if value not in seen:
                    seen.add(value)
                    values.append(value)
        is_made = self._updated if self._named else bool(self._found)
        return frozenset(self._found) if is_made else None

    def _before(self, frame: _Frame, name: str, path: Path, inside: bool) -> Iterator[_Value]:
        instruction = frame.computation.by_name[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            yield from self._argument(frame, instruction, path, inside)
        elif opcode == "get-tuple-element":
            yield frame, operands[0], (instruction.index, *path), inside
        elif opcode == "tuple":
            if path:
                yield frame, operands[path[0]], path[1:], inside
        elif calls_kernel(instruction):
            self._updated = True
            for operand in _kernel_operands(instruction, path):
                yield frame, operand, (), True
        elif opcode in CALLS_ONE or opcode == "conditional":
            for branch, called in enumerate(instruction.called):
                inner = self._entered(frame, instruction, branch, called)
                yield inner, inner.computation.root.name, path, inside
        elif opcode == "while":
            inner = self._entered(frame, instruction, 0, instruction.called[-1])
            yield inner, inner.computation.root.name, path, inside
            yield frame, operands[0], path, inside
        elif hands_on(self._module, instruction, path):
            yield frame, operands[0], path, inside
        elif opcode in _SLICES and _elements(instruction) < self._whole:
            sliced = frame.computation.by_name[operands[0]]
            if (_elements(instruction), _elements(sliced)) == (self.elements, self._whole):
                yield frame, operands[0], (), inside
        elif not self._named:
            if opcode in ELEMENTWISE:
                yield from self._operands(frame, instruction, inside)
        else:
            named = does_update(instruction)
            self._updated |= named
            if named or not instruction.op_name or (not inside and opcode in _ELEMENTWISE):
                yield from self._operands(frame, instruction, inside or named)

    def _entered(self, frame: _Frame, call: Instruction, branch: int, called: str) -> _Frame:
        """The frame of a call, always the same one: values are compared by it."""
        computation = self._module.computations[called]
        number = branch if call.opcode == "conditional" else None
        new = _Frame(computation, frame, call, number)
        return self._frames.setdefault((frame, call.name, branch), new)

    def _operands(self, frame: _Frame, instruction: Instruction, inside: bool) -> Iterator[_Value]:
        if instruction.opcode == "constant":
            return
        size = _elements(instruction)
        for operand in instruction.operands:
            if size == _elements(frame.computation.by_name[operand]):
                yield frame, operand, (), inside

    def _argument(
        self, frame: _Frame, parameter: Instruction, path: Path, inside: bool
    ) -> Iterator[_Value]:
        if frame.caller is None or frame.call is None:
            if _elements(parameter) in (self.elements, self._whole):
                self._found.add(parameter.index)
            return
        if frame.call.opcode == "while":  # from the round before
            yield frame, frame.computation.root.name, path, inside
        number = parameter.index if frame.branch is None else 1 + frame.branch
        yield frame.caller, frame.call.operands[number], path, inside


def _elements(instruction: Instruction, path: Path = ()) -> int:
    """Of an array, or of one of the arrays of a result; of several together 0."""
    found = [x.elements for x in arrays(result_shape(instruction))]
    if path:
        return found[path[0]]
    return found[0] if len(found) == 1 else 0


def _kernel_operands(call: Instruction, path: Path) -> Sequence[str]:
    """What a result of the CPU kernel depends on.

    Operands come row by row: numbers, params, gradients, and then state; results alike, but for
    numbers and gradients.
    """
    options = re.split(r"[{,]\s*", call.attributes.get("backend_config", ""))
    scalars = 1 + ("leaf_scale = true" in options)
    rows = 3 + ("amsgrad = true" in options) + ("ema = true" in options)
    leaves, rest = divmod(sum(1 for _ in arrays(call.shape)), rows)
    if rest or len(path) != 1:
        return ()
    row, leaf = divmod(path[0], leaves)
    first = scalars + leaf
    old = [first, *(first + leaves * k for k in range(2, rows + 1))]
    return [call.operands[x] for x in ([old[row]] if row else old)]
