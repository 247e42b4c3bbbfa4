"""optax's own tests of AdamW, from its wheel: ours passes them, but for those listed here."""

from __future__ import annotations

from collections import Counter
import os
from pathlib import Path
import re
import subprocess
import sys
from xml.etree import ElementTree

import optax
from places import python_path
import pytest

HERE = Path(__file__).parent
MODULES = ("_src.alias_test", "_src.float64_test", "_src.sharding_test", "contrib._common_test")
NUMBER = 66  # that pass with stock optax 0.2.8

COMPLEX = "complex params are no part of this package"
WIDE = "16-bit params have float32 moments, and unrounded updates by default"
# What fails, as a pattern of name and arguments -> why that is meant, and how many do.
BY_DESIGN = {
    r"test_(optimization|explicit_dtype|state_shape_dtype).*complex": (COMPLEX, 15),
    r"test_explicit_dtype.*params_dtype='bfloat16', state_dtype=None": (WIDE, 1),
}
# Those that pass with updates_like_grads=True.
ROUNDING = {
    r"test_preserve_dtype.*dtype='bfloat16'": (WIDE, 2),
    r"test_state_shape_dtype_shard_stability.*float16": (WIDE, 6),
}


def run(which: str, scratch: Path, *options: str) -> dict[str, str]:
    """What became of each test (passed, failure, skipped), in a process of its own."""
    report = scratch / "report.xml"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"),
        *("--rootdir", str(Path(optax.__file__).parents[1]), f"--junitxml={report}"),
        *("-p", "optax_plugin", *options, "--pyargs", *(f"optax.{name}" for name in MODULES)),
    ]
    environment = {
        **os.environ,
        "OPTAX_ADAMW": which,
        "PYTHONPATH": python_path(HERE),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    if not report.exists():
        raise RuntimeError(done.stdout + done.stderr)
    return {described(c): outcome(c) for c in ElementTree.parse(report).iter("testcase")}


def described(case: ElementTree.Element) -> str:
    """A test's name and arguments; absl's parameterization numbers them only."""
    (arguments,) = (p.get("value", "") for p in case.iter("property"))
    return f"{case.get('name')} {arguments}"


def outcome(case: ElementTree.Element) -> str:
    return next((x.tag for x in case if x.tag != "properties"), "passed")


@pytest.mark.slow
def test_all_but_those_listed_pass(tmp_path: Path) -> None:
    results = run("ours", tmp_path)
    failures = [name for name, what in results.items() if what not in ("passed", "skipped")]
    meant = BY_DESIGN | ROUNDING
    assert not [x for x in failures if not any(re.search(pattern, x) for pattern in meant)]
    if optax.__version__ == "0.2.8":
        assert len(failures) == sum(times for _, times in meant.values())
        assert Counter(results.values())["passed"] == NUMBER - len(failures)


@pytest.mark.slow
def test_updates_like_gradients_pass_what_rounding_fails(tmp_path: Path) -> None:
    results = run("like_grads", tmp_path, "-k", "preserve_dtype or shard_stability")
    for pattern, (_, times) in ROUNDING.items():
        about = [what for name, what in results.items() if re.search(pattern, name)]
        assert about == ["passed"] * times


if __name__ == "__main__":  # with PYTHONPATH=tests/helpers: all three, and what fails
    for which in ("stock", "ours", "like_grads"):
        found = run(which, Path.cwd())
        print(which, *(f"{n} {what}" for what, n in Counter(found.values()).items()))
        for name, what in found.items():
            if what != "passed":
                print("  ", what, name)
