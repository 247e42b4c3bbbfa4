"""Where things stand in this checkout, and what programs of their own need to find them."""

from __future__ import annotations

import os
from pathlib import Path
import sys

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
TOOLS = ROOT / "tools"


def python_path(*more: Path) -> str:
    """A PYTHONPATH for a process: the helpers, the tools, and all that this one sees."""
    found = [*map(str, more), str(TESTS / "helpers"), str(TOOLS), *filter(None, sys.path)]
    return os.pathsep.join(found)
