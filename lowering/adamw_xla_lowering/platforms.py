"""Which lowerings each platform has: one table, which a new platform adds a line to."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import norm_stablehlo, stablehlo
from ._jax_private import partitions_automatically, platforms_of
from .contract import NormSpec, UpdateSpec, default_implementation
from .cpu import kernel as cpu
from .errors import unavailable
from .gpu import kernel as cuda
from .gpu import merge
from .gpu import norm as gpu_norm
from .rules import norm_shards, partitioned, partitioned_norm, streamed, update_shards

Lowering = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Platform:
    """How the two primitives are lowered: ``(ctx, *operands, spec) -> results``.

    ``calls_back`` says whether XLA's partitioner asks there what a call is to become, and
    ``fetches_all`` whether XLA, where it may, fetches all of what lies in host memory at once.
    """

    update: Lowering
    norm: Lowering
    calls_back: bool = False
    fetches_all: bool = False


def _no_kernel(lower: Lowering, ctx: Any, *operands: Any, spec: UpdateSpec) -> Any:
    if spec.implementation == "native":
        raise unavailable(f"it has no kernel for {', '.join(platforms_of(ctx))}")
    return lower(ctx, *operands, spec=spec)


_by_leaf = functools.partial(_no_kernel, stablehlo.lower)

PLATFORMS: dict[str | None, Platform] = {
    "cpu": Platform(cpu.lower, norm_stablehlo.lower_in_turn, calls_back=True),
    "cuda": Platform(cuda.lower, gpu_norm.lower, calls_back=True, fetches_all=True),
    "rocm": Platform(
        functools.partial(_no_kernel, merge.lower),
        gpu_norm.lower_merged,
        calls_back=True,
        fetches_all=True,
    ),
    "tpu": Platform(_by_leaf, norm_stablehlo.lower_added, fetches_all=True),
    None: Platform(_by_leaf, norm_stablehlo.lower_by_leaf),  # whatever comes
}


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, spec: UpdateSpec) -> Any:
    """The rule of the platform; for a program that must run on several, StableHLO."""
    if spec.implementation is None:
        spec = dataclasses.replace(spec, implementation=default_implementation())
    if spec.shards is not None:
        return update_shards.lower(ctx, _platform(ctx).update, *operands, spec=spec)
    if spec.offload:
        in_turn = _platform(ctx).fetches_all
        return streamed.lower(ctx, *operands, spec=spec, in_turn=in_turn)
    if partitions_automatically(ctx) and spec.batch_rank == 0:
        operands = (*partitioned.gradients_beside_state(ctx, operands, spec),)
    return _platform(ctx).update(ctx, *operands, spec=spec)


def _lower_norm(ctx: mlir.LoweringRuleContext, *operands: Any, spec: NormSpec) -> Any:
    """Likewise."""
    platform = _platform(ctx)
    if spec.shards is not None:
        return norm_shards.lower(ctx, platform.norm, *operands, spec=spec)
    if platform.calls_back and partitioned_norm.fits(ctx, spec):
        return partitioned_norm.lower(ctx, *operands, spec=spec)
    return platform.norm(ctx, *operands, spec=spec)


def _platform(ctx: mlir.LoweringRuleContext) -> Platform:
    platforms = platforms_of(ctx)
    key = platforms[0] if len(platforms) == 1 else None
    return PLATFORMS.get(key, PLATFORMS[None])


def register(primitive: Primitive) -> None:
    """Installs the update's lowerings."""
    # A cached lowering goes into a function of its own, where the CPU's could not see what
    # else reads the operands; a program has one such equation, so nothing is lost. One rule
    # for all platforms: jax 0.10.2 cannot lower for several of them at once (jax.export)
    # what has a rule for each and is not cached.
    mlir.register_lowering(primitive, _lower, cacheable=False)


def register_norm(primitive: Primitive) -> None:
    """Installs the norm's lowerings."""
    # Likewise, though no lowering of it looks around: it stands in the program where it is bound.
    mlir.register_lowering(primitive, _lower_norm, cacheable=False)
