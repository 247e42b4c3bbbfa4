"""Whether the parts of a module agree, so that no figure is read from a text that is damaged.

XLA's own verifier asks much the same before it runs a program; a text may have been cut, edited
or written by a compiler that says things in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import math
import re

from adamw_xla.hlo._syntax.flow import result_shape
from adamw_xla.hlo._syntax.opcodes import (
    ARITY,
    ELEMENTWISE,
    FREE,
    IN_PLACE,
    MOVES,
    SAME_TYPE,
    is_known,
)
from adamw_xla.hlo._syntax.shapes import Array, Shape, Tuple, arrays, ints
from adamw_xla.hlo._syntax.text import Computation, HloSyntaxError, Instruction, Module


def check(module: Module) -> None:
    """Raises ``HloSyntaxError``, with the line, where a module contradicts itself."""
    known: dict[str, Computation] = {}
    for computation in module.computations.values():
        _Check(computation, known).all()
        known[computation.name] = computation
    _header(module)


def _header(module: Module) -> None:
    """The first line says which arguments' buffers become which results'."""
    header, inputs = module.header, len(module.entry.parameters)
    depth = [0]
    for bracket in re.findall(r'"(?:[^"\\]|\\.)*"|[()\[\]{}]', header):
        depth.append(depth[-1] + {"(": 1, "[": 1, "{": 1, '"': 0}.get(bracket[0], -1))
    aliased = re.search(r"input_output_alias=\{(.*?)\}, \w+=", f"{header}, end=")
    pairs = re.sub(_ALIAS, "", aliased[1]) if aliased else ""
    if min(depth) < 0 or depth[-1] != 0 or pairs.strip(" ,"):
        raise _error(module.line, "the module's first line cannot be read")
    numbers = {*module.aliases, *module.donors}
    if numbers and max(numbers) >= inputs:
        raise _error(module.line, f"parameter {max(numbers)} is given away, of {inputs} that are")


_ALIAS = re.compile(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}(?:, [\w-]+)?\)")


class _Check:
    """One computation; ``known`` are those that stand before it, which it may call."""

    def __init__(self, computation: Computation, known: dict[str, Computation]) -> None:
        self._computation, self._known = computation, known
        self._made: dict[str, Instruction] = {}

    def all(self) -> None:
        computation = self._computation
        for instruction in computation.instructions:
            self._instruction(instruction)
        roots = sum(i.is_root for i in computation.instructions)
        if roots != 1:
            raise _error(computation.line, f"%{computation.name} has {roots} ROOT instructions")
        numbers = sorted(i.operands[0] for i in self._made.values() if i.opcode == "parameter")
        if numbers != sorted(map(str, range(len(numbers)))):
            text = ", ".join(numbers)
            raise _error(computation.line, f"%{computation.name} has the parameters {text}")
        if computation.signature is not None:
            *taken, result = computation.signature
            own = [x.shape for x in computation.parameters]
            if not _all_same(taken, own) or not _same(result, computation.root.shape):
                raise _error(
                    computation.line,
                    f"%{computation.name} says that it takes or returns other shapes than it does",
                )

    def _instruction(self, x: Instruction) -> None:
        if not is_known(x.opcode):
            raise _error(x.line, f"{x.opcode} is no operation that is known")
        if x.name in self._made:
            raise _error(x.line, f"%{x.name} stands on line {self._made[x.name].line} too")
        operands = []
        if x.opcode == "constant" and "%" in x.operands[0]:
            raise _error(x.line, f"%{x.name} is a constant of other values")
        if x.opcode not in ("parameter", "constant"):
            for name in x.operands:
                if name not in self._made:
                    raise _error(x.line, f"%{name} is not made before it is used")
                operands.append(self._made[name].shape)
        if x.called and x.opcode in FREE | MOVES:
            raise _error(x.line, f"%{x.name}, {x.opcode}, calls something")
        for name in x.called:
            if name not in self._known:
                raise _error(x.line, f"%{name} is called, and does not stand before")
        try:
            is_sound = x.attributes is not None and all(self._rules(x, operands))
        except (KeyError, IndexError, ValueError, AttributeError):  # an attribute is not there
            is_sound = False
        if not is_sound:
            raise _error(
                x.line, f"%{x.name}, {x.opcode}, contradicts its operands or what it calls"
            )
        self._made[x.name] = x

    def _rules(self, x: Instruction, operands: Sequence[Shape]) -> Iterator[bool]:
        if x.opcode.endswith("-start") and isinstance(x.shape, Tuple):
            yield from self._start(x, operands)
            return
        yield len(operands) == ARITY.get(x.opcode, len(operands))
        rule = _RULES.get(x.opcode)
        if rule is not None:
            yield rule(x, operands)
        if x.opcode in ("all-reduce-done", "copy-done", "fusion-done"):
            yield _same(result_shape(self._made[x.operands[0]]), x.shape)
        if x.opcode in ("fusion", "call"):
            (called,) = (self._known[name] for name in x.called)
            yield _takes(called, operands) and _same(called.root.shape, x.shape)
        elif x.opcode == "while":
            condition, body = (self._known[name] for name in x.called)
            yield _takes(condition, operands) and _takes(body, operands)
            yield _same(body.root.shape, x.shape) and _same(operands[0], x.shape)
            yield isinstance(condition.root.shape, Array) and condition.root.shape.dtype == "pred"
        elif x.opcode == "conditional":
            branches = [self._known[name] for name in x.called]
            yield len(branches) == len(operands) - 1
            for branch, operand in zip(branches, operands[1:], strict=True):
                yield _takes(branch, [operand]) and _same(branch.root.shape, x.shape)

    def _start(self, x: Instruction, operands: Sequence[Shape]) -> Iterator[bool]:
        """What goes on beside others; each compiler has kinds of its own, which are let pass."""
        result = result_shape(x)
        if x.opcode in ("copy-start", "all-reduce-start"):
            yield _all_same(list(_parts(result)), operands) or _same(result, operands[0])
        elif x.opcode == "fusion-start":
            (called,) = (self._known[name] for name in x.called)
            yield _takes(called, operands) and _same(called.root.shape, result)


def _error(line: int, what: str) -> HloSyntaxError:
    return HloSyntaxError(f"hlo: line {line}: {what}; is the text damaged?")


_Rule = Callable[[Instruction, Sequence[Shape]], bool]
"""Whether an instruction's shape is what its operands make it."""

