"""Checks of one leaf or one tree, which name it by its path."""

from typing import Any, NoReturn

import jax

from adamw_xla_lowering import PARAM_DTYPES, dtype_names


def float_leaf(argument: str, tree: Any, index: int, leaf: Any) -> None:
    """Refuses a leaf that is no array of a real floating dtype; ``tree`` has its path."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        raise TypeError(
            f"{argument}{path(tree, index)}: must be an array, got {kind(leaf)}; wrap it in "
            "jax.numpy.asarray, or keep it out of the tree that is trained (None stands for no "
            "leaf)."
        )
    if not all(isinstance(size, int) for size in leaf.shape):
        raise TypeError(
            f"{argument}{path(tree, index)}: has the symbolic shape {leaf.shape}; export with "
            "concrete shapes."
        )
    if dtype not in PARAM_DTYPES:
        raise TypeError(
            f"{argument}{path(tree, index)}: has dtype {dtype}; must be "
            f"{dtype_names()}. Keep other leaves out of the tree that is trained "
            "(None stands for no leaf)."
        )


def is_float(leaf: Any) -> bool:
    """Whether a leaf is an array of a dtype that can be trained."""
    return hasattr(leaf, "shape") and getattr(leaf, "dtype", None) in PARAM_DTYPES


def same_shape(
    argument: str, tree: Any, index: int, leaf: Any, param: Any, model: str = "params"
) -> None:
    """Refuses a leaf that has not the shape of its param."""
    if leaf.shape != param.shape:
        where = path(tree, index)
        raise ValueError(
            f"{argument}{where}: has shape {leaf.shape}; must be {param.shape}, the shape of "
            f"{model}{where}."
        )


def same_dtype(argument: str, tree: Any, index: int, leaf: Any, wanted: Any) -> None:
    """Refuses state that is of another dtype than its config asks for."""
    if leaf.dtype != wanted and jax.dtypes.canonicalize_dtype(leaf.dtype) != wanted:
        raise TypeError(
            f"{argument}{path(tree, index)}: has dtype {leaf.dtype}; must be {wanted}, which the "
            f"config and its param ask for. To go on with this state, cast all of {argument} with "
            f"jax.tree.map(lambda x: x.astype('{wanted}'), {argument})."
        )


def structure(argument: str, params_tree: Any, tree: Any, model: str = "params") -> NoReturn:
    """Raises for a tree that is not built like the model's, naming the first difference."""
    wanted, found = _paths(params_tree), _paths(tree)
    missing = [where for where in wanted if where not in set(found)]
    arrays = [
        x for x, leaf in zip(wanted, jax.tree.leaves(params_tree), strict=True) if is_float(leaf)
    ]
    missing = [where for where in missing if where in set(arrays)] or missing
    extra = [where for where in found if where not in set(wanted)]
    if missing:
        what = f"lacks {missing[0] or 'the leaf'}, which {model} has"
    elif extra:
        what = f"has {extra[0]}, which {model} lacks"
    else:
        what = (
            f"is built of other containers: {jax.tree.structure(tree)} and not "
            f"{jax.tree.structure(params_tree)}"
        )
    raise ValueError(f"{argument}: {what}; it must have the tree structure of {model}.")


def _paths(tree: Any) -> list[str]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in flat]


def path(tree: Any, index: int) -> str:
    """Where the leaf of this index stands, as in ``['layer'][0]``."""
    return _paths(tree)[index]


def kind(value: Any) -> str:
    """The full name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
