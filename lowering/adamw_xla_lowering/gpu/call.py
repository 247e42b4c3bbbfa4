"""Hands a Triton-dialect module to XLA:GPU: all that depends on jaxlib's version.

XLA compiles such a module itself when it meets the custom call that Pallas emits for
Triton kernels (``jax/_src/pallas/triton/pallas_call_registration.py``). The Triton
dialect's Python bindings are part of jaxlib, but ``jax.extend`` does not have them; the
target's name and its attributes are those that Pallas writes. Read with jax 0.10.2 and 0.12.0.
"""

from collections.abc import Callable, Sequence
import dataclasses
import io
from typing import Any

import jax
from jax.extend.mlir import ir
from jax.interpreters import mlir
import numpy as np

from .._jax_private import name_dialect_module
from ..errors import unavailable

try:
    from jaxlib.triton import dialect
except ImportError as error:  # another jaxlib: StableHLO still works
    tt: Any = None
    _reason: str | None = f"this jaxlib does not have the Triton dialect where 0.10 has it: {error}"
else:
    tt = dialect
    _reason = None
    name_dialect_module("tt", dialect)

TARGET_NAME = "__gpu$xla.gpu.triton"
"""The custom call that XLA:GPU compiles; only CUDA's was looked at."""

MAX_PROGRAMS = 2**31 - 1
"""What one dimension of a CUDA grid may have."""

POINTER_ALIGNMENT = 16
"""Bytes; XLA aligns buffers to 128, and 16 is the widest access of a thread."""


def unavailable_reason() -> str | None:
    """Why no kernel can be built here; None if it can."""
    return _reason


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A module of one kernel, and how to launch it.

    Attributes:
      name: what profiles show.
      module: the Triton-dialect module, in a context of its own.
      programs: the size of the grid.
      num_warps: warps for each program.
    """

    name: str
    module: Any
    programs: int
    num_warps: int


def build(
    name: str,
    pointers: Sequence[Any],
    body: Callable[[Sequence[ir.Value]], None],
    programs: int,
    num_warps: int,
) -> Kernel:
    """Builds a kernel with one pointer parameter for each dtype in ``pointers``.

    ``body`` is called with the parameters, where the kernel's operations are to be put.

    Raises:
      NativeUnavailableError: there are more programs than a grid may have.
    """
    if programs > MAX_PROGRAMS:
        raise unavailable(f"a grid has {MAX_PROGRAMS:,} programs, and {programs:,} are needed")
    context = mlir.make_ir_context()
    tt.register_dialect(context)
    context.load_all_available_dialects()
    with context, ir.Location.unknown():
        module = ir.Module.create()
        module.operation.attributes["sym_name"] = ir.StringAttr.get(name)
        types = [tt.PointerType.get(mlir.dtype_to_ir_type(np.dtype(d)), 1) for d in pointers]
        function = tt.FuncOp(
            name,
            ir.TypeAttr.get(ir.FunctionType.get(types, [])),
            sym_visibility="public",
            res_attrs=ir.DictAttr.get({"noinline": ir.BoolAttr.get(False)}),
            ip=ir.InsertionPoint.at_block_begin(module.body),
        )
        i32 = ir.IntegerType.get_signless(32)
        aligned = ir.DictAttr.get({"tt.divisibility": ir.IntegerAttr.get(i32, POINTER_ALIGNMENT)})
        function.arg_attrs = ir.ArrayAttr.get([aligned] * len(types))
        entry = function.body.blocks.append(*types)
        with ir.InsertionPoint(entry):
            body(list(entry.arguments))
            tt.return_([])
        module.operation.verify()
    return Kernel(name, module, programs, num_warps)


def call(
    ctx: mlir.LoweringRuleContext,
    kernel: Kernel,
    operands: Sequence[ir.Value],
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    in_place: dict[int, int],
) -> Sequence[ir.Value]:
    """Calls ``kernel`` with pointers to the operands, and then to the results."""
    bytecode = io.BytesIO()
    kernel.module.operation.write_bytecode(bytecode)
    lowering = jax.ffi.ffi_lowering(TARGET_NAME, operand_output_aliases=in_place)
    return lowering(
        ctx.replace(avals_in=list(avals_in), avals_out=list(avals_out)),
        *operands,
        name=kernel.name,
        ir=bytecode.getvalue(),
        num_stages=np.int32(1),
        num_warps=np.int32(kernel.num_warps),
        grid_x=np.int32(kernel.programs),
        grid_y=np.int32(1),
        grid_z=np.int32(1),
        debug=False,
    )


def compute_capability() -> int:
    """That of the first GPU, as in 90; of an H100 where there is none to be asked."""
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return 90
    return int(str(device.compute_capability).replace(".", ""))
