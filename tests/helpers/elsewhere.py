"""Programs for platforms that are not here: run on this one, or compiled alone."""

from __future__ import annotations

from collections.abc import Callable
import os
from typing import TYPE_CHECKING, Any

import jax
from jax import export
import pytest

if TYPE_CHECKING:
    from inspection import aot


def run_as(platform: str, f: Callable[..., Any], *args: Any) -> Any:
    """``f(*args)`` with the StableHLO that ``platform`` gets."""
    check = [export.DisabledSafetyCheck.platform()]
    exported = export.export(jax.jit(f), platforms=(platform,), disabled_checks=check)(*args)
    return exported.call(*args)


def target(name: str) -> aot.Target:
    """The target; skips the test where its compiler is neither installed nor required."""
    from inspection import aot  # loads the compilers' plugins

    found = aot.TARGETS[name]
    try:
        aot.check(found)
    except aot.UnavailableError as error:
        if os.environ.get("ADAMW_XLA_REQUIRE_COMPILERS"):
            raise
        pytest.skip(str(error))
    return found
