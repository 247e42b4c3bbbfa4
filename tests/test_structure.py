"""Who imports whom, and how large rooms and files are: what DESIGN calls the house.

``PYTHONPATH=tests/helpers python tests/test_structure.py`` prints the floors: each module above
all that it imports.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
import gc
from pathlib import Path
import re
import subprocess
import sys
import traceback

import pytest
from sources import tree_of

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "adamw_xla": ROOT / "adamw_xla",
    "adamw_xla_lowering": ROOT / "lowering" / "adamw_xla_lowering",
}
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
HEAVY = ("optax", "keras", "torch", "flax", "matplotlib", "sklearn", "tensorflow", "hypothesis")
LONGEST_FILE = 400
LARGEST_ROOM = 12


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(module: str) -> Iterator[str]:
    """Every name that the file imports, wherever in it: types alone and inside functions too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above * bool(node.level), *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def edges(module: str) -> set[str]:
    """The modules of ours that it imports: a submodule, or the package whose name it takes."""
    names = set(imported(module))
    found = {name for name in names if name in MODULES}
    # ``from package import submodule`` reads the submodule, and nothing of the package.
    for name in list(found):
        members = {x for x in names if x.rpartition(".")[0] == name}
        if members and all(x in MODULES for x in members):
            found.discard(name)
    return found - {module}


def floors() -> list[list[str]]:
    """The ground first: each module stands above all that it imports. Raises on a circle."""
    below = {module: edges(module) for module in MODULES}
    built: list[list[str]] = []
    placed: set[str] = set()
    while placed != below.keys():
        floor = sorted(m for m, needs in below.items() if m not in placed and needs <= placed)
        if not floor:
            raise AssertionError(f"a circle among {sorted(below.keys() - placed)}")
        built.append(floor)
        placed |= set(floor)
    return built


def room(module: str) -> str:
    """Which part of the house a module belongs to."""
    if module.startswith("adamw_xla_lowering"):
        return "lowering"
    for name in ("optax", "keras", "hlo"):
        if module.startswith(f"adamw_xla.{name}"):
            return name
    return "facade" if module in ("adamw_xla", "adamw_xla.lowering") else "front end"


ARROWS = {
    "lowering": set(),
    "hlo": {"lowering"},  # the names that it looks for
    "front end": {"lowering"},
    "optax": {"front end", "lowering"},
    "keras": {"front end", "lowering"},
    "facade": {"front end", "lowering", "hlo"},
}


def test_there_is_no_circle() -> None:
    assert len(floors()) > 3


@pytest.mark.parametrize("module", MODULES)
def test_arrows_go_one_way(module: str) -> None:
    here = room(module)
    for other in edges(module):
        assert room(other) in ARROWS[here] | {here}, f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_imported_from_elsewhere(module: str) -> None:
    roots = {name.split(".")[0] for name in imported(module)}
    for extra in HEAVY:
        if room(module) != extra:
            assert extra not in roots
    if MODULES[module].name != PRIVATE_FILE:
        text = MODULES[module].read_text()
        nodes = ast.walk(tree_of(MODULES[module]))
        attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not re.search(r"jax\._src|jaxlib\._", text)
        assert not attributes & PRIVATE_NAMES


def sources() -> list[Path]:
    kept = ("*.py", "*.cc", "*.h", "*.c", "*.sh", "CMakeLists.txt", "py.typed")
    rooms = ("adamw_xla", "lowering", "tests", "tools")
    return [path for name in rooms for kind in kept for path in (ROOT / name).rglob(kind)]


def test_a_room_has_at_most_a_dozen_files() -> None:
    crowded = {k: n for k, n in Counter(p.parent for p in sources()).items() if n > LARGEST_ROOM}
    assert not crowded


def test_a_file_is_one_sitting() -> None:
    lengths = {path: path.read_text().count("\n") for path in sources()}
    assert not {path: n for path, n in lengths.items() if n > LONGEST_FILE}


class Told:
    """Garbage whose end prints a traceback, as that of asyncio's failed futures does."""

    def __init__(self) -> None:
        self.circle = self

    def __del__(self) -> None:
        try:
            raise ValueError(str(1 + 1))
        except ValueError:
            traceback.format_exc()
        if gc.get_threshold()[0] == 1:  # there is garbage again, as long as the test runs
            Told()


def test_a_source_is_read_whatever_is_collected_meanwhile() -> None:
    before = gc.get_threshold()
    gc.set_threshold(1)
    Told()
    try:
        for path in MODULES.values():
            tree_of.__wrapped__(path)
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()


def test_sources_are_read_by_one_function() -> None:
    reads = [path.parent.name for path in sources() if "ast." + "parse(" in path.read_text()]
    assert reads == ["sources"]


# ------------------------------------------------------------------- what is really loaded


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


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
    assert third_party <= {*PACKAGES, "jax", "jaxlib", "numpy", "ml_dtypes"}


if __name__ == "__main__":
    for number, floor in enumerate(floors()):
        print(f"{number:2}", *floor)
    rooms = Counter(str(path.parent.relative_to(ROOT)) for path in sources())
    print("largest rooms:", *(f"{name} {n}" for name, n in rooms.most_common(4)))
