"""What may import what: lowering stands alone, and runtime needs jax and numpy only."""

from __future__ import annotations

import ast
from pathlib import Path
import re
import subprocess
import sys

import pytest

import adamw_xla
import adamw_xla_lowering

PACKAGE = Path(adamw_xla.__file__).parent
LOWERING = Path(adamw_xla_lowering.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *LOWERING.rglob("*.py")])
PRIVATE_FILE = "_jax_private.py"
# Attributes of JAX's types that no public documentation names.
PRIVATE_NAMES = {
    "mat",
    "manual_axis_type",
    "module_context",
    "lowering_parameters",
    "unreduced",
    "reduced",
}
# Drop-ins import the ecosystem that they are for.
EXTRAS = {"optax": {"optax.py", "_optax_state.py"}, "keras": {"keras.py"}}
HEAVY = ("optax", "keras", "torch", "flax", "matplotlib", "sklearn", "tensorflow", "hypothesis")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_sources(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    if path.is_relative_to(LOWERING):
        assert "adamw_xla" not in roots
    for extra in HEAVY:
        if path.name not in EXTRAS.get(extra, set()):
            assert extra not in roots
    attributes = {
        n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
    }
    if path.name != PRIVATE_FILE:
        assert not re.search(r"jax\._src|jaxlib\._", path.read_text())
        assert not attributes & PRIVATE_NAMES


def test_lowering_by_itself_loads_no_front_end() -> None:
    loaded = modules_after("import adamw_xla_lowering")
    assert "adamw_xla_lowering.primitive" in loaded
    assert not [name for name in loaded if name.split(".")[0] == "adamw_xla"]


def test_the_front_end_loads_what_jax_loads_and_itself() -> None:
    alone = modules_after("import jax, jax.export, jax.extend.mlir, jax.interpreters.mlir")
    loaded = {name.split(".")[0] for name in modules_after("import adamw_xla") - alone}
    assert "adamw_xla" in loaded
    assert not loaded & set(HEAVY)
    third_party = loaded - set(sys.stdlib_module_names)
    assert third_party <= {"adamw_xla", "adamw_xla_lowering", "jax", "jaxlib", "numpy", "ml_dtypes"}
