"""Checks that need several devices: each file of them runs in one process that has eight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import os
from pathlib import Path
import subprocess
import sys

import jax
from places import python_path


@functools.cache
def report(script: Path, *checks: str) -> str:
    """What a file of checks, or these of them, print on eight (virtual) CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()}
    command = [sys.executable, str(script), *checks]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return run.stdout + run.stderr[-3000:]


def assert_passed(check: str, script: Path, *checks: str) -> None:
    """One of a file's checks, or of these of them, which run once for all."""
    printed = report(script, *checks)
    assert f"passed {check}\n" in printed, printed


def main(checks: Mapping[str, Callable[[], None]]) -> None:
    """Runs the checks named on the command line, or all of them."""
    assert jax.device_count() == 8
    for name in sys.argv[1:] or checks:
        try:
            checks[name]()
        except Exception as error:  # report every check, then go on
            print(f"FAILED {name}: {type(error).__name__}: {error}".replace("\n", "\n  "))
        else:
            print(f"passed {name}")
