"""The least that some kernels of a program must move, whatever happens between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from adamw_xla.hlo._bytes import pieces, writes
from adamw_xla.hlo._kernels import Kernel
from adamw_xla.hlo._syntax.opcodes import VIEWS
from adamw_xla.hlo._syntax.shapes import arrays
from adamw_xla.hlo._syntax.text import Computation, Module

Value = tuple[str, int | None]
"""The name of an instruction, and which element of its tuple; None: the whole result."""


def least(module: Module, kernels: Sequence[Kernel]) -> int:
    """Bytes that ``kernels`` exchange with the rest of the program.

    Each array that was made elsewhere is read once, and each result that is used elsewhere
    is written once. Computations are taken one by one: what a loop carries comes from
    elsewhere, and goes there.
    """
    total = 0
    for name in dict.fromkeys(kernel.computation for kernel in kernels):
        own = [kernel for kernel in kernels if kernel.computation == name]
        computation, names = module.computations[name], {kernel.name for kernel in own}
        once = _read(module, computation, names) + _written(module, computation, names)
        total += once * (own[0].times or 1)
    return total


def _read(module: Module, computation: Computation, own: set[str]) -> int:
    """Bytes that come from outside; what several kernels read, or slice alike, counts once."""
    found: defaultdict[Value, dict[str, int]] = defaultdict(dict)
    for name in own:
        read = pieces(module, computation, computation.by_name[name])
        for operand, parts in read.items():
            found[_source(computation, operand)].update(parts)
    outer = {value: sum(x.values()) for value, x in found.items() if value[0] not in own}
    return sum(min(size, _whole(computation, value)) for value, size in outer.items())


def _written(module: Module, computation: Computation, own: set[str]) -> int:
    """Bytes of results that are used outside."""
    used = set(_expanded(computation, computation.root.name))
    for instruction in computation.instructions:
        view = instruction.opcode in (*VIEWS, "tuple", "get-tuple-element")
        if instruction.name in own or view or instruction.opcode.endswith("-done"):
            continue
        for operand in instruction.operands:
            used.update(_expanded(computation, operand))
    total = 0
    for name, index in used:
        if name in own:
            sizes = writes(module, computation.by_name[name])
            total += sum(sizes) if index is None else sizes[index]
    return total


def _source(computation: Computation, name: str) -> Value:
    """Where a value was made; tuples, barriers and the like only hand it on."""
    while (instruction := computation.by_name.get(name)) is not None:
        opcode = instruction.opcode
        if opcode in VIEWS or opcode.endswith("-done"):
            name = instruction.operands[0]
        elif opcode == "get-tuple-element":
            source = _source(computation, instruction.operands[0])[0]
            made = computation.by_name[source]
            if made.opcode != "tuple":
                return source, instruction.index
            name = made.operands[instruction.index]
        else:
            break
    return name, None


def _expanded(computation: Computation, name: str) -> Iterator[Value]:
    """The values that a value consists of."""
    value = _source(computation, name)
    made = computation.by_name.get(value[0])
    if made is None:  # a constant's or a parameter's operand is no name
        return
    if made.opcode == "tuple":
        for operand in made.operands:
            yield from _expanded(computation, operand)
    else:
        yield value


def _whole(computation: Computation, value: Value) -> int:
    name, index = value
    sizes = [x.bytes for x in arrays(computation.by_name[name].shape)]
    return sum(sizes) if index is None else sizes[index]
