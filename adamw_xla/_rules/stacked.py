"""Which leaves hold layers along axis 0, as ``jax.lax.scan`` takes them; a part of the config."""

from __future__ import annotations

from collections.abc import Sequence
import re
from typing import Any

import jax

from adamw_xla._check import options, trees
from adamw_xla._check.leaves import path
from adamw_xla._rules.paths import nearest, no_pattern, paths_of

_KINDS = (
    "a regular expression for paths or a tuple of them, a callable from a leaf's path and the leaf "
    "to True or False, or a tree of bools, a prefix of the params'"
)


def checked(value: Any) -> Any:
    """The value as a config keeps it, patterns in a tuple; refuses what it may not be."""
    if isinstance(value, str):
        value = (value,)
    if value is None or value == () or value == []:
        return None
    if isinstance(value, tuple | list) and any(isinstance(x, str | re.Pattern) for x in value):
        return tuple(map(_pattern, value))
    if trees.is_mask_function(value):
        if not options.takes(value, 2):
            raise _not(value)
        return value
    for key, leaf in jax.tree_util.tree_leaves_with_path(value):
        if not trees.is_known_bool(leaf):
            raise _not(leaf, jax.tree_util.keystr(key))
    return value


def _pattern(value: Any) -> str:
    if not isinstance(value, str):
        raise _not(value)
    if (why := no_pattern(value)) is not None:
        raise ValueError(f"AdamW: stacked has {value!r}, which is no regular expression: {why}.")
    return value


def _not(value: Any, where: str = "") -> TypeError:
    advice = "; give its .pattern" if isinstance(value, re.Pattern) else ""
    return TypeError(f"AdamW: stacked{where} must be {_KINDS}; got {value!r}{advice}.")


def layers_of(stacked: Any, params: Any, *, may_match_none: bool = False) -> list[int | None]:
    """For each leaf of params how many layers it holds; None where it is none but itself.

    Raises:
      TypeError: a callable says neither True nor False.
      ValueError: a pattern matches nothing, a prefix does not fit, or a leaf is a scalar.
    """
    leaves = jax.tree.leaves(params)
    if stacked is None or not leaves:
        return [None] * len(leaves)
    found = []
    for i, (leaf, is_stack) in enumerate(
        zip(leaves, _flags(stacked, params, may_match_none), strict=True)
    ):
        shape = getattr(leaf, "shape", None) if hasattr(leaf, "dtype") else None
        if is_stack and shape == ():
            raise ValueError(
                f"AdamW: stacked says that params{path(params, i)} holds layers, but it is a "
                "scalar, and has no axis 0; leave it out."
            )
        found.append(shape[0] if is_stack and shape else None)
    return found


def _flags(stacked: Any, params: Any, may_match_none: bool) -> Sequence[bool]:
    if not (_is_patterns(stacked) or trees.is_mask_function(stacked)):
        return [bool(x) for x in trees.of_each_leaf("stacked", params, stacked)]
    leaves = paths_of(params)
    if _is_patterns(stacked):
        for pattern in stacked:
            if not (may_match_none or any(re.search(pattern, path) for path, _ in leaves)):
                raise ValueError(f"AdamW: stacked={pattern!r} {nearest(pattern, leaves)}.")
        return [any(re.search(pattern, path) for pattern in stacked) for path, _ in leaves]
    return [hasattr(leaf, "dtype") and _said(stacked, path, leaf) for path, leaf in leaves]


def _is_patterns(stacked: Any) -> bool:
    return type(stacked) is tuple and all(isinstance(x, str) for x in stacked)


def _said(stacked: Any, path: str, leaf: Any) -> bool:
    found = stacked(path, leaf)
    if not trees.is_known_bool(found):
        raise TypeError(
            "AdamW: stacked must return True or False, known when the step is traced; for "
            f"{path!r} it returned {found!r}."
        )
    return bool(found)


def one_layer(tree: Any, layers: Sequence[int | None]) -> Any:
    """A tree with a layer's shape in place of each leaf that holds layers."""
    if not any(x is not None for x in layers):
        return tree
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        x if count is None else _of_shape(x.shape[1:], x.dtype)
        for x, count in zip(leaves, layers, strict=True)
    )


def _of_shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]
