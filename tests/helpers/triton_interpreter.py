"""Runs Triton-dialect kernels in NumPy: the very module that is handed to XLA.

Programs run one after another. Every access is checked against the bounds of its buffer,
masked elements are never read, results start as NaN and each of their elements must be
written once. An operation that is not known here is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import io
import operator
import re
from typing import Any

import jax
from jax.extend.mlir import ir
from jax.interpreters import mlir
import ml_dtypes
import numpy as np
import pytest

from adamw_xla_lowering import platforms
from adamw_xla_lowering.gpu import call as gpu_call
from adamw_xla_lowering.gpu import kernel as gpu_kernel
from adamw_xla_lowering.gpu.triton import ops as triton_ops

DTYPES: dict[str, Any] = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "i64": np.int64,
    "i32": np.int32,
    "i16": np.int16,
    "i1": np.bool_,
}
COMPARISONS = {2: operator.lt}  # cmpi: slt
FLOAT_COMPARISONS = {4: operator.lt, 13: operator.ne}  # cmpf: olt, une


@dataclasses.dataclass
class Buffer:
    """Memory behind one pointer parameter, and how often each element was written."""

    data: np.ndarray
    writes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Elements ``offset`` (a number, or one for each element of a block) of a buffer."""

    buffer: Buffer
    offset: Any


def run(kernel: gpu_call.Kernel, buffers: Sequence[Buffer]) -> None:
    """Runs all programs of a kernel, on one buffer for each of its parameters."""
    prepared(kernel)(buffers)


def prepared(kernel: gpu_call.Kernel) -> Callable[[Sequence[Buffer]], None]:
    """What runs a kernel, as often as one likes."""
    bytecode = io.BytesIO()
    kernel.module.operation.write_bytecode(bytecode)
    context = kernel.module.context
    with context, ir.Location.unknown():
        module = ir.Module.parse(bytecode.getvalue())
        (function,) = module.body.operations
        (block,) = function.regions[0].blocks
        names = [re.fullmatch(r"!tt.ptr<(\w+)>", str(x.type)).group(1) for x in block.arguments]
        run_block = _compile(block)

    def run_all(buffers: Sequence[Buffer]) -> None:
        assert [x.data.dtype for x in buffers] == [DTYPES[name] for name in names]
        for program in range(kernel.programs):
            env = {i: Pointer(one, np.int64(0)) for i, one in enumerate(buffers)}
            run_block(env, program, [])

    return run_all


# Values are numbered once, so that running a program does not touch the bindings.
Env = dict[int, Any]
Step = Callable[[Env, int], None]


