"""Errors that more than one lowering raises."""


class NativeUnavailableError(NotImplementedError):
    """``implementation="native"`` was asked for where no such kernel can run."""
