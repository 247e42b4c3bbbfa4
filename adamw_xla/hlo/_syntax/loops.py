"""How often loops run."""

from __future__ import annotations

from adamw_xla.hlo._syntax.flow import origin
from adamw_xla.hlo._syntax.opcodes import MOVES, VIEWS
from adamw_xla.hlo._syntax.text import Computation, Instruction, Module


def trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Rounds of a ``while``: as the compiler notes them, or as its counter shows; else None.

    TPU's compiler leaves no note. There a loop's length is read from a counter that begins at a
    constant, grows by one (by two, where two rounds were made one), and is compared with one.
    """
    if loop.trip_count is not None:
        return loop.trip_count
    condition, body = (module.computations[name] for name in loop.called)
    compared, counter, last = condition.root, None, None
    if compared.opcode == "compare" and compared.attributes.get("direction") == "LT":
        counter = _carried(condition, compared.operands[0])
        last = _constant(module, condition, compared.operands[1])
    start = origin(module, computation, loop.operands[0])
    if counter is None or last is None or start.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    first = _constant(module, computation, start.operands[counter])
    added = origin(module, body, body.root.operands[counter])
    grows = _growth(module, body, added, counter) if added.opcode == "add" else 0
    return None if first is None or grows < 1 else max(-((first - last) // grows), 0)


def _growth(module: Module, body: Computation, added: Instruction, counter: int) -> int:
    """By how much the counter grows each round; 0 where that is not known."""
    sides = added.operands
    found = (
        _constant(module, body, other)
        for one, other in (sides, sides[::-1])
        if _carried(body, one) == counter
    )
    return next(found, None) or 0


def _carried(computation: Computation, name: str) -> int | None:
    """Which element of what the loop carries a value is."""
    while (instruction := computation.by_name[name]).opcode in MOVES | VIEWS:
        name = instruction.operands[0]
    if instruction.opcode != "get-tuple-element":
        return None
    carried = computation.by_name[instruction.operands[0]]
    return instruction.index if carried.opcode == "parameter" else None


def _constant(module: Module, computation: Computation, name: str) -> int | None:
    made = origin(module, computation, name)
    is_number = made.opcode == "constant" and made.operands[0].lstrip("-").isdecimal()
    return int(made.operands[0]) if is_number else None
