"""What happens to a program's arguments: whose buffers are reused, which kernels update them.

An entry parameter's metadata holds its Python path, such as ``state.m['dense']['kernel']``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import re
from typing import Any

import jax

from adamw_xla.hlo._kernels import Kernel
from adamw_xla.hlo._syntax.flow import entry_parameter, made, makers_of
from adamw_xla.hlo._syntax.opcodes import MOVES
from adamw_xla.hlo._syntax.shapes import Array, arrays
from adamw_xla.hlo._syntax.text import Computation, Instruction, Module
from adamw_xla.hlo._unnamed import Family, families

_MOMENTS = (("m", "v"), ("mu", "nu"))
"""How states call their two moments: here, and in optax."""

_STATE = ("m", "v", "v_max", "ema", "accumulated", "mu", "nu")


@dataclasses.dataclass(frozen=True)
class Input:
    """One argument of the compiled program.

    Attributes:
      number: among the program's parameters; arguments that it does not use are not there.
      name: its Python path; empty where JAX gave none.
      shape: such as ``f32[768,2304]``.
      elements: how many elements that is.
      bytes: its size.
      donated: whether the caller gave it away; None where the text does not say.
      output: number of the output that takes its buffer, which is then updated in place;
        None if its buffer is not reused.
      copied: whether the compiler copies it all the same, to have the old value for longer.
    """

    number: int
    name: str
    shape: str
    elements: int
    bytes: int
    donated: bool | None
    output: int | None
    copied: bool


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the params, and what updates it.

    Attributes:
      name: the path of the param; without one, the part that it shares with its moments.
      shape: such as ``f32[768,2304]``: of its moments, which may be cut where the param is whole.
      elements: how many params that is.
      kernels: names of the kernels that update it.
      in_place: whether the buffers of its moments are reused.
    """

    name: str
    shape: str
    elements: int
    kernels: tuple[str, ...]
    in_place: bool


def inputs_of(module: Module, donated: Sequence[bool | None] | None) -> list[Input]:
    """All arguments of the program; ``donated`` has one entry for each, or is None."""
    found = []
    for parameter in module.entry.parameters:
        number = parameter.index
        aliased = module.aliases.get(number)
        given = donated[number] if donated is not None else None
        if aliased is not None or number in module.donors:
            given = True
        found.append(
            Input(
                number=number,
                name=parameter.op_name,
                shape=str(parameter.shape),
                elements=sum(x.elements for x in arrays(parameter.shape)),
                bytes=sum(x.bytes for x in arrays(parameter.shape)),
                donated=given,
                output=None if aliased is None else (*aliased, 0)[0],
                copied=aliased is not None and _is_copied(module.entry, parameter),
            )
        )
    return found


def _is_copied(entry: Computation, parameter: Instruction) -> bool:
    users = entry.users[parameter.name]
    spaces = (next(arrays(u.shape)).space for u in users if u.opcode in ("copy", "copy-start"))
    # A scalar's copy is free, and one into vector memory is a prefetch.
    return isinstance(parameter.shape, Array) and bool(parameter.shape.dims) and 0 in spaces


def donated_inputs(compiled: Any, module: Module) -> list[bool | None] | None:
    """Which of the program's parameters were donated, as the call's signature says.

    JAX leaves unused arguments out of the program, so the two lists are matched in order, by
    shape and by path: as early as can be, and as late. Where these disagree nothing is known
    (None), and nothing at all where there is no such match.
    """
    try:
        info = compiled.args_info
    except (AttributeError, TypeError):  # a text; Flax 0.12's wrapper, which cannot say
        return None
    flat, _ = jax.tree_util.tree_flatten_with_path(info)
    # Paths begin with (args, kwargs) and the argument's position or name.
    arguments = [(jax.tree_util.keystr(path[2:]), argument) for path, argument in flat]
    parameters = module.entry.parameters
    early = _matched(parameters, arguments)
    late = _matched(parameters[::-1], arguments[::-1])
    if early is None or late is None:
        return None
    return [a if a == b else None for a, b in zip(early, late[::-1], strict=True)]


def _matched(
    parameters: Sequence[Instruction], arguments: Sequence[tuple[str, Any]]
) -> list[bool] | None:
    """For each parameter whether the first argument behind the last one's that fits is donated."""
    rest = iter(arguments)
    donated = []
    for parameter in parameters:
        found = next((x for path, x in rest if _is_same(parameter, path, x)), None)
        if found is None:
            return None
        donated.append(bool(found.donated))
    return donated


