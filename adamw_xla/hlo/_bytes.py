"""What one instruction reads from main memory, and writes to it.

Logical bytes: padding of tiles is not counted, nor is what a cache may save or waste.
Vector and scalar memory of a TPU are not main memory; a prefetch into them is counted as
a read where it is made, and what then uses it reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from adamw_xla.hlo._opcodes import ASYNC_RESULT, IN_PLACE, SLICE_STARTS, SLICES
from adamw_xla.hlo._shapes import Array, Shape, Tuple, arrays
from adamw_xla.hlo._text import Computation, Instruction, Module


def reads(module: Module, computation: Computation, instruction: Instruction) -> dict[str, int]:
    """Bytes that one run of ``instruction`` reads of each operand."""
    shapes = {name: computation.by_name[name].shape for name in instruction.operands}
    whole = {name: main_bytes(shape) for name, shape in shapes.items()}
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called[0]]
        # An operand that is given twice is read as far as any of its uses needs it.
        needed = dict.fromkeys(whole, 0)
        for number, name in enumerate(instruction.operands):
            needed[name] = max(needed[name], _fused_read(fused, number, whole[name]))
        return {name: min(needed[name], whole[name]) for name in whole}
    first = next(iter(whole), None)
    if first is None:
        return {}
    if instruction.opcode in SLICES | SLICE_STARTS:
        sliced = sum(x.bytes for x in arrays(result_shape(instruction)))
        return {**whole, first: min(whole[first], sliced)}
    if instruction.opcode in IN_PLACE:
        return {**whole, first: 0}
    return whole


def writes(module: Module, instruction: Instruction) -> list[int]:
    """Bytes that one run of ``instruction`` writes of each array of its result."""
    results = list(arrays(result_shape(instruction)))
    if instruction.opcode == "fusion":
        return _fused_writes(results, module.computations[instruction.called[0]])
    return [main_bytes(x) for x in results]


def result_shape(instruction: Instruction) -> Shape:
    """The shape of what is computed, without what an asynchronous start carries along."""
    part = ASYNC_RESULT.get(instruction.opcode)
    if part is None or not isinstance(instruction.shape, Tuple):
        return instruction.shape
    return instruction.shape.parts[part]


def main_bytes(shape: Shape) -> int:
    """Bytes of the arrays that lie in the device's main memory."""
    return sum(x.bytes for x in arrays(shape) if x.space == 0)


def _fused_read(fused: Computation, number: int, whole: int) -> int:
    """How much of operand ``number`` a fusion reads: less where it only slices it."""
    read = 0
    for user, operand in _uses(fused, fused.parameters[number]):
        first = user.operands[0] == operand
        if user.opcode in SLICES and first:
            read += sum(x.bytes for x in arrays(user.shape))
        elif not (user.opcode in IN_PLACE and first and user.operands.count(operand) == 1):
            return whole
    return read


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
