"""Kernels in programs that XLA partitions over eight (virtual) devices."""

from __future__ import annotations

from cpu_oracle import require_native
from eight_devices import report
from partitioned_checks import CHECKS
import pytest


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check: str) -> None:
    require_native()
    printed = report("partitioned_checks.py")
    assert f"passed {check}\n" in printed, printed
