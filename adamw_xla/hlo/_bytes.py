"""What one instruction reads from main memory, and writes to it.

Logical bytes: padding of tiles is not counted, nor is what a cache may save or waste.
Vector and scalar memory of a TPU are not main memory; a prefetch into them is counted as
a read where it is made, and what then uses it reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
import re

from adamw_xla.hlo._syntax.flow import result_shape
from adamw_xla.hlo._syntax.opcodes import FUSIONS, IN_PLACE, SLICE_STARTS, SLICES
from adamw_xla.hlo._syntax.shapes import Array, Shape, arrays
from adamw_xla.hlo._syntax.text import Computation, Instruction, Module


def reads(module: Module, computation: Computation, instruction: Instruction) -> dict[str, int]:
    """Bytes that one run of ``instruction`` reads of each operand."""
    found = pieces(module, computation, instruction)
    shapes = {name: computation.by_name[name].shape for name in found}
    return {
        name: min(sum(size for _, size in parts), main_bytes(shapes[name]))
        for name, parts in found.items()
    }


def pieces(
    module: Module, computation: Computation, instruction: Instruction
) -> dict[str, list[tuple[str, int]]]:
    """For each operand what one run reads of it: pieces, each with its place and its bytes.

    The place says where a slice is from, in terms of the computation's values: those of equal
    places are the same. Of what is read whole it is empty.
    """
    shapes = {name: computation.by_name[name].shape for name in instruction.operands}
    whole = {name: [("", main_bytes(shape))] for name, shape in shapes.items()}
    if instruction.opcode in FUSIONS:
        fused = module.computations[instruction.called[0]]
        found: dict[str, list[tuple[str, int]]] = {name: [] for name in whole}
        for number, name in enumerate(instruction.operands):
            slices = _slices(fused, fused.parameters[number], instruction.operands)
            in_main = main_bytes(shapes[name]) > 0
            found[name] += whole[name] if slices is None or not in_main else slices
        # An operand that is given twice is read as far as any of its uses needs it.
        return {name: whole[name] if whole[name][0] in x else x for name, x in found.items()}
    first = next(iter(whole), None)
    if first is None:
        return {}
    if instruction.opcode in SLICES | SLICE_STARTS and main_bytes(shapes[first]):
        sliced = sum(x.bytes for x in arrays(result_shape(instruction)))
        return {**whole, first: [(_place(computation, instruction, None), sliced)]}
    if instruction.opcode in IN_PLACE:
        return {**whole, first: []}
    return whole


def writes(module: Module, instruction: Instruction) -> list[int]:
    """Bytes that one run of ``instruction`` writes of each array of its result."""
    results = list(arrays(result_shape(instruction)))
    if instruction.opcode in FUSIONS:
        return _fused_writes(results, module.computations[instruction.called[0]])
    return [main_bytes(x) for x in results]


def main_bytes(shape: Shape) -> int:
    """Bytes of the arrays that lie in the device's main memory."""
    return sum(x.bytes for x in arrays(shape) if x.space == 0)


def _slices(
    fused: Computation, parameter: Instruction, operands: Sequence[str]
) -> list[tuple[str, int]] | None:
    """What a fusion slices out of an operand; None if it reads all of it."""
    found = []
    for user, operand in _uses(fused, parameter):
        first = user.operands[0] == operand
        if user.opcode in SLICES and first:
            size = sum(x.bytes for x in arrays(user.shape))
            found.append((_place(fused, user, operands), size))
        elif not (user.opcode in IN_PLACE and first and user.operands.count(operand) == 1):
            return None
    return found


def _place(computation: Computation, sliced: Instruction, operands: Sequence[str] | None) -> str:
    """Where a slice is from, whatever else is computed beside it."""
    where = (_value(computation, name, operands) for name in sliced.operands[1:])
    sizes = ",".join(str(x) for x in arrays(result_shape(sliced)))
    return f"{sizes} at {', '.join(where)} {_PLACES.findall(sliced.tail)}"


def _value(computation: Computation, name: str, operands: Sequence[str] | None) -> str:
    """A scalar as an expression of the values outside: ``operands`` of the fusion, if it is one."""
    made = computation.by_name[name]
    if operands is None:
        return name
    if made.opcode == "parameter":
        return operands[made.index]
    if made.opcode == "constant":
        return made.operands[0]
    inner = ", ".join(_value(computation, operand, operands) for operand in made.operands)
    return f"{made.opcode}({inner}) {_PLACES.findall(made.tail)}"


_PLACES = re.compile(r"\b(?:slice|dimensions|index)=(?:\{[^}]*\}|\d+)")
"""Of the attributes those that say which elements are taken."""


def _uses(fused: Computation, value: Instruction) -> Sequence[tuple[Instruction, str]]:
    """Who uses a value, and under which name: bitcasts are looked through."""
    found: list[tuple[Instruction, str]] = []
    for user in fused.users[value.name]:
        if user.opcode == "bitcast" and not user.is_root:
            found += _uses(fused, user)
        else:
            found.append((user, value.name))
    return found


def _fused_writes(results: Sequence[Array], fused: Computation) -> list[int]:
    """What a fusion writes: of an in-place update only the update."""
    root = fused.root
    names = root.operands if root.opcode == "tuple" else (root.name,)
    if len(results) != len(names):
        return [main_bytes(x) for x in results]
    limits = (_written(fused, fused.by_name[name]) for name in names)
    return [min(main_bytes(x), limit) for x, limit in zip(results, limits, strict=True)]


def _written(fused: Computation, result: Instruction) -> int:
    while result.opcode == "bitcast":
        result = fused.by_name[result.operands[0]]
    which = IN_PLACE.get(result.opcode)
    if which is not None:
        result = fused.by_name[result.operands[which]]
    return sum(x.bytes for x in arrays(result.shape))
