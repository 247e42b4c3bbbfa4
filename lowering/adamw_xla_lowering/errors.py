"""Errors that more than one lowering raises."""

from .contract import UPDATE_NAME


class NativeUnavailableError(NotImplementedError):
    """``implementation="native"`` was asked for where no such kernel can run."""


def unavailable(reason: str) -> NativeUnavailableError:
    """The error for ``reason``, with what to do."""
    return NativeUnavailableError(
        f'{UPDATE_NAME}: implementation="native" cannot run here: {reason}; '
        'use implementation=None (choose for me) or "xla" (StableHLO).'
    )
