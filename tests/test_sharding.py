"""Automatic, explicit and manual sharding on eight (virtual) devices."""

from __future__ import annotations

from eight_devices import report
import pytest
from sharded_checks import CHECKS


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check: str) -> None:
    printed = report("sharded_checks.py")
    assert f"passed {check}\n" in printed, printed