class _Numbers:
    """A number for each value of a function."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}

    def of(self, value: ir.Value) -> int:
        return self.known.setdefault(value, len(self.known))


def _compile(block: ir.Block, numbers: _Numbers | None = None) -> Callable[..., list[Any]]:
    numbers = numbers or _Numbers()
    arguments = [numbers.of(x) for x in block.arguments]
    *operations, last = list(block.operations)
    steps = [_step(op, numbers) for op in operations]
    assert last.operation.name in ("tt.return", "scf.yield", "tt.reduce.return"), last
    ends = [numbers.of(x) for x in last.operands]

    def run_block(env: Env, program: int, values: Sequence[Any]) -> list[Any]:
        env.update(zip(arguments, values, strict=False))
        for step in steps:
            step(env, program)
        return [env[i] for i in ends]

    return run_block


def _step(op: Any, numbers: _Numbers) -> Step:
    op = op.operation
    operands = [numbers.of(x) for x in op.operands]
    results = [numbers.of(x) for x in op.results]
    blocks = [_compile(region.blocks[0], numbers) for region in op.regions]
    function = _function(op, blocks)

    def step(env: Env, program: int) -> None:
        values = function(env, program, *[env[i] for i in operands])
        assert len(values) == len(results)
        env.update(zip(results, values, strict=True))

    return step


def _function(op: Any, blocks: Sequence[Callable[..., Any]]) -> Callable[..., Sequence[Any]]:
    """What an operation does: ``(env, program, *operands) -> results``."""
    name = op.name
    if name in ELEMENTWISE:
        return lambda env, program, *xs: [ELEMENTWISE[name](*xs)]
    if name in ("scf.if", "scf.for", "tt.reduce"):
        maker = {"scf.if": _if, "scf.for": _for, "tt.reduce": _reduce}[name]
        return functools.partial(maker, blocks)
    simple = _simple(op)
    return lambda env, program, *xs: simple(program, *xs)


def _simple(op: Any) -> Callable[..., Sequence[Any]]:
    kind = op.results[0].type if len(op.results) else None
    match op.name:
        case "arith.constant":
            value = _constant(op)
            return lambda program: [value]
        case "arith.extsi" | "arith.trunci" | "arith.extf" | "arith.truncf":
            dtype = _dtype(kind)
            return lambda program, x: [_cast(x, dtype)]
        case "tt.bitcast":
            dtype = _dtype(kind)
            return lambda program, x: [x.view(dtype)]
        case "arith.cmpi":
            compare = COMPARISONS[_integer(op, "predicate")]
            return lambda program, a, b: [compare(a, b)]
        case "arith.cmpf":
            compare = FLOAT_COMPARISONS[_integer(op, "predicate")]
            return lambda program, a, b: [compare(a, b)]
        case "tt.get_program_id":
            assert "axis = 0" in str(op) or " x " in str(op), str(op)
            return lambda program: [np.int32(program)]
        case "tt.splat":
            shape = tuple(ir.RankedTensorType(kind).shape)
            return lambda program, x: [_splat(x, shape)]
        case "tt.make_range":
            values = np.arange(_integer(op, "start"), _integer(op, "end"), dtype=np.int32)
            assert values.shape == tuple(ir.RankedTensorType(kind).shape)
            return lambda program: [values]
        case "tt.addptr":
            return lambda program, pointer, offset: [
                Pointer(pointer.buffer, pointer.offset + np.int64(offset))
            ]
        case "tt.load":
            return lambda program, *xs: [_load(*xs)]
        case "tt.store":
            return lambda program, *xs: _store(*xs)
        case "tt.elementwise_inline_asm":
            text = ir.StringAttr(op.attributes["asm_string"]).value
            if text == triton_ops.DIVIDE:
                assert _dtype(kind) == np.float32
                return lambda program, a, b: [np.divide(a, b)]
            number = np.int32(re.fullmatch(r"mov\.u32 \$0, (\d+);", text).group(1))
            return lambda program, x: [number]
    raise NotImplementedError(op.name)


def _shift_right(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Zeros come in."""
    return (x.view(np.uint32) >> places.view(np.uint32)).view(np.int32)


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divsi": np.floor_divide,  # no operand is negative
    "arith.remsi": np.remainder,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift,
    "arith.shrui": _shift_right,
    "arith.maxsi": np.maximum,
    "arith.minsi": np.minimum,
    "arith.addf": np.add,
    "arith.subf": np.subtract,
    "arith.mulf": np.multiply,
    "arith.divf": np.divide,
    "arith.negf": np.negative,
    "math.sqrt": np.sqrt,
    "tt.precise_sqrt": np.sqrt,
    "arith.maximumf": np.maximum,
    "arith.minimumf": np.minimum,
    "arith.select": np.where,
}


def _if(blocks: Any, env: Env, program: int, condition: Any) -> list[Any]:
    taken = blocks[0] if condition else blocks[1]
    return taken(env, program, [])


def _for(
    blocks: Any, env: Env, program: int, low: Any, high: Any, step: Any, *values: Any
) -> list[Any]:
    carried = list(values)
    for i in range(int(low), int(high), int(step)):
        carried = blocks[0](env, program, [np.int32(i), *carried])
    return carried


