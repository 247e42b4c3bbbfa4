"""What a compiled program launches, what each launch moves, and whose work it does.

What a launch is, by platform:

- cuda, rocm: each instruction of the schedule that has data to compute or to move: a
  fusion, an instruction that was left unfused, a copy, a custom call (a library behind it
  may launch more), a collective. The second stage of a reduction is an instruction of its
  own.
- cpu: the same. These are calls of compiled loops or of library functions, not launches
  on a device.
- tpu: the same, but the whole program is one launch there, and a kernel is one of its
  loops over data in vector memory. What computes on scalars alone is of kind ``scalar``,
  and what moves data in the background (prefetches into vector memory and the way back)
  of kind ``async-copy``; both are listed, neither is counted.

Nothing is launched by parameters, constants, tuples and their elements, bitcasts, barriers,
the ``-done`` half of what is asynchronous, or by TPU's ``ConcatBitcast``. Control flow
itself is not counted either, but what stands in it is: the bodies of loops once, each branch
of a conditional once, and the condition of a loop once where it runs. It does not where the
length of the loop is known, except on TPUs: XLA's runtimes for GPUs and CPUs then count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import re
from typing import Literal, NamedTuple

from adamw_xla.hlo._bytes import reads, writes
from adamw_xla.hlo._syntax.flow import entry_parameter, origin
from adamw_xla.hlo._syntax.loops import trips
from adamw_xla.hlo._syntax.opcodes import CALLS_ONE, FREE, MOVE_STARTS, MOVES, VIEWS, is_collective
from adamw_xla.hlo._syntax.shapes import arrays
from adamw_xla.hlo._syntax.text import Computation, Instruction, Module
from adamw_xla_lowering import NORM_NAME, UPDATE_NAME
from adamw_xla_lowering.contract import CPU_TARGET_NAME

Platform = Literal["cpu", "cuda", "rocm", "tpu"]

UPDATE, NORM, OTHER = "update", "norm", ""
"""Whose work a kernel does; one that does the update's among others is the update's."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
      name: of its instruction.
      kind: the opcode, or ``scalar`` or ``async-copy``.
      part: ``update``, ``norm`` or empty.
      counted: whether it is a launch by the platform's rule.
      computation: where it stands: the entry, or the body of a loop or branch.
      line: in the text, from 1.
      op_name: JAX's name stack for it.
      read: bytes from main memory, each run.
      written: bytes to main memory, each run.
      times: runs per call of the program; None in a loop whose length is not known.
      estimated_cycles: the compiler's estimate for one run (TPU).
    """

    name: str
    kind: str
    part: str
    counted: bool
    computation: str
    line: int
    op_name: str
    read: int
    written: int
    times: int | None
    estimated_cycles: int | None


class Schedule(NamedTuple):
    """A computation that runs, how often (None: not known), and whose each instruction is."""

    computation: Computation
    times: int | None
    parts: Mapping[str, str]


def platform_of(module: Module, text: str) -> Platform:
    """The platform, from marks that each compiler leaves in its text."""
    if re.search(r"entry_computation_layout=.*?\{[\d,]*:T\(", module.header):
        return "tpu"
    if 'scheduling_name="' in text or '"operation_queue_id"' in text:
        return "cuda"
    return "cpu"


def schedules_of(module: Module, platform: Platform) -> list[Schedule]:
    """The computations that run as schedules of their own; what is called stands after its call."""
    return [
        Schedule(computation, times, parts_of(module, computation))
        for computation, times in scheduled(module, module.entry, 1, platform)
    ]


def kernels_of(module: Module, platform: Platform, schedules: Sequence[Schedule]) -> list[Kernel]:
    """All launches, in the order of the schedules."""
    found: list[Kernel] = []
    for computation, times, parts in schedules:
        for instruction in computation.instructions:
            kind = kind_of(instruction, platform)
            if kind is None:
                continue
            found.append(
                Kernel(
                    name=instruction.name,
                    kind=kind,
                    part=parts[instruction.name],
                    counted=kind not in ("scalar", "async-copy"),
                    computation=computation.name,
                    line=instruction.line,
                    op_name=instruction.op_name,
                    read=sum(reads(module, computation, instruction).values()),
                    written=sum(writes(module, instruction)),
                    times=times,
                    estimated_cycles=instruction.estimated_cycles,
                )
            )
    return found


def kind_of(instruction: Instruction, platform: Platform) -> str | None:
    """What kind of launch an instruction is; None if it is none."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")) or _is_walked(instruction):
        return None
    if platform != "tpu":
        return opcode.removesuffix("-start")
    if opcode == "custom-call" and _TPU_VIEW.search(instruction.tail):
        return None
    if opcode in MOVE_STARTS:
        return "async-copy"
    if is_collective(opcode):
        return opcode.removesuffix("-start")
    if all(not x.dims for x in arrays(instruction.shape)) and opcode != "fusion":
        return "scalar" if opcode not in ("reduce", "custom-call") else opcode
    return opcode.removesuffix("-start")


