"""The leaves of the params: which arguments are one's moments, and which kernels update it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import re

from adamw_xla.hlo._collectives import Collective, Holders
from adamw_xla.hlo._inputs import Input
from adamw_xla.hlo._kernels import Kernel
from adamw_xla.hlo._syntax.flow import entry_parameter, made, makers_of, origin, result_shape
from adamw_xla.hlo._syntax.opcodes import MOVES
from adamw_xla.hlo._syntax.shapes import arrays
from adamw_xla.hlo._syntax.text import Module
from adamw_xla.hlo._unnamed import Family, families

_FIELDS = {
    "v": ("m", "v", "v_max", "ema", "accumulated", "remainder"),
    "words": ("words", "ema", "accumulated", "remainder"),
    "nu": ("mu", "nu", "nu_max"),
}
"""How states call their second moment, here and in optax, or the words that hold both; and all
that they keep of a leaf."""

_KEYS = {"velocity": ("momentum", "velocity", "velocity_hat")}
"""The same in the keys of Keras' variables, of which a leaf has some."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the params, and what updates it.

    Attributes:
      name: the path of the param; without one, the part that it shares with its moments.
      shape: such as ``f32[768,2304]``: of its moments, which may be cut where the param is whole.
      elements: how many params that is.
      kernels: names of the kernels that update it.
      in_place: whether the buffers of its moments are reused.
      param: which of the program's arguments the param is; None where it is none.
      moments: which ones its moments are, and what else is kept of it, where paths name it.
      gradient_sums: names of the collectives that sum its gradient over devices, where what comes
        out goes to those kernels as it is.
    """

    name: str
    shape: str
    elements: int
    kernels: tuple[str, ...]
    in_place: bool
    param: int | None
    moments: tuple[int, ...]
    gradient_sums: tuple[str, ...] = ()


def leaves_of(
    module: Module, update: Sequence[Kernel], kernels: Sequence[Kernel], inputs: Sequence[Input]
) -> list[Leaf]:
    """The leaves that ``update`` updates, in the order of the arguments.

    Without an update those whose moments any of ``kernels`` read. Of these, only kernels that
    make a result of a leaf's size update it: forward and backward passes read params too.
    """
    readers = _readers(module, update or kernels)
    own = {kernel.name for kernel in update or kernels}
    if not update:
        results = [made(module.computations[name]) for name in {k.computation for k in kernels}]
        makers = {name: sizes for found in results for name, sizes in found.items()}
    read = [x for x in inputs if x.number in readers]
    by_name = {x.name: x for x in inputs}
    found = []
    for second in read:
        for of_leaf in _readings(second.name):
            if of_leaf.beside not in by_name:
                continue
            moments = tuple(by_name[name] for name in of_leaf.state if name in by_name)
            param = _param(of_leaf, second, read) or _whole(of_leaf, second, inputs)
            touched = [n for x in (param, *moments) if x for n in readers.get(x.number, ())]
            if not update:
                touched = [n for n in touched if second.elements in makers.get(n, ())]
            if param is not None:
                touched += _making(module, param, own)
            found.append(
                Leaf(
                    name=param.name if param else of_leaf.suffix,
                    shape=second.shape,
                    elements=second.elements,
                    kernels=tuple(dict.fromkeys(touched)),
                    in_place=all(x.output is not None for x in moments),
                    param=param.number if param else None,
                    moments=tuple(x.number for x in moments),
                )
            )
            break
    if not found:
        makers = {} if update else makers
        known = families(module, named=bool(update))
        found = [_unnamed(module, family, inputs, readers, makers, own) for family in known]
    return found


def with_gradient_sums(
    module: Module,
    leaves: Iterable[Leaf],
    kernels: Iterable[Kernel],
    holders: Holders,
) -> list[Leaf]:
    """The leaves with what sums their gradients.

    An operand is the gradient of the leaves of its size, or that are of it what each of the devices
    has that sum it: a kernel may update several, and may read what a forward pass has summed.

    Args:
      module: the program.
      leaves: as ``leaves_of`` found them.
      kernels: all of the program.
      holders: its collectives, by the instructions that hold them.
    """
    around = {kernel.name: module.computations[kernel.computation] for kernel in kernels}

    @functools.cache
    def summed(kernel: str) -> list[tuple[int, Collective]]:
        """How many elements an operand has that a collective sums, and which."""
        where, found = around[kernel], []
        for operand in where.by_name[kernel].operands:
            maker = origin(module, where, operand).name
            elements = sum(x.elements for x in arrays(where.by_name[operand].shape))
            held = holders.get((maker, where.name), ())
            found += [(elements, c) for c in held if c.kind in _SUMS]
        return found

    def sums(leaf: Leaf) -> Iterator[str]:
        for kernel in leaf.kernels:
            for elements, c in summed(kernel):
                if elements in (leaf.elements, leaf.elements * (c.devices or 1)):
                    yield c.name

    return [dataclasses.replace(x, gradient_sums=tuple(dict.fromkeys(sums(x)))) for x in leaves]


_SUMS = ("all-reduce", "reduce-scatter")


def _making(module: Module, param: Input, own: set[str]) -> list[str]:
    """The kernels that make a new param: the one that computes it, and what brings it together."""
    return [] if param.output is None else [n for n in makers_of(module, param.output) if n in own]


def _unnamed(
    module: Module,
    family: Family,
    inputs: Sequence[Input],
    readers: Mapping[int, list[str]],
    makers: Mapping[str, set[int]],
    own: set[str],
) -> Leaf:
    param, moments = inputs[family.param], [inputs[number] for number in family.moments]
    kept = (*moments, param)[0]
    touched = [name for x in (param, *moments) for name in readers.get(x.number, ())]
    if makers:
        touched = [name for name in touched if kept.elements in makers.get(name, ())]
    touched += _making(module, param, own)
    return Leaf(
        name=param.name,
        shape=kept.shape,
        elements=kept.elements,
        kernels=tuple(dict.fromkeys(touched)),
        in_place=all(x.output is not None for x in moments),
        param=family.param,
        moments=family.moments,
    )


def _readers(module: Module, kernels: Iterable[Kernel]) -> dict[int, list[str]]:
    """Entry parameter -> the kernels that compute with it; what only moves it does not."""
    found: dict[int, list[str]] = {}
    for kernel in kernels:
        computation = module.computations[kernel.computation]
        instruction = computation.by_name[kernel.name]
        if instruction.opcode in MOVES:
            continue
        largest = max((x.elements for x in arrays(result_shape(instruction))), default=0)
        for operand in dict.fromkeys(instruction.operands):
            number = entry_parameter(module, computation, operand)
            if number is None:
                continue
            # Whatever makes a scalar out of a leaf does not update it.
            whole = sum(x.elements for x in arrays(module.entry.parameters[number].shape))
            if largest > 1 or whole == 1:
                found.setdefault(number, []).append(kernel.name)
    return found


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What the path of a second moment says of its leaf, in one way to read it.

    Attributes:
      suffix: that the path of the param ends with, in some spelling.
      state: paths of all that is kept of the leaf, the first moment first.
      beside: the path of what must be there too, or it is no moment: the first one or, of words,
        the state's count.
      is_key: whether the suffix is the last key, with underscores where the param has slashes.
    """

    suffix: str
    state: tuple[str, ...]
    beside: str
    is_key: bool

    def is_of(self, path: str) -> bool:
        """Whether a path may be that of the param."""
        if not self.is_key:
            return path.endswith(self.suffix)
        found = _LAST_KEY.search(path)
        return found is not None and found[1].replace("/", "_") == self.suffix


