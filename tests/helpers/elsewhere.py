"""Programs that were lowered for another platform, run on this one."""

from collections.abc import Callable
from typing import Any

import jax
from jax import export


def run_as(platform: str, f: Callable[..., Any], *args: Any) -> Any:
    """``f(*args)`` with the StableHLO that ``platform`` gets."""
    check = [export.DisabledSafetyCheck.platform()]
    exported = export.export(jax.jit(f), platforms=(platform,), disabled_checks=check)(*args)
    return exported.call(*args)
