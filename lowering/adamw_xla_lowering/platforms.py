"""Which lowering of the update each platform uses: one table, one ``register``."""

from collections.abc import Callable
import dataclasses
import functools
import os
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import cpu, gpu, gpu_kernel, stablehlo
from ._jax_private import platforms_of
from .contract import Implementation, UpdateSpec
from .errors import unavailable

IMPLEMENTATION_VARIABLE = "ADAMW_XLA_IMPLEMENTATION"
"""Environment variable that says what ``implementation=None`` means: xla or native.

It is read when a program is lowered; what is compiled already stays as it is.
"""


def default_implementation() -> Implementation | None:
    """What the environment says; None leaves the choice to the platform."""
    match os.environ.get(IMPLEMENTATION_VARIABLE, ""):
        case "xla":
            return "xla"
        case "native":
            return "native"
        case "":
            return None
        case other:
            raise ValueError(f"{IMPLEMENTATION_VARIABLE} must be xla or native, got {other!r}")


def _no_kernel(lower: Callable[..., Any], ctx: Any, *operands: Any, spec: UpdateSpec) -> Any:
    if spec.implementation == "native":
        raise unavailable(f"it has no kernel for {', '.join(platforms_of(ctx))}")
    return lower(ctx, *operands, spec=spec)


LOWERINGS: dict[str | None, Callable[..., Any]] = {
    "cpu": cpu.lower,
    "cuda": gpu_kernel.lower,
    "rocm": functools.partial(_no_kernel, gpu.lower),
    None: functools.partial(_no_kernel, stablehlo.lower),  # tpu and whatever comes
}


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, spec: UpdateSpec) -> Any:
    """The rule of the platform; for a program that must run on several, StableHLO."""
    platforms = platforms_of(ctx)
    key = platforms[0] if len(platforms) == 1 else None
    if spec.implementation is None:
        spec = dataclasses.replace(spec, implementation=default_implementation())
    return LOWERINGS.get(key, LOWERINGS[None])(ctx, *operands, spec=spec)


def register(primitive: Primitive) -> None:
    """Installs the platforms' lowerings."""
    # A cached lowering goes into a function of its own, where cpu.py could not see what
    # else reads the operands; a program has one such equation, so nothing is lost. One rule
    # for all platforms: jax 0.10.2 cannot lower for several of them at once (jax.export)
    # what has a rule for each and is not cached.
    mlir.register_lowering(primitive, _lower, cacheable=False)