def _is_same(parameter: Instruction, path: str, argument: Any) -> bool:
    if not isinstance(parameter.shape, Array) or not parameter.op_name.endswith(path):
        return False
    # Sharded, the program's shapes are those of one device.
    dims, whole = parameter.shape.dims, tuple(argument.shape)
    return len(dims) == len(whole) and all(
        d == n or (d and n % d == 0) for d, n in zip(dims, whole, strict=True)
    )


# ------------------------------------------------------------------------------------ leaves


def leaves_of(
    module: Module, update: Sequence[Kernel], kernels: Sequence[Kernel], inputs: Sequence[Input]
) -> list[Leaf]:
    """The leaves that ``update`` updates, in the order of the arguments.

    Without an update those whose moments any of ``kernels`` read. Of these, only kernels that
    make a result of a leaf's size update it: forward and backward passes read params too.
    """
    readers, own = _readers(module, update or kernels), {kernel.name for kernel in update}
    if not update:
        results = [made(module.computations[name]) for name in {k.computation for k in kernels}]
        makers = {name: sizes for found in results for name, sizes in found.items()}
    read = [x for x in inputs if x.number in readers]
    by_name = {x.name: x for x in inputs}
    found = []
    for second in read:
        for prefix, names, suffix in _splits(second.name):
            first = by_name.get(f"{prefix}.{names[0]}{suffix}")
            if first is None:
                continue
            moments = (first, second)
            param = _param(prefix, suffix, second, read) or _whole(prefix, suffix, second, inputs)
            touched = [n for x in (param, *moments) if x for n in readers.get(x.number, ())]
            if param is not None and param.output is not None and update:
                touched += [n for n in makers_of(module, param.output) if n in own]
            if not update:
                touched = [n for n in touched if second.elements in makers.get(n, ())]
            found.append(
                Leaf(
                    name=param.name if param else suffix,
                    shape=second.shape,
                    elements=second.elements,
                    kernels=tuple(dict.fromkeys(touched)),
                    in_place=all(x.output is not None for x in moments),
                )
            )
            break
    if not found and update:
        found = [_unnamed(family, inputs, readers) for family in families(module)]
    return found


def _unnamed(family: Family, inputs: Sequence[Input], readers: Mapping[int, list[str]]) -> Leaf:
    param, moments = inputs[family.param], [inputs[number] for number in family.moments]
    touched = [name for x in (param, *moments) for name in readers.get(x.number, ())]
    return Leaf(
        name=param.name,
        shape=param.shape,
        elements=param.elements,
        kernels=tuple(dict.fromkeys(touched)),
        in_place=all(x.output is not None for x in moments),
    )


def _readers(module: Module, kernels: Iterable[Kernel]) -> dict[int, list[str]]:
    """Entry parameter -> the kernels that compute with it; what only moves it does not."""
    found: dict[int, list[str]] = {}
    for kernel in kernels:
        computation = module.computations[kernel.computation]
        instruction = computation.by_name[kernel.name]
        if instruction.opcode in MOVES:
            continue
        largest = max((x.elements for x in arrays(instruction.shape)), default=0)
        for operand in dict.fromkeys(instruction.operands):
            number = entry_parameter(module, computation, operand)
            if number is None:
                continue
            # Whatever makes a scalar out of a leaf does not update it.
            whole = sum(x.elements for x in arrays(module.entry.parameters[number].shape))
            if largest > 1 or whole == 1:
                found.setdefault(number, []).append(kernel.name)
    return found


def _splits(name: str) -> Iterator[tuple[str, tuple[str, str], str]]:
    """``state.v['w']`` -> ``("state", ("m", "v"), "['w']")``, for each way to read it."""
    for names in _MOMENTS:
        for found in re.finditer(rf"\.{names[1]}(?=$|[.\[])", name):
            yield name[: found.start()], names, name[found.end() :]


def _whole(prefix: str, suffix: str, moment: Input, inputs: Sequence[Input]) -> Input | None:
    """The param of a moment that is cut smaller than its param is, as ZeRO cuts it."""
    state = {f"{prefix}.{field}{suffix}" for field in _STATE}
    found = [
        x
        for x in inputs
        if x.name.endswith(suffix)
        and x.name not in state
        and x.output is not None
        and x.elements > moment.elements > 0
        and x.elements % moment.elements == 0
    ]
    return found[0] if len(found) == 1 else None


def _param(prefix: str, suffix: str, moment: Input, read: Sequence[Input]) -> Input | None:
    """The param of a moment: of its path and size, and of no state; best one that is reused."""
    state = {f"{prefix}.{field}{suffix}" for field in _STATE}
    same = [
        x
        for x in read
        if x.elements == moment.elements and x.name.endswith(suffix) and x.name not in state
    ]
    reused = [x for x in same if x.output is not None]
    return next(iter(reused or same), None)