_TPU_VIEW = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer)"')


def _is_walked(instruction: Instruction) -> bool:
    """Whether an instruction only runs others: XLA:CPU's parallel calls are one loop."""
    if instruction.opcode == "call":
        return '"outer_dimension_partitions"' not in instruction.tail
    return instruction.opcode in ("while", "conditional")


def scheduled(
    module: Module, computation: Computation, times: int | None, platform: Platform
) -> Iterator[tuple[Computation, int | None]]:
    """The computations that run as schedules of their own, and how often."""
    yield computation, times
    for instruction in computation.instructions:
        if not _is_walked(instruction):
            continue
        runs = [(name, times) for name in instruction.called]
        if instruction.opcode == "while":
            condition, body = instruction.called
            rounds = trips(module, computation, instruction)
            runs = [(condition, None), (body, None)]
            if times is not None and rounds is not None:
                runs = [(condition, times * (rounds + 1)), (body, times * rounds)]
            if instruction.trip_count is not None and platform != "tpu":
                runs = runs[1:]
        for name, often in runs:
            yield from scheduled(module, module.computations[name], often, platform)


# ------------------------------------------------------------------------------ whose work


def does_update(instruction: Instruction) -> bool:
    """Whether an instruction itself was lowered from the update."""
    return UPDATE_NAME in _components(instruction.op_name)


def calls_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a call of the CPU's kernel."""
    return f'custom_call_target="{CPU_TARGET_NAME}"' in instruction.tail


def parts_of(module: Module, computation: Computation) -> dict[str, str]:
    """For each instruction whose work it does: by its metadata, or by whom it serves.

    The compiler's own copies carry no metadata. One whose result only the update reads, or
    that moves a result of the update, is the update's; likewise the norm's.
    """
    parts = {i.name: named_part(module, i) for i in computation.instructions}
    for instruction in computation.instructions:
        if is_collective(instruction.opcode):
            shares = shares_of(module, computation, parts, instruction)
            if shares:  # not of an argument
                parts[instruction.name] = max(shares, key=lambda part: shares[part])
    for instruction in reversed(computation.instructions):
        if not parts[instruction.name] and _moves(instruction):
            served = {parts[user.name] for user in computation.users[instruction.name]}
            if served and OTHER not in served:
                parts[instruction.name] = NORM if NORM in served else UPDATE
    for instruction in computation.instructions:
        if not parts[instruction.name] and _moves(instruction):
            source = parts.get(instruction.operands[0] if instruction.operands else "", OTHER)
            parts[instruction.name] = source
    return parts


def part_of_maker(
    module: Module,
    computation: Computation,
    parts: Mapping[str, str],
    name: str,
    collective: Instruction,
) -> str:
    """Who made what is exchanged; of what the compiler put together, whose exchange it is."""
    made = origin(module, computation, name)
    nameless = not parts[made.name] and not made.op_name
    return named_part(module, collective) if nameless else parts[made.name]


def shares_of(
    module: Module, computation: Computation, parts: Mapping[str, str], collective: Instruction
) -> dict[str, int]:
    """How many bytes of what is exchanged each part made; arguments of the program nobody did.

    XLA joins exchanges: the gradients' with the norm's, for one.
    """
    shares: dict[str, int] = {}
    for name in collective.operands:
        if entry_parameter(module, computation, name) is None:
            part = part_of_maker(module, computation, parts, name, collective)
            size = sum(x.bytes for x in arrays(computation.by_name[name].shape))
            shares[part] = shares.get(part, 0) + size
    return shares


def _moves(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return _TPU_VIEW.search(instruction.tail) is not None
    return instruction.opcode in MOVES | VIEWS | {"get-tuple-element"}


def named_part(module: Module, instruction: Instruction) -> str:
    """Whose work an instruction is by its own metadata, or that of what it calls."""
    names = set(_components(instruction.op_name))
    if instruction.opcode in CALLS_ONE:
        for called in instruction.called:
            # Of equal constants the compiler keeps one, whoever else uses it; and of equal
            # indices, such as which part of an array is this device's.
            inner = [x for x in module.computations[called].instructions if x.opcode not in FREE]
            large = [x for x in inner if any(array.dims for array in arrays(x.shape))]
            for x in large or inner:
                names.update(_components(x.op_name))
    if UPDATE_NAME in names or calls_kernel(instruction):
        return UPDATE
    return NORM if NORM_NAME in names else OTHER


def _components(op_name: str) -> Iterable[str]:
    """``jit(f)/vmap()/adamw_update`` -> its parts: a function of that name is another thing.

    Where XLA has made one instruction of several, their names are joined by semicolons; or by
    colons, in brackets behind what they share.
    """
    return [name.lstrip("(").rstrip(")") for name in re.split("[/;:]", op_name)]