# -------------------------------------------------------------------------------- shapes


def _same(one: Shape, other: Shape) -> bool:
    """Whether dtypes and sizes are; layouts and memory spaces may differ."""
    if isinstance(one, Array) and isinstance(other, Array):
        return one.dtype == other.dtype and one.dims == other.dims
    if isinstance(one, Tuple) and isinstance(other, Tuple):
        return _all_same(one.parts, other.parts)
    return False


def _all_same(these: Sequence[Shape], those: Sequence[Shape]) -> bool:
    pairs = zip(these, those, strict=False)
    return len(these) == len(those) and all(_same(a, b) for a, b in pairs)


def _parts(shape: Shape) -> Sequence[Shape]:
    return shape.parts if isinstance(shape, Tuple) else (shape,)


def _takes(called: Computation, operands: Sequence[Shape]) -> bool:
    return _all_same([x.shape for x in called.parameters], operands)


def _dims(shape: Shape) -> tuple[int, ...]:
    if isinstance(shape, Array):
        return shape.dims
    raise ValueError


def _listed(x: Instruction, name: str) -> tuple[int, ...]:
    return ints(x.attributes.get(name, ""))


# ------------------------------------------------------------- what an operation returns


def _mixes(these: Sequence[Shape]) -> bool:
    """Whether one instruction may have them all: TPUs' compute with floats of several sizes."""
    dtypes = {array.dtype for shape in these for array in arrays(shape)}
    return len(dtypes) == 1 or all(x == "bf16" or re.match("f(8|16|32)", x) for x in dtypes)


def _like_all(x: Instruction, operands: Sequence[Shape]) -> bool:
    same = {_dims(operand) for operand in operands} == {_dims(x.shape)}
    return same and _mixes((x.shape, *operands))


def _like_first(x: Instruction, operands: Sequence[Shape]) -> bool:
    return _same(operands[0], x.shape)


def _as_large_as_all(x: Instruction, operands: Sequence[Shape]) -> bool:
    """Element by element; scalars may stand beside arrays in ``clamp`` and ``select``."""
    sizes = {_dims(operand) for operand in operands} - ({()} if len(operands) == 3 else set())
    return sizes <= {_dims(x.shape)}


def _selected(x: Instruction, operands: Sequence[Shape]) -> bool:
    return _as_large_as_all(x, operands) and _mixes((x.shape, *operands[1:]))


def _as_many_elements(x: Instruction, operands: Sequence[Shape]) -> bool:
    return math.prod(_dims(x.shape)) == math.prod(_dims(operands[0]))


def _no_more_bytes(x: Instruction, operands: Sequence[Shape]) -> bool:
    """A TPU's may also be of the first elements alone, or of bytes with all that pads them."""
    made, given = list(arrays(x.shape)), list(arrays(operands[0]))
    if sum(a.bytes for a in made) <= sum(a.bytes for a in given):
        return True
    return sum(a.padded_bytes for a in made) == sum(a.padded_bytes for a in given)


