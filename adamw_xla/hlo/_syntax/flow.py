"""Where values come from, and where they go: what is only moved or handed on is seen through."""

from __future__ import annotations

from adamw_xla.hlo._syntax.opcodes import ASYNC_RESULT, MOVES, VIEWS, is_collective
from adamw_xla.hlo._syntax.shapes import Shape, Tuple, arrays
from adamw_xla.hlo._syntax.text import Computation, Instruction, Module


def result_shape(instruction: Instruction) -> Shape:
    """The shape of what is computed, without what an asynchronous start carries along."""
    opcode, shape = instruction.opcode, instruction.shape
    if not opcode.endswith("-start") or not isinstance(shape, Tuple):
        return shape
    if isinstance(shape.parts[0], Tuple):  # all that it was given stands there
        return shape.parts[1]
    return shape.parts[ASYNC_RESULT[opcode]] if opcode in ASYNC_RESULT else shape


def entry_parameter(module: Module, computation: Computation, name: str) -> int | None:
    """The entry parameter that a value is, or is a copy, a piece or a prefetch of."""
    path: tuple[int, ...] = ()
    while True:
        instruction = computation.by_name.get(name)
        if instruction is None:
            return None
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "get-tuple-element":
            path, name = (instruction.index, *path), operands[0]
        elif opcode == "tuple" and path:
            name, path = operands[path[0]], path[1:]
        elif hands_on(module, instruction, path):
            name = operands[0]
        elif opcode != "parameter":
            return None
        elif computation is module.entry:
            return instruction.index
        else:
            caller = _caller(module, computation.name, instruction.index)
            if caller is None:
                return None
            computation, name = caller


def origin(module: Module, computation: Computation, name: str) -> Instruction:
    """What made a value, or an element of whose result it is."""
    path: tuple[int, ...] = ()
    while True:
        instruction = computation.by_name[name]
        if instruction.opcode == "get-tuple-element":
            path, name = (instruction.index, *path), instruction.operands[0]
        elif instruction.opcode == "tuple" and path:
            name, path = instruction.operands[path[0]], path[1:]
        elif hands_on(module, instruction, path):
            name = instruction.operands[0]
        else:
            return instruction


def results_of(module: Module) -> dict[str, list[int]]:
    """For each instruction of the entry that made some the results of the program that it made."""
    root = module.entry.root
    found: dict[str, list[int]] = {}
    for number, result in enumerate(root.operands if root.opcode == "tuple" else (root.name,)):
        found.setdefault(origin(module, module.entry, result).name, []).append(number)
    return found


def makers_of(module: Module, number: int) -> tuple[str, ...]:
    """Who made a result of the program: the collectives that brought it together, and before."""
    root = module.entry.root
    name = root.operands[number] if root.opcode == "tuple" else root.name
    path: tuple[int, ...] = ()
    makers: list[str] = []
    while True:
        instruction = module.entry.by_name[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "get-tuple-element":
            path, name = (instruction.index, *path), operands[0]
        elif hands_on(module, instruction, path):
            name = operands[0]
        else:
            makers.append(name)
            if not is_collective(opcode):
                return tuple(makers)
            name, path = operands[path[0] if path and len(operands) > 1 else 0], ()


def hands_on(module: Module, instruction: Instruction, path: tuple[int, ...]) -> bool:
    """Whether a result is the first operand, copied at most."""
    if instruction.opcode == "custom-call":
        return '"ConcatBitcast"' in instruction.tail
    if instruction.opcode == "while":
        return bool(path) and _is_invariant(module, instruction, path[0])
    return instruction.opcode in VIEWS | MOVES or instruction.opcode.endswith("-done")


def _is_invariant(module: Module, loop: Instruction, index: int) -> bool:
    """Whether a loop hands on its element ``index`` as it got it."""
    body = module.computations[loop.called[-1]]
    if body.root.opcode != "tuple" or not isinstance(loop.shape, Tuple):
        return False
    result = body.by_name[body.root.operands[index]]
    if result.opcode != "get-tuple-element" or result.index != index:
        return False
    return body.by_name[result.operands[0]].opcode == "parameter"


def _caller(module: Module, called: str, number: int) -> tuple[Computation, str] | None:
    """Where parameter ``number`` of a loop's, branch's or call's computation is from."""
    for computation in module.computations.values():
        for instruction in computation.instructions:
            if instruction.opcode not in ("while", "conditional", "call"):
                continue
            if called not in instruction.called:
                continue
            if instruction.opcode == "conditional":
                number = 1 + instruction.called.index(called)
            return computation, instruction.operands[number]
    return None


def made(computation: Computation) -> dict[str, set[int]]:
    """Who makes what a computation returns -> how many elements each of its arrays has."""
    found: dict[str, set[int]] = {}
    values: list[tuple[str, tuple[int, ...]]] = [(computation.root.name, ())]
    while values:
        name, path = values.pop()
        instruction = computation.by_name.get(name)
        if instruction is None:  # a constant's operand is no name
            continue
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "get-tuple-element":
            values.append((operands[0], (instruction.index, *path)))
        elif opcode == "tuple":
            chosen = operands[path[0] : path[0] + 1] if path else operands
            values += [(operand, path[1:]) for operand in chosen]
        elif opcode in VIEWS | MOVES or opcode.endswith("-done"):
            values.append((operands[0], path))
        else:
            sizes = [x.elements for x in arrays(result_shape(instruction))]
            found.setdefault(name, set()).update(sizes[path[0] : path[0] + 1] if path else sizes)
    return found
