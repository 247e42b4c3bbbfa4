"""Checks of trees against the params that they belong to; paths are built for errors alone."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from adamw_xla._check.leaves import float_leaf, path, same_shape, structure
from adamw_xla._check.words import NATIVE, Words, in_other_containers


def params(
    tree: Any, leaves: Sequence[Any], argument: str = "params", *, needs_values: bool = True
) -> None:
    """Checks that every leaf is an array of a real floating dtype."""
    for i, leaf in enumerate(leaves):
        float_leaf(argument, tree, i, leaf, needs_values=needs_values)


def like_params(argument: str, params_tree: Any, treedef: Any, tree: Any) -> list[Any]:
    """The leaves of a tree that is built like the params; None where it has none."""
    try:
        flat: list[Any] = treedef.flatten_up_to(tree)
    except ValueError:
        structure(argument, params_tree, tree)
    for x in flat:
        if x is not None and not hasattr(x, "dtype") and not jax.tree_util.all_leaves([x]):
            structure(argument, params_tree, tree)
    return flat


def state_like_params(
    words: Words, field: str, params_tree: Any, treedef: Any, tree: Any
) -> list[Any]:
    """The leaves of a field of the state, as ``like_params``."""
    try:
        return like_params(words.of_state(field), params_tree, treedef, tree)
    except ValueError:
        if by_names(params_tree, tree) is None:
            raise
    raise in_other_containers(words, field)


def like_params_or_by_names(argument: str, params_tree: Any, treedef: Any, tree: Any) -> list[Any]:
    """As ``like_params``, of a tree in whatever containers."""
    try:
        return like_params(argument, params_tree, treedef, tree)
    except ValueError:
        if (found := by_names(params_tree, tree)) is None:
            raise
        return found


def by_names(params_tree: Any, tree: Any) -> list[Any] | None:
    """The leaves of a tree in the order of the params', found by the names on their paths.

    So it takes no account of what holds them: a checkpoint may return dicts for named tuples and
    for objects, lists for tuples, and "0" for 0. None where the two have other leaves.
    """
    wanted = [_names(path) for path, _ in jax.tree_util.tree_flatten_with_path(params_tree)[0]]
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    found = {_names(path): x for path, x in flat}
    extra = {names for names, x in found.items() if x is not None} - {*wanted}
    if extra or len(found) < len(flat) or not {*wanted} <= found.keys():
        return None
    return [found[names] for names in wanted]


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in without_value(path))


def without_value(path: Any) -> Any:
    """A path, but for the end that Flax' variables give it, and its optimizer takes off."""
    return path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path


def grads(
    params_tree: Any, leaves: Sequence[Any], flat: Sequence[Any], frozen: Collection[int] = ()
) -> None:
    """Checks gradients against their params; None where there is none, or a group freezes."""
    if leaves and all(g is None for g in flat):
        trained = "param that no group freezes" if frozen else "param"
        raise ValueError(
            f"grads: every leaf{' but frozen ones' if frozen else ''} is None, so there is nothing "
            f"to update; pass the gradients of at least one {trained}."
        )
    for i, (g, p) in enumerate(zip(flat, leaves, strict=True)):
        if g is not None:
            float_leaf("grads", params_tree, i, g)
            same_shape("grads", params_tree, i, g, p)


def state_leaf(
    argument: str,
    params_tree: Any,
    index: int,
    leaf: Any,
    param: Any,
    pattern: np.dtype[Any] | None = None,
) -> None:
    """Checks what a param's state is; with ``pattern``, no number but bits, of this dtype."""
    if leaf is None:
        raise ValueError(
            f"{argument}{path(params_tree, index)}: lacks a leaf that grads has; give it state "
            "there, or give grads None there to leave the param as it is."
        )
    if pattern is None:
        float_leaf(argument, params_tree, index, leaf)
    else:
        bits(argument, params_tree, index, leaf, pattern)
    same_shape(argument, params_tree, index, leaf, param)


def bits(argument: str, tree: Any, index: int, leaf: Any, pattern: np.dtype[Any]) -> None:
    """Refuses a leaf that is no array of this dtype, whose bits are what counts."""
    is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    if not is_array or isinstance(leaf, jax.ShapeDtypeStruct):
        float_leaf(argument, tree, index, leaf)
    if leaf.dtype != pattern:
        # NumPy's files have bfloat16 as "V2", two bytes of anything.
        is_like = leaf.dtype.itemsize == pattern.itemsize and leaf.dtype.kind in "uiV"
        view = f", or, if these are its bits, take x.view(jax.numpy.{pattern}) of each leaf x"
        raise TypeError(
            f"{argument}{path(tree, index)}: has dtype {leaf.dtype}; must be {pattern}, whose bits "
            "are the state, so a cast would lose it: restore it in the dtype that it was saved in"
            f"{view if is_like else ''}."
        )


_INT32 = "put the count in its place as jax.numpy.int32(...)."


def counter(name: str, value: Any) -> None:
    """Refuses what is no int32 scalar."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        raise TypeError(f"{name}: must be an int32 scalar, got {value!r}; {_INT32}")
    if jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True) != np.int32:
        raise TypeError(f"{name}: must be an int32 scalar, got one of dtype {dtype}; {_INT32}")
    if value.shape != ():
        raise ValueError(
            f"{name}: must be an int32 scalar, got shape {value.shape}. A state that jax.vmap "
            "stacked goes to a step inside of jax.vmap."
        )


def window(name: str, value: Any, length: int | None, advice: str) -> None:
    """Refuses what is no float32 array of norms, of this length where one is given."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or shape is None:
        raise TypeError(f"{name}: must be a float32 array of norms, got {value!r}.")
    if jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True) != np.float32:
        raise TypeError(f"{name}: must be a float32 array of norms, got one of dtype {dtype}.")
    if len(shape) != 1 or length not in (None, *shape):
        wanted = "one dimension" if length is None else f"{(length,)}, the window of skip_spikes"
        raise ValueError(f"{name}: has shape {shape}; must have {wanted}{advice}.")


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


def of_each_leaf(
    argument: str, params_tree: Any, prefix: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """For each leaf of the params what a prefix of their tree says of it."""
    treedef: Any
    found, treedef = jax.tree.flatten(prefix, is_leaf=is_leaf)
    try:
        parts = treedef.flatten_up_to(params_tree)
    except (ValueError, TypeError):
        # Tuples that are leaves here have no paths of their own.
        structure(argument, params_tree, treedef.unflatten([True] * len(found)))
    return [x for x, part in zip(found, parts, strict=True) for _ in jax.tree.leaves(part)]


def mask(params_tree: Any, count: int, value: Any, argument: str = NATIVE.mask) -> list[bool]:
    """For each of ``count`` leaves whether it decays.

    ``argument`` is what the caller's API calls the mask.
    """
    if value is None:
        return [True] * count
    tree = value(params_tree) if is_mask_function(value) else value
    full = of_each_leaf(argument, params_tree, tree)
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
