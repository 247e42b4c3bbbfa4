"""Leaves by their paths, as groups and stacks are chosen."""

from __future__ import annotations

from collections.abc import Sequence
import difflib
import re
from typing import Any, TypeAlias

import jax

from adamw_xla._check import trees

Paths: TypeAlias = Sequence[tuple[str, Any]]
"""Leaves with the paths that patterns are searched in."""


def paths_of(params: Any) -> Paths:
    """The leaves of params with their paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [
        (jax.tree_util.keystr(trees.without_value(path), simple=True, separator="/"), leaf)
        for path, leaf in flat
    ]


def no_pattern(text: str) -> str | None:
    """Why a text is no regular expression, and what to do; None if it is one."""
    try:
        re.compile(text)
    except re.error as error:
        return f"{error}; re.escape(text) finds a text as it is"
    return None


def nearest(pattern: str, leaves: Paths) -> str:
    """The paths that are likest to a pattern which matches none, for an error."""
    near = sorted((path for path, _ in leaves), key=lambda path: -_likeness(pattern, path))[:3]
    return f"matches no path in params; the nearest are {', '.join(map(repr, near))}"


def _likeness(pattern: str, path: str) -> float:
    """How like a pattern a path is, or the part of it that is likest."""
    parts = {path, *path.split("/")}
    return max(difflib.SequenceMatcher(None, pattern, part).ratio() for part in parts)