_LAST_KEY = re.compile(r"\['([^']*)'\]$")


def _readings(name: str) -> Iterator[_Reading]:
    """``state.v['w']`` -> suffix ``['w']``, state ``state.m['w']`` and so on."""
    for second, others in _FIELDS.items():
        for found in re.finditer(rf"\.{second}(?=$|[.\[])", name):
            prefix, suffix = name[: found.start()], name[found.end() :]
            state = tuple(f"{prefix}.{other}{suffix}" for other in others)
            # Around all of it optax' MultiSteps keeps the gradients that are added up.
            around, inner, _ = prefix.rpartition(".inner_opt_state")
            state += (f"{around}.acc_grads{suffix}",) if inner else ()
            beside = f"{prefix}.count" if state[0] == name else state[0]
            yield _Reading(suffix, state, beside, is_key=False)
    for second, others in _KEYS.items():
        # ``variables['adam_w/dense_kernel_velocity']`` is of ``params['dense/kernel']``.
        if (key := _LAST_KEY.search(name)) is None or not key[1].endswith(f"_{second}"):
            continue
        stem = key[1].removesuffix(second)
        state = tuple(f"{name[: key.start()]}['{stem}{other}']" for other in others)
        suffix = stem.rpartition("/")[2].removesuffix("_")
        yield _Reading(suffix, state, state[0], is_key=True)


def _whole(of_leaf: _Reading, moment: Input, inputs: Sequence[Input]) -> Input | None:
    """The param of a moment that is cut smaller than its param is, as ZeRO cuts it."""
    found = [
        x
        for x in inputs
        if of_leaf.is_of(x.name)
        and x.name not in of_leaf.state
        and x.elements > moment.elements > 0
        and x.elements % moment.elements == 0
    ]
    found = [x for x in found if x.output is not None] or found
    return found[0] if len(found) == 1 else None


def _param(of_leaf: _Reading, moment: Input, read: Sequence[Input]) -> Input | None:
    """The param of a moment: of its path and size, and of no state; best one that is reused."""
    same = [
        x
        for x in read
        if x.elements == moment.elements and of_leaf.is_of(x.name) and x.name not in of_leaf.state
    ]
    reused = [x for x in same if x.output is not None]
    return next(iter(reused or same), None)
