"""Builds the package into a folder of its own, by the first way that works here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
import os
from pathlib import Path
import shutil
import subprocess
import sys

from gpu_reporting import child

ROOT = Path(__file__).parents[2]
LIBRARY = "libadamw_xla_cpu.so"


def by_pip(site: Path, seconds: float) -> None:
    """As users install it, but for the network and the environment that is changed."""
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--target"]
    _run([sys.executable, "-m", "pip", "install", *flags, str(site), str(ROOT)], seconds)


def by_cmake(site: Path, seconds: float) -> None:
    """The kernel alone, beside copies of the packages."""
    objects = site.parent / "cmake"
    source = ROOT / "lowering" / "csrc"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    _run(["cmake", "-S", str(source), "-B", str(objects), python], seconds)
    _run(["cmake", "--build", str(objects), "--parallel"], seconds)
    by_copy(site, seconds)
    shutil.copy(objects / LIBRARY, site / "adamw_xla_lowering" / LIBRARY)


def by_copy(site: Path, seconds: float) -> None:
    """Python alone: the CPU's kernel is missing, and GPUs have theirs all the same."""
    del seconds
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for package in (ROOT / "adamw_xla", ROOT / "lowering" / "adamw_xla_lowering"):
        shutil.copytree(package, site / package.name, ignore=skip, dirs_exist_ok=True)


WAYS: dict[str, Callable[[Path, float], None]] = {
    "pip": by_pip,
    "cmake": by_cmake,
    "copies": by_copy,
}


def _run(command: list[str], seconds: float) -> None:
    print("$", *command, flush=True)
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)  # the build's own Python, not this report's
    subprocess.run(command, timeout=max(seconds, 1), check=True, env=environment)


def build(site: Path, left: Callable[[], float]) -> tuple[str | None, dict[str, str]]:
    """Fills ``site``: (the way that worked, what was wrong with those before it)."""
    problems: dict[str, str] = {}
    for name, way in WAYS.items():
        try:
            way(site, left() * 0.6)
        except Exception as error:  # whatever it is, the next way may work
            problems[name] = f"{type(error).__name__}: {error}"[:500]
            shutil.rmtree(site, ignore_errors=True)
        else:
            return name, problems
    return None, problems


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--site", type=Path, required=True)
    me = child.start(parser)
    way, problems = build(me.options.site, lambda: me.left)
    kernel = (me.options.site / "adamw_xla_lowering" / LIBRARY).is_file()
    me.write(way=way, problems=problems, cpu_kernel_built=kernel)


if __name__ == "__main__":
    main()
