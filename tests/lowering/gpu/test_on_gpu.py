"""Both implementations on a real GPU, where there is one; elsewhere, that their checks work."""

from __future__ import annotations

import math

from checks import on_device, updates
from checks.on_device import Check, Outcome, all_checks, run_all
from cpu_oracle import require_native
import jax
import numpy as np
import pytest

import adamw_xla_lowering


def problems(checks: list[Check]) -> list[Outcome]:
    """What went wrong, with all of them run."""
    outcomes = list(run_all(checks, 2, math.inf))
    assert len(outcomes) == len(checks)
    return [outcome for outcome in outcomes if outcome.problem]


@pytest.mark.parametrize("implementation", ["xla", "native"])
def test_on_gpu(implementation: str) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU is here")
    assert problems(all_checks(implementation, "gpu")) == []


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "native"])
def test_the_checks_hold_on_this_device(implementation: str) -> None:
    if implementation == "native" and jax.default_backend() == "cpu":
        require_native()
    chosen = all_checks(implementation, jax.default_backend(), quick=True)
    assert len(chosen) > 5
    assert problems(chosen) == []


@pytest.mark.slow
@pytest.mark.parametrize("operand", ["params", "grads", "m", "v"])
def test_an_update_that_is_off_is_seen(operand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By sixteen units in the last place of one operand, for which PTX' bounds have no room."""

    def off(h: object, *leaves: object, **rest: object) -> object:
        tree = dict(zip(("params", "grads", "m", "v"), leaves, strict=False)) | rest
        tree[operand] = [x * np.float32(1 + 2**-19) for x in tree[operand]]
        return adamw_xla_lowering.adamw_update(h, **tree)

    chosen = [c for c in all_checks("xla", "gpu") if c.name == "xla: equal sizes, float32"]
    assert problems(chosen) == []
    monkeypatch.setattr(updates, "adamw_update", off)
    (outcome,) = problems(chosen)
    assert "elements are off" in str(outcome.problem)


def test_what_is_late_is_left_out() -> None:
    chosen = [Check("late", lambda: pytest.fail("ran")), Check("alone", pytest.fail, alone=True)]
    assert list(run_all(chosen, 2, -math.inf)) == []


def test_a_leaf_beyond_32_bits_is_for_devices_with_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    for memory in (0, on_device.BIG_BYTES + 1):
        monkeypatch.setattr(on_device, "_memory", lambda memory=memory: memory)
        counts.append(sum(check.alone for check in all_checks("native", "gpu")))
    assert counts == [0, 1]
