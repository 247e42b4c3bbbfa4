"""Source files as trees."""

import ast
from functools import cache
import gc
from pathlib import Path


@cache
def tree_of(path: Path) -> ast.Module:
    """The file's syntax tree, which nobody may change: it is kept.

    Garbage is not collected meanwhile. Python 3.11 counts the depth of the tree that it makes in
    one place for all, and what another test left behind may make a tree when it is collected:
    asyncio logs a future's exception, and the carets of its traceback are found with ``ast``. Then
    this one fails with "AST constructor recursion depth mismatch".
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        if collecting:
            gc.enable()
