"""Reads the text of an optimized HLO module: computations, instructions, shapes, aliases.

The grammar is that of ``HloModule::ToString`` in XLA, one instruction per line:

    [ROOT] %name = shape opcode(operands), attribute=value, ..., metadata={...}

Only what the report needs is taken apart; attributes are read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import re

from adamw_xla.hlo._syntax.shapes import Shape, ints, read_shape


class HloSyntaxError(ValueError):
    """The text is not an HLO module that this reader understands."""


# ------------------------------------------------------------------------- the module's parts


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: of the result.
      opcode: such as ``fusion``.
      operands: the names of the operands; of a parameter its number, of a constant its value.
      tail: the attributes, as text.
      is_root: whether it is the computation's result.
      line: its line in the text, counted from 1.
    """

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    tail: str
    is_root: bool
    line: int

    @property
    def op_name(self) -> str:
        """The path in ``metadata``: of an argument its Python path, else JAX's name stack."""
        found = _OP_NAME.search(self.tail)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """The attributes by name; values are text."""
        return dict(_pairs(self.tail))

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls, in order."""
        names = []
        for key, value in _CALLS.findall(self.tail):
            del key
            names += [part.strip().lstrip("%") for part in value.strip("{}").split(",")]
        return tuple(name for name in names if name)

    @property
    def index(self) -> int:
        """Of a ``get-tuple-element`` the index, of a ``parameter`` the number."""
        if self.opcode == "parameter":
            return int(self.operands[0])
        return int(self.attributes["index"])

    @property
    def trip_count(self) -> int | None:
        """How often a ``while`` runs, where the compiler knows."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.tail)
        return int(found[1]) if found else None

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's own estimate (TPU), never a measurement."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.tail)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions.

    Attributes:
      name: without the percent sign.
      instructions: in their order.
      line: where it begins in the text, counted from 1.
      signature: the shapes of its parameters and of its result, as its first line says; None
        where it does not.
    """

    name: str
    instructions: tuple[Instruction, ...]
    line: int
    signature: tuple[Shape, ...] | None

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by their names."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction's result."""
        found: dict[str, list[Instruction]] = {i.name: [] for i in self.instructions}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                if operand in found:
                    found[operand].append(instruction)
        return found

    @functools.cached_property
    def root(self) -> Instruction:
        """The result."""
        return next(i for i in self.instructions if i.is_root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, in the order of their numbers."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=lambda i: i.index)


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program.

    Attributes:
      name: of the module, such as ``jit_train_step``.
      header: its first line.
      line: where that stands in the text, counted from 1.
      computations: all of them, by name.
      entry: the one that runs.
    """

    name: str
    header: str
    line: int
    computations: Mapping[str, Computation]
    entry: Computation

    @functools.cached_property
    def aliases(self) -> dict[int, tuple[int, ...]]:
        """Entry parameter -> index path of the output that takes its buffer."""
        text = _balanced(self.header, "input_output_alias=")
        pairs = re.findall(r"\{([\d, ]*)\}: \((\d+),", text)
        return {int(number): ints(output) for output, number in pairs}

    @functools.cached_property
    def donors(self) -> frozenset[int]:
        """Entry parameters that were given away, and whose buffers no output took."""
        text = _balanced(self.header, "buffer_donor=")
        return frozenset(int(number) for number in re.findall(r"\((\d+),", text))


# ----------------------------------------------------------------------------------- reading


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      HloSyntaxError: it is no HLO text, or not that of a compiled program.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("HloModule ")), None)
    if start is None:
        raise HloSyntaxError(
            "hlo: the text has no line that begins with HloModule; it must be optimized HLO: "
            "jax.jit(...).lower(...).compile().as_text(), or a dump named "
            "*after_optimizations.txt."
        )
    header = lines[start]
    if "is_scheduled=true" not in header:
        raise HloSyntaxError(
            "hlo: the module is not scheduled, so no compiler has decided on its kernels yet; "
            "pass the compiled program: jax.jit(...).lower(...).compile()."
        )
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    opened: re.Match[str] | None = None
    began, body = 0, list[Instruction]()
    for number, line in enumerate(lines[start + 1 :], start=start + 2):
        if opened is None:
            opened, began, body = _COMPUTATION.match(line), number, []
            if opened is None and _HEAD.match(line):
                raise HloSyntaxError(f"hlo: line {number} stands in no computation: {_cut(line)}")
        elif line.startswith("}"):
            computation = Computation(opened[2], tuple(body), began, _signature(opened[3], began))
            if computation.name in computations:
                raise HloSyntaxError(f"hlo: line {began}: %{computation.name} stands there twice.")
            computations[computation.name] = computation
            entry = computation if opened[1] else entry
            opened = None
        elif line.strip():
            body.append(_instruction(line, number))
    if opened is not None:
        raise HloSyntaxError(
            f"hlo: %{opened[2]}, which begins on line {began}, does not end; is the text cut off?"
        )
    if entry is None:
        raise HloSyntaxError("hlo: the module has no ENTRY computation; is the text cut off?")
    name = header.split()[1].rstrip(",")
    return Module(name, header, start + 1, computations, entry)


def _cut(line: str) -> str:
    return repr(line.strip()[:80])


def _signature(text: str | None, number: int) -> tuple[Shape, ...] | None:
    """``(p: f32[2], q: s32[]) -> f32[2]`` -> the three shapes."""
    if text is None:
        return None
    found, at = [], 1
    try:
        end = _closing(text, 0)
        while (name := _PARAMETER.match(text, at, end)) is not None:
            shape, at = read_shape(text, name.end())
            found.append(shape)
        result, _ = read_shape(text, text.index("->", end) + 2)
    except (ValueError, IndexError):
        raise HloSyntaxError(f"hlo: line {number} cannot be read: {_cut(text)}") from None
    return (*found, result)


def _instruction(line: str, number: int) -> Instruction:
    found = _HEAD.match(line)
    if found is None:
        raise HloSyntaxError(f"hlo: line {number} is no instruction: {_cut(line)}")
    try:
        shape, at = read_shape(line, found.end())
        opcode = _OPCODE.match(line, at)
        if opcode is None:
            raise ValueError
        end = _closing(line, opcode.end() - 1)
    except (ValueError, IndexError):
        raise HloSyntaxError(f"hlo: line {number} cannot be read: {_cut(line)}") from None
    inside = line[opcode.end() : end]
    return Instruction(
        name=found[2],
        shape=shape,
        opcode=opcode[1],
        operands=_operands(opcode[1], inside),
        tail=line[end + 1 :].lstrip(", "),
        is_root=found[1] is not None,
        line=number,
    )


def _operands(opcode: str, inside: str) -> tuple[str, ...]:
    """``%a, f32[2]{0} %b, /*index=5*/%c`` -> ``("a", "b", "c")``."""
    if opcode in ("parameter", "constant"):
        return (inside.strip(),)
    if "%" in inside:
        return tuple(re.findall(r"%([\w.\-]+)", inside))
    words = (part.split() for part in _TYPE.sub("", _COMMENT.sub("", inside)).split(","))
    return tuple(word[-1] for word in words if word)


def _closing(text: str, at: int) -> int:
    """Where the bracket at ``at`` closes; brackets in strings do not count."""
    depth = 0
    for token in _BRACKET.finditer(text, at):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
            if depth == 0:
                return token.start()
    raise ValueError


def _balanced(text: str, key: str) -> str:
    """The bracketed value behind ``key``; empty if there is none."""
    at = text.find(key)
    return text[at : _closing(text, at + len(key))] if at >= 0 else ""


def _pairs(tail: str) -> Iterator[tuple[str, str]]:
    at = 0
    while (found := _KEY.search(tail, at)) is not None:
        start = found.end()
        bracket = _WORD.match(tail, start).end()  # type: ignore[union-attr]
        if bracket < len(tail) and tail[bracket] in "([{":
            end = _closing(tail, bracket) + 1
        elif start < len(tail) and tail[start] == '"':
            end = _STRING.match(tail, start).end()  # type: ignore[union-attr]
        else:
            comma = tail.find(",", start)
            end = len(tail) if comma < 0 else comma
        yield found[1], tail[start:end]
        at = end


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: (\(.*))? \{\s*$")
_PARAMETER = re.compile(r"(?:\s|,|/\*[^*]*\*/)*%?[\w.\-]+: ")
_HEAD = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_COMMENT = re.compile(r"/\*[^*]*\*/")
_TYPE = re.compile(r"\([^)]*\)|\[[^\]]*\]|\{[^}]*\}")
_WORD = re.compile(r"[\w.]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{}]')
_KEY = re.compile(r"([\w.]+)=")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
