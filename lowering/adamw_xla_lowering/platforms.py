"""Which lowering each platform uses: one table, one ``register``."""

from collections.abc import Callable
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import cpu, stablehlo
from .contract import UPDATE_NAME, UpdateSpec
from .errors import NativeUnavailableError as NativeUnavailableError


def _stablehlo_only(ctx: mlir.LoweringRuleContext, *operands: Any, spec: UpdateSpec) -> Any:
    if spec.implementation == "native":
        platforms = ctx.module_context.platforms
        raise NativeUnavailableError(
            f'{UPDATE_NAME}: implementation="native" has no kernel for {", ".join(platforms)}; '
            'use implementation=None (choose for me) or "xla" (StableHLO).'
        )
    return stablehlo.lower(ctx, *operands, spec=spec)


LOWERINGS: dict[str | None, Callable[..., Any]] = {
    "cpu": cpu.lower,
    None: _stablehlo_only,  # tpu, cuda, rocm and whatever comes
}


def register(primitive: Primitive) -> None:
    """Installs each platform's lowering."""
    for platform, rule in LOWERINGS.items():
        mlir.register_lowering(primitive, rule, platform=platform)