def _reduce(blocks: Any, env: Env, program: int, x: Any) -> list[Any]:
    """Halves added to halves, as threads do."""
    while x.size > 1:
        (x,) = blocks[0](env, program, [x[: x.size // 2], x[x.size // 2 :]])
    return [x[0]]


def _dtype(kind: ir.Type) -> Any:
    shaped = isinstance(kind, ir.RankedTensorType)
    return DTYPES[str(ir.RankedTensorType(kind).element_type if shaped else kind)]


def _integer(op: Any, name: str) -> int:
    return ir.IntegerAttr(op.attributes[name]).value


def _constant(op: Any) -> Any:
    kind, value = op.results[0].type, op.attributes["value"]
    if isinstance(kind, ir.RankedTensorType):
        splat = ir.DenseElementsAttr(value).get_splat_value()
        return np.full(ir.RankedTensorType(kind).shape, splat.value, _dtype(kind))
    return np.dtype(_dtype(kind)).type(value.value)


def _cast(x: Any, dtype: Any) -> Any:
    with np.errstate(over="ignore"):
        new = np.asarray(x).astype(dtype)
    if np.issubdtype(new.dtype, np.integer):
        assert np.array_equal(new, x), "an integer does not fit"
    return new[()]


def _splat(x: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(x, Pointer):
        return Pointer(x.buffer, np.full(shape, x.offset))
    return np.full(shape, x)


def _check_bounds(pointer: Pointer, mask: Any) -> None:
    touched = np.asarray(pointer.offset)[np.asarray(mask)]
    outside = (touched < 0) | (touched >= pointer.buffer.data.size)
    if outside.any():
        raise IndexError(f"elements {touched[outside]} of {pointer.buffer.data.size}")


def _garbage(dtype: Any) -> Any:
    """What stands where nothing was read or written."""
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else np.nan


def _load(pointer: Pointer, mask: Any = True, other: Any = None) -> Any:
    mask = np.broadcast_to(mask, np.shape(pointer.offset))
    _check_bounds(pointer, mask)
    data = pointer.buffer.data
    if mask.shape == ():
        return data[pointer.offset]
    values = (
        np.full(mask.shape, _garbage(data.dtype), data.dtype) if other is None else other.copy()
    )
    values[mask] = data[pointer.offset[mask]]
    return values


def _store(pointer: Pointer, value: Any, mask: Any = True) -> list[Any]:
    mask = np.broadcast_to(mask, np.shape(pointer.offset))
    _check_bounds(pointer, mask)
    assert np.asarray(value).dtype == pointer.buffer.data.dtype
    where = np.asarray(pointer.offset)[mask]
    pointer.buffer.data[where] = np.asarray(value)[mask]
    np.add.at(pointer.buffer.writes, where, 1)
    return []


# ----------------------------------------------------------------- in a program on the CPU


def buffer(array: Any) -> Buffer:
    """Memory that holds a copy of an array."""
    data = np.array(array).reshape(-1)
    return Buffer(data, np.zeros(data.shape, np.int64))


def _call_on_host(
    prepare: Callable[[], Callable[..., None]],
    avals_out: Sequence[Any],
    in_place: dict[int, int],
    *operands: Any,
) -> list[np.ndarray]:
    read = [buffer(x) for x in operands]
    taken = {result: read[operand] for operand, result in in_place.items()}
    written = [
        taken[i] if i in taken else buffer(np.full(aval.shape, _garbage(aval.dtype), aval.dtype))
        for i, aval in enumerate(avals_out)
    ]
    with np.errstate(all="ignore"):
        prepare()([*read, *written])
    for one in read:
        assert any(one is x for x in written) or not one.writes.any(), "an operand is written"
    for one in written:
        assert (one.writes == 1).all(), "an element is not written once"
    return [x.data.reshape(aval.shape) for x, aval in zip(written, avals_out, strict=True)]


class Interpreted:
    """While it is entered, native kernels for CUDA run here, interpreted; it keeps them."""

    def __init__(self) -> None:
        self.kernels: list[gpu_call.Kernel] = []

    def call(
        self, ctx: Any, kernel: Any, operands: Any, avals_in: Any, avals_out: Any, in_place: Any
    ) -> Any:
        """Takes the place of ``gpu_call.call``."""
        self.kernels.append(kernel)
        types = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals_out]
        prepare = functools.cache(functools.partial(prepared, kernel))
        on_host = functools.partial(_call_on_host, prepare, types, dict(in_place))
        lower = mlir.lower_fun(lambda *xs: jax.pure_callback(on_host, types, *xs))
        inner = ctx.replace(avals_in=list(avals_in), avals_out=list(avals_out))
        return lower(inner, *operands)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Interpreted:
        monkeypatch.setattr(gpu_call, "call", self.call)
        monkeypatch.setattr(gpu_kernel, "PLATFORM", "cpu")
        cuda = dataclasses.replace(platforms.PLATFORMS["cpu"], update=gpu_kernel.lower)
        monkeypatch.setitem(platforms.PLATFORMS, "cpu", cuda)
        jax.clear_caches()
        return self
