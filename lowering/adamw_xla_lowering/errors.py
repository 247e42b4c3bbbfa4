"""Why a kernel of our own cannot run, and the error that says so."""

import logging
from typing import Any

from ._jax_private import platforms_of
from .contract import UPDATE_NAME, UpdateSpec

logger = logging.getLogger("adamw_xla")
"""Says which path each program took, and why."""


class NativeUnavailableError(NotImplementedError):
    """``implementation="native"`` was asked for where no such kernel can run."""


def unavailable(reason: str) -> NativeUnavailableError:
    """The error for ``reason``, with what to do."""
    return NativeUnavailableError(
        f'{UPDATE_NAME}: implementation="native" cannot run here: {reason}; '
        'use implementation=None (choose for me) or "xla" (StableHLO).'
    )


def unfit(ctx: Any, platform: str) -> str | None:
    """Why no kernel of ``platform`` can stand in this program; None if one can."""
    if platforms_of(ctx) != (platform,):
        return "the program is lowered for several platforms at once"
    if not all(isinstance(size, int) for aval in ctx.avals_in for size in aval.shape):
        return "shapes are symbolic"
    return None


def unfused(spec: UpdateSpec) -> str | None:
    """Why a kernel would cost more than it saves; None if it does not."""
    # The caller's addition would be a second pass over memory behind the call; XLA fuses
    # it into the loop that makes the change, and so moves no more bytes.
    if spec.delta:
        return "updates that are yet to be added to the params are better fused by XLA"
    return None
