"""The places that a new option or a new platform touches: README's "Changing it" lists them.

An option and a platform that are there stand for those to come: where they are named, an author
has something to write, and nobody may add such a place without saying so.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
import re

import pytest
from sources import tree_of

from adamw_xla_lowering import Slot, UpdateSpec
from adamw_xla_lowering.cpu import library
from adamw_xla_lowering.platforms import PLATFORMS

ROOT = Path(__file__).parents[1]
LOWERING = ROOT / "lowering" / "adamw_xla_lowering"
CSRC = ROOT / "lowering" / "csrc"

# The option of this config, the update's flag of this name, and the slot that it looks at.
OPTION = re.compile(r"\b(?:nesterov|grad_step_size)\b", re.IGNORECASE)

PLACES = {
    "lowering/adamw_xla_lowering/contract.py",
    "lowering/adamw_xla_lowering/primitive.py",
    "lowering/adamw_xla_lowering/arithmetic.py",
    "lowering/csrc/slice.h",
    "lowering/csrc/adamw.h",
    "lowering/csrc/tree.cc",
    "adamw_xla/_config.py",
    "adamw_xla/_check/fields.py",
    "adamw_xla/_inside/hyper.py",
    "adamw_xla/_inside/update.py",
    "adamw_xla/reference.py",
    "adamw_xla/optax/_transformation.py",
    "adamw_xla/_check/calls.py",
}
"""Where an option is written down: from the equations to what users call it."""

TABLES = {
    "tests/helpers/cpu_oracle.py",
    "tests/helpers/oracle.py",
    "tests/front_end/test_oracle.py",
    "tests/lowering/test_filecheck.py",
}
"""And where it is tested: an option that has a line in each meets every implementation."""


def named_in(*rooms: str) -> set[str]:
    """The sources that name the option."""
    kinds = ("*.py", "*.h", "*.cc")
    paths = [path for room in rooms for kind in kinds for path in (ROOT / room).rglob(kind)]
    return {str(p.relative_to(ROOT)) for p in paths if OPTION.search(p.read_text())}


def test_an_option_is_named_where_readme_says_and_nowhere_else() -> None:
    assert named_in("adamw_xla", "lowering") == PLACES
    assert named_in("tests") >= TABLES


def test_readme_names_each_place() -> None:
    _, found, rest = (ROOT / "README.md").read_text().partition("## Changing it\n")
    assert found
    section, _, _ = rest.partition("\n## ")
    names = {path.rpartition("/")[2] for path in PLACES | TABLES} | {"platforms.py"}
    assert not {name for name in names if f"{name}`" not in section}


def test_slots_and_options_are_listed_once_in_each_language() -> None:
    """The library is compared when it is loaded; this reads its source, compiled or not."""
    text = (CSRC / "slice.h").read_text()

    def listed(name: str) -> list[str]:
        (body,) = re.findall(rf"#define {name}\(X\)((?:.*\\\n)*.*)\n", text)
        return re.findall(r"X\((\w+)\)", body)

    assert listed("ADAMW_SLOTS") == [slot.name for slot in Slot]
    assert listed("ADAMW_OPTIONS") == list(library.attributes(UpdateSpec(())))
    others = [p for p in CSRC.iterdir() if p.suffix in (".h", ".cc") and p.name != "slice.h"]
    assert not [p.name for p in others if re.search(r"X\(\w+\) X\(", p.read_text())]


# -------------------------------------------------------------------------------- platforms

FOLDERS = {"cpu": "cpu", "cuda": "gpu", "rocm": None, "tpu": None}
"""The folder of each platform that has code of its own."""


def naming(platform: str) -> Iterator[str]:
    """Files of the compiler half in which the platform's name is a value."""
    for path in LOWERING.rglob("*.py"):
        values = [x.value for x in ast.walk(tree_of(path)) if hasattr(x, "value")]
        if platform in [value for value in values if isinstance(value, str)]:
            yield str(path.relative_to(LOWERING))


@pytest.mark.parametrize(("platform", "folder"), FOLDERS.items())
def test_a_platform_is_a_line_in_the_table_and_a_folder(platform: str, folder: str | None) -> None:
    found = set(naming(platform))
    assert "platforms.py" in found
    elsewhere = found - {"platforms.py"}
    assert not {name for name in elsewhere if name.split("/")[0] != folder}


def test_every_platform_is_looked_at() -> None:
    assert {*FOLDERS, None} == set(PLATFORMS)
