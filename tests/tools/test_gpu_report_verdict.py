"""What ``tools/gpu_report.py`` says of its figures: the verdict on the defaults, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_reporting import page, verdict
from gpu_reporting.record import Record
import pytest


def whole(native: float = 1.0, status: str = "done", problem: str | None = None) -> dict[str, Any]:
    """A report of one case, in which xla takes 2 s and optax 3, and of two sweeps."""

    def times(**medians: float) -> dict[str, list[float]]:
        return {name: [m, 1.01 * m, 0.99 * m, m, m] for name, m in medians.items()}

    case = {"case": "gpt2-small float32", "least_bytes": 10**9, "failed": {}}
    checks = [{"planned": 2}, {"check": "a", "problem": problem}, {"check": "b", "problem": None}]
    step = case | {"seconds": times(native=native, xla=2.0, optax=3.0)}
    slow = case | {"seconds": times(native=native, xla=8.0, optax=9.0)}
    a = case | {"seconds": times(**{"native": 1.0, "native 512/2": 0.5, "native 512/4": 0.9})}
    b = a | {"case": "b"}
    b["seconds"] = times(**{"native": 1.0, "native 512/2": 4.0, "native 512/4": 0.9})
    parts = {
        "machine": {"status": "done", "items": [{"device": "NVIDIA H100"}]},
        "correct-native": {"status": status, "items": checks},
        "correct-xla": {"status": "done", "items": checks[:2]},
        "steps-looped": {"status": "done", "items": [{"xla_flags": ""}, step]},
        "steps": {"status": "done", "items": [{"xla_flags": ""}, step]},
        "steps-no-graphs": {"status": "done", "items": [slow]},
        "sweep": {"status": "done", "items": [a, b]},
    }
    return {"started": "now", "asked_for": "gpu", "minutes": 9.0, "parts": parts}


def test_native_is_the_default_where_it_is_right_and_faster_everywhere() -> None:
    found = verdict.verdict(whole())
    assert found["native_by_default"]
    assert found["losses"] == found["cases_without_a_comparison"] == []


@pytest.mark.parametrize(
    "wrong", [{"native": 2.5}, {"native": 2.0}, {"status": "timed out"}, {"problem": "is off"}]
)
def test_native_is_not_the_default_otherwise(wrong: dict[str, Any]) -> None:
    assert not verdict.verdict(whole(**wrong))["native_by_default"]


def test_what_was_not_compared_is_no_victory() -> None:
    report = whole()
    looped = report["parts"]["steps-looped"]
    looped["items"] += [{"case": "1x256M float32", "skipped": "no time was left"}]
    found = verdict.verdict(report)
    assert not found["native_by_default"]
    assert found["cases_without_a_comparison"] == ["1x256M float32"]
    assert not verdict.agreement(report, "xla")["agrees"]  # one of two checks was made


def test_where_native_loses_is_said() -> None:
    report = whole(native=2.5)
    (loss,) = verdict.verdict(report)["losses"]
    assert (loss["case"], loss["rival"]) == ("gpt2-small float32", "xla")
    assert loss["times_as_long"][0] == pytest.approx(0.8)


def test_calls_decide_nothing() -> None:
    report = whole(native=1.0)
    (_, step) = report["parts"]["steps"]["items"]
    step["seconds"] = step["seconds"] | {"native": [9.0] * 5}
    report["parts"]["steps-looped"] = whole()["parts"]["steps-looped"]
    assert verdict.verdict(report)["native_by_default"]


def test_a_rival_with_another_state_is_marked_and_decides_nothing() -> None:
    report = whole(native=2.5)
    (_, step) = report["parts"]["steps-looped"]["items"]
    step["seconds"]["xla"] = [5.0] * 5
    step["seconds"]["optax"] = [1.0] * 5
    step["state_bytes"] = {"native": 8004, "xla": 8000, "optax": 4004}
    found = verdict.verdict(report)
    assert found["native_by_default"]
    assert found["of_another_state"] == ["optax in gpt2-small float32"]
    text = page.markdown(report | {"verdict": found})
    assert "Not compared, as the state is another: optax in gpt2-small float32." in text
    assert "| 1000.000 (0.40 [0.40, 0.40])* |" in text
    step["state_bytes"]["optax"] = 8000
    assert not verdict.verdict(report)["native_by_default"]


def test_the_best_launch_is_best_over_all_trees() -> None:
    found = verdict.verdict(whole())["launches"]
    assert found["best"] == "native 512/4"
    assert found["means"]["native 512/2"] == pytest.approx(2**0.5)
    assert found["per_tree"] == {"gpt2-small float32": "native 512/2", "b": "native 512/4"}


def test_the_page_has_the_figures() -> None:
    report = whole(native=2.5, problem="m[3]: 1 of 6 elements are off")
    text = page.markdown(report | {"verdict": verdict.verdict(report)})
    assert text.startswith("# adamw_xla on NVIDIA H100\n")
    for line in (
        '- "native" by default: no.',
        "- It loses to xla in gpt2-small float32, which takes 0.800 times its time",
        "- LAUNCHES: native 512/4 is best over all trees, 10.0% quicker than native",
        "| native | 2 | 2 | 1 | done |",
        "- a: m[3]: 1 of 6 elements are off",
        "| gpt2-small float32 | 2500.000 | 2000.000 (0.80 [0.80, 0.80]) |",
        "| gpt2-small float32 | 1.00 | 4.00 | 3.00 |",  # command buffers
    ):
        assert line in text


def test_a_page_of_nothing(tmp_path: Path) -> None:
    Record(tmp_path, "gpu", 9.0).write()
    assert "device not known yet" in (tmp_path / "report.md").read_text()
    assert not json.loads((tmp_path / "report.json").read_text())["verdict"]["native_by_default"]