def _sorted(x: Instruction, operands: Sequence[Shape]) -> bool:
    return _all_same(_parts(x.shape), operands)


def _copied(x: Instruction, operands: Sequence[Shape]) -> bool:
    """A TPU's may be of another dtype."""
    return _same(operands[0], x.shape) or _dims(x.shape) == _dims(operands[0])


def _tuple(x: Instruction, operands: Sequence[Shape]) -> bool:
    return isinstance(x.shape, Tuple) and _all_same(x.shape.parts, operands)


def _element(x: Instruction, operands: Sequence[Shape]) -> bool:
    whole = operands[0]
    return isinstance(whole, Tuple) and _same(whole.parts[x.index], x.shape)


def _of_one_kind(rule: _Rule) -> _Rule:
    """The rule, for what changes sizes alone."""

    def both(x: Instruction, operands: Sequence[Shape]) -> bool:
        return _mixes((x.shape, *operands)) and rule(x, operands)

    return both


def _broadcast(x: Instruction, operands: Sequence[Shape]) -> bool:
    places, dims = _listed(x, "dimensions"), _dims(x.shape)
    return tuple(dims[place] for place in places) == _dims(operands[0])


def _padded(x: Instruction, operands: Sequence[Shape]) -> bool:
    return len(_dims(x.shape)) == len(_dims(operands[0])) and not _dims(operands[1])


def _transposed(x: Instruction, operands: Sequence[Shape]) -> bool:
    dims = _dims(operands[0])
    return tuple(dims[place] for place in _listed(x, "dimensions")) == _dims(x.shape)


def _sliced(x: Instruction, operands: Sequence[Shape]) -> bool:
    limits = ints(" ".join(part.split(":")[1] for part in x.attributes["slice"].split(",")))
    starts = ints(" ".join(part.split(":")[0] for part in x.attributes["slice"].split(",")))
    whole, dims = _dims(operands[0]), _dims(x.shape)
    within = all(n <= size for n, size in zip(limits, whole, strict=True))
    cut = zip(dims, starts, limits, strict=True)
    return within and all(n <= limit - start for n, start, limit in cut)


def _sliced_anywhere(x: Instruction, operands: Sequence[Shape]) -> bool:
    dims = _dims(x.shape)
    fits = all(n <= size for n, size in zip(dims, _dims(operands[0]), strict=True))
    return fits and _listed(x, "dynamic_slice_sizes") == dims


def _joined(x: Instruction, operands: Sequence[Shape]) -> bool:
    (place,) = _listed(x, "dimensions")
    dims = [list(_dims(operand)) for operand in operands]
    long = sum(sizes[place] for sizes in dims)
    return all((*s[:place], long, *s[place + 1 :]) == _dims(x.shape) for s in dims)


def _reduced(x: Instruction, operands: Sequence[Shape]) -> bool:
    gone, dims = _listed(x, "dimensions"), _dims(operands[0])
    kept = tuple(n for place, n in enumerate(dims) if place not in gone)
    return all(array.dims == kept for array in arrays(x.shape))


def _dot(x: Instruction, operands: Sequence[Shape]) -> bool:
    sides = list(zip(("lhs", "rhs"), map(_dims, operands), strict=True))
    batch, summed = (
        [tuple(dims[k] for k in _listed(x, f"{side}_{what}_dims")) for side, dims in sides]
        for what in ("batch", "contracting")
    )
    free = [math.prod(dims) for _, dims in sides]
    made = free[0] * free[1] // (math.prod(batch[0]) * math.prod(summed[0]) ** 2 or 1)
    return batch[0] == batch[1] and summed[0] == summed[1] and made == math.prod(_dims(x.shape))


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(ELEMENTWISE, _as_large_as_all),
    **dict.fromkeys(SAME_TYPE, _like_all),
    **dict.fromkeys(IN_PLACE, _like_first),
    **dict.fromkeys(("opt-barrier", "reverse"), _like_first),
    "bitcast": _no_more_bytes,
    "broadcast": _of_one_kind(_broadcast),
    "concatenate": _of_one_kind(_joined),
    "copy": _copied,
    "dot": _dot,
    "dynamic-slice": _sliced_anywhere,
    "get-tuple-element": _element,
    "pad": _of_one_kind(_padded),
    "reduce": _reduced,
    "reshape": _of_one_kind(_as_many_elements),
    "select": _selected,
    "slice": _of_one_kind(_sliced),
    "sort": _sorted,
    "transpose": _of_one_kind(_transposed),
    "tuple": _tuple,
}
