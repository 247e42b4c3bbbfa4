"""Automatic, explicit and manual sharding on eight (virtual) devices, in one process."""

from __future__ import annotations

import functools
import os
from pathlib import Path
import subprocess
import sys

import pytest
from sharded_checks import CHECKS

SCRIPT = Path(__file__).with_name("sharded_checks.py")


@functools.cache
def report() -> str:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    return run.stdout + run.stderr[-3000:]


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check: str) -> None:
    assert f"passed {check}\n" in report(), report()
