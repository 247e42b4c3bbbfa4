"""Keras' own tests, from its wheel, with the stock AdamW and with ours: who passes what.

The optimizers' run here with ours. The wider ones (trainers, models, saving, callbacks, layers,
distribution), and all with the stock class, take minutes:

    PYTHONPATH=tests/helpers python tests/keras_drop_in/test_keras_suite.py

runs and compares them. What needs a package that is not there (TensorFlow) fails or is
skipped with both classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
import os
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import NamedTuple
from xml.etree import ElementTree

from places import python_path
import pytest

HERE = Path(__file__).parent

OPTIMIZERS = (
    *(f"optimizers.{name}_test" for name in ("adamw", "adam", "optimizer", "optimizer_sparse")),
    *(f"optimizers.{name}_optimizer_test" for name in ("loss_scale", "multi")),
    *(f"optimizers.{name}_test" for name in ("muon", "schedule_free_adamw")),
    "optimizers.schedules.learning_rate_schedule_test",
)

WIDER = (
    *(f"trainers.{name}_test" for name in ("trainer", "compile_utils")),
    *(f"models.{name}_test" for name in ("model", "functional", "sequential", "cloning")),
    *(f"saving.{name}_test" for name in ("saving_lib", "saving_api", "serialization_lib")),
    *(f"saving.{name}_test" for name in ("object_registration", "file_editor")),
    "legacy.saving.legacy_h5_format_test",
    *(f"callbacks.{name}_test" for name in ("backup_and_restore", "callback", "early_stopping")),
    *(f"callbacks.{name}_test" for name in ("learning_rate_scheduler", "model_checkpoint")),
    *(f"callbacks.{name}_test" for name in ("orbax_checkpoint", "reduce_lr_on_plateau")),
    *(f"layers.core.{name}_test" for name in ("dense", "einsum_dense", "embedding")),
    "layers.layer_test",
    *(f"backend.jax.{name}_test" for name in ("trainer", "distribution_lib")),
)

BY_DESIGN: dict[str, str] = {}
"""Tests that pass with the stock class and not with ours -> why that is meant."""


class Outcome(NamedTuple):
    """The tests that pass, and what the others fail with; the skipped are left out."""

    passed: set[str]
    failed: dict[str, str]


def run(modules: Sequence[str], *, ours: bool) -> Outcome:
    """Runs these modules' tests in a process of its own."""
    keras = find_spec("keras")
    assert keras is not None
    assert keras.origin is not None
    paths = python_path(HERE)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"),
            *("--rootdir", str(Path(keras.origin).parents[1]), f"--junitxml={report}"),
            *(("-p", "keras_plugin") if ours else ()),
            *("--pyargs", *(f"keras.src.{module}" for module in modules)),
        ]
        environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(done.stdout + done.stderr)
        outcome = Outcome(set(), {})
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}"
            wrong = [x for x in case if x.tag in ("failure", "error")]
            if wrong:
                outcome.failed[name] = str(wrong[0].get("message"))
            elif case.find("skipped") is None:
                outcome.passed.add(name)
        return outcome


def main() -> None:
    """Prints the counts, and ends with 1 where a test passes with the stock class only."""
    ok = True
    for title, modules in {"optimizers": OPTIMIZERS, "wider": WIDER}.items():
        stock, ours = (run(modules, ours=which).passed for which in (False, True))
        counts = f"{len(stock)} pass with stock, {len(ours)} with ours"
        print(f"{title}, {len(modules)} modules: {counts}")
        for name in sorted(stock - ours):
            print(f"  only with stock: {name} ({BY_DESIGN.get(name, 'not meant')})")
        ok &= stock - ours <= set(BY_DESIGN)
    sys.exit(0 if ok else 1)


@pytest.mark.slow
def test_all_pass_but_those_that_lack_a_package() -> None:
    passed, failed = run(OPTIMIZERS, ours=True)
    assert sum(".AdamWTest." in name for name in passed) >= 5
    assert len(passed) >= 180
    for name, message in failed.items():
        assert name in BY_DESIGN or "No module named" in message, f"{name}: {message}"


if __name__ == "__main__":
    main()
