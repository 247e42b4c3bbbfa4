"""Checks of trees against the params that they belong to; paths are built for errors alone."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from adamw_xla._check.leaves import float_leaf, path, same_shape, structure
from adamw_xla._check.words import NATIVE


def params(
    tree: Any, leaves: Sequence[Any], argument: str = "params", *, needs_values: bool = True
) -> None:
    """Checks that every leaf is an array of a real floating dtype."""
    for i, leaf in enumerate(leaves):
        float_leaf(argument, tree, i, leaf, needs_values=needs_values)


def grads(params_tree: Any, treedef: Any, leaves: Sequence[Any], tree: Any) -> list[Any]:
    """Checks gradients against params; returns one per param, None where frozen."""
    try:
        flat = treedef.flatten_up_to(tree)
    except ValueError:
        structure("grads", params_tree, tree)
    for g in flat:
        if g is not None and not hasattr(g, "dtype") and not jax.tree_util.all_leaves([g]):
            structure("grads", params_tree, tree)
    for i, (g, p) in enumerate(zip(flat, leaves, strict=True)):
        if g is None:
            continue
        float_leaf("grads", params_tree, i, g)
        same_shape("grads", params_tree, i, g, p)
    if leaves and all(g is None for g in flat):
        raise ValueError(
            "grads: every leaf is None, so there is nothing to update; pass the gradients of "
            "at least one param."
        )
    return flat


_INT32 = "put the count in its place as jax.numpy.int32(...)."


def counter(name: str, value: Any) -> None:
    """Refuses what is no int32 scalar."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        raise TypeError(f"{name}: must be an int32 scalar, got {value!r}; {_INT32}")
    if dtype != np.int32:
        raise TypeError(f"{name}: must be an int32 scalar, got one of dtype {dtype}; {_INT32}")
    if value.shape != ():
        raise ValueError(
            f"{name}: must be an int32 scalar, got shape {value.shape}. A state that jax.vmap "
            "stacked goes to a step inside of jax.vmap."
        )


def is_mask_function(value: Any) -> bool:
    """Whether a mask is to be called; a tree of bools may be callable too (an Equinox module)."""
    return callable(value) and not any(is_known_bool(x) for x in jax.tree.leaves(value))


def is_known_bool(value: Any) -> bool:
    """Whether this is a bool, or an array of one that is known now."""
    if isinstance(value, bool | np.bool_):
        return True
    return (
        isinstance(value, jax.Array | np.ndarray)
        and not isinstance(value, jax.core.Tracer)
        and value.dtype == bool
        and value.ndim == 0
    )


def mask(params_tree: Any, treedef: Any, value: Any, argument: str = NATIVE.mask) -> list[bool]:
    """For each leaf whether it decays; ``argument`` is what the caller's API calls the mask."""
    if value is None:
        return [True] * treedef.num_leaves
    tree = value(params_tree) if is_mask_function(value) else value
    try:
        full = jax.tree.leaves(
            jax.tree.map(lambda keep, part: jax.tree.map(lambda _: keep, part), tree, params_tree)
        )
    except (ValueError, TypeError):
        structure(argument, params_tree, tree)
    for i, keep in enumerate(full):
        if not is_known_bool(keep):
            raise TypeError(
                f"{argument}{path(params_tree, i)}: must be True or False, known when the step "
                f"is traced; got {keep!r}{_how_to_have_a_bool(argument, keep)}."
            )
    return [bool(keep) for keep in full]


def _how_to_have_a_bool(argument: str, value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return f"; build {argument} outside of the traced function, or make it a function of params"
    if np.size(value) == 1 and not isinstance(value, str):
        return f"; jax.tree.map(bool, {argument}) makes bools of numbers"
    return "; it is one bool for a whole leaf"
