"""What happens to a program's arguments: where they lie, and whose buffers are reused.

An entry parameter's metadata holds its Python path, such as ``state.m['dense']['kernel']``.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding

from adamw_xla.hlo._syntax.shapes import HOST, Array, arrays
from adamw_xla.hlo._syntax.text import Computation, Instruction, Module


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
      axes: for each dimension the axes of the mesh that it is cut over, without those of size 1;
        None where that is not known: of a text alone, and of what has no ``NamedSharding``.
      memory: such as "device" or "pinned_host"; of a text alone None, or "host".
    """

    number: int
    name: str
    shape: str
    elements: int
    bytes: int
    donated: bool | None
    output: int | None
    copied: bool
    axes: tuple[tuple[str, ...], ...] | None
    memory: str | None


@dataclasses.dataclass(frozen=True)
class Argument:
    """What the signature of a call says of one argument.

    Attributes:
      donated: whether the caller gives it away.
      sharding: where it lies; None where that is not known.
    """

    donated: bool
    sharding: Sharding | None


def arguments_of(compiled: Any, module: Module) -> list[Argument | None]:
    """What the call's signature says of each of the program's parameters.

    JAX leaves unused arguments out of the program, so the two lists are matched in order, by
    shape and by path: as early as can be, and as late. Where these disagree nothing is known
    (None), and nothing at all where there is no such match.
    """
    unknown: list[Argument | None] = [None] * len(module.entry.parameters)
    try:
        info = compiled.args_info
    except (AttributeError, TypeError):  # a text; Flax 0.12's wrapper, which cannot say
        return unknown
    treedef: Any
    flat, treedef = jax.tree_util.tree_flatten_with_path(info)
    # Paths begin with (args, kwargs) and the argument's position or name.
    paths = [jax.tree_util.keystr(path[2:]) for path, _ in flat]
    shardings = _shardings(compiled, treedef)
    arguments = [
        (path, x.shape, Argument(bool(x.donated), sharding))
        for path, (_, x), sharding in zip(paths, flat, shardings, strict=True)
    ]
    parameters = module.entry.parameters
    early = _matched(parameters, arguments)
    late = _matched(parameters[::-1], arguments[::-1])
    if early is None or late is None:
        return unknown
    return [a if a == b else None for a, b in zip(early, late[::-1], strict=True)]


def _shardings(compiled: Any, treedef: Any) -> list[Sharding | None]:
    """Of each argument, used or not; None where JAX does not say."""
    try:
        found = treedef.flatten_up_to(compiled.input_shardings)
    except (AttributeError, TypeError, ValueError):
        return [None] * treedef.num_leaves
    return [x if isinstance(x, Sharding) else None for x in found]


def _matched(
    parameters: Sequence[Instruction], arguments: Sequence[tuple[str, Any, Argument]]
) -> list[Argument] | None:
    """For each parameter the first argument that fits, behind that of the last parameter."""
    rest = iter(arguments)
    found = []
    for parameter in parameters:
        match = next((x for path, shape, x in rest if _is_same(parameter, path, shape)), None)
        if match is None:
            return None
        found.append(match)
    return found


def inputs_of(
    module: Module, arguments: Sequence[Argument | None], donated: Sequence[bool] | None
) -> list[Input]:
    """All arguments of the program.

    Args:
      module: the program.
      arguments: what is known of each from the call's signature.
      donated: whether each was given away, where the caller says it; else None.
    """
    found = []
    for parameter, argument in zip(module.entry.parameters, arguments, strict=True):
        number = parameter.index
        aliased = module.aliases.get(number)
        given = argument.donated if argument is not None else None
        given = donated[number] if donated is not None else given
        if aliased is not None or number in module.donors:
            given = True
        sharding = argument.sharding if argument is not None else None
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
                axes=_axes(sharding, parameter),
                memory=_memory(sharding, parameter),
            )
        )
    return found


def _axes(sharding: Sharding | None, parameter: Instruction) -> tuple[tuple[str, ...], ...] | None:
    if not isinstance(sharding, NamedSharding) or not isinstance(parameter.shape, Array):
        return None
    entries = [() if x is None else x if isinstance(x, tuple) else (x,) for x in sharding.spec]
    sizes = sharding.mesh.shape
    cutting = [tuple(name for name in names if sizes[name] > 1) for names in entries]
    return (*cutting, *((),) * (len(parameter.shape.dims) - len(cutting)))


def _memory(sharding: Sharding | None, parameter: Instruction) -> str | None:
    if any(x.space == HOST for x in arrays(parameter.shape)):
        return "host" if sharding is None else sharding.memory_kind
    return None if sharding is None else sharding.memory_kind


def _is_copied(entry: Computation, parameter: Instruction) -> bool:
    users = entry.users[parameter.name]
    spaces = (next(arrays(u.shape)).space for u in users if u.opcode in ("copy", "copy-start"))
    # A scalar's copy is free, and one into vector memory is a prefetch.
    return isinstance(parameter.shape, Array) and bool(parameter.shape.dims) and 0 in spaces


def _is_same(parameter: Instruction, path: str, shape: Sequence[int]) -> bool:
    if not isinstance(parameter.shape, Array) or not parameter.op_name.endswith(path):
        return False
    # Sharded, the program's shapes are those of one device.
    dims, whole = parameter.shape.dims, tuple(shape)
    return len(dims) == len(whole) and all(
        d == n or (d and n % d == 0) for d, n in zip(dims, whole, strict=True)
    )
