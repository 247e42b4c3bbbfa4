"""Checks of one leaf or one tree, which name it by its path."""

import numbers
import re
from typing import Any, NoReturn

import jax

from adamw_xla_lowering import PARAM_DTYPES, dtype_names, is_on_host, reduced_axes


def float_leaf(
    argument: str, tree: Any, index: int, leaf: Any, *, needs_values: bool = True
) -> None:
    """Refuses a leaf that is no array of a real floating dtype; ``tree`` has its path."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        raise TypeError(
            f"{argument}{path(tree, index)}: must be an array, got {kind(leaf)}; "
            f"{_how_to_have_an_array(argument, leaf)}."
        )
    if needs_values and isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{argument}{path(tree, index)}: is a jax.ShapeDtypeStruct, a shape without values; "
            "pass arrays, or trace the call with jax.eval_shape or jax.jit(...).lower, which "
            "take shapes."
        )
    if not all(isinstance(size, int) for size in leaf.shape):
        raise TypeError(
            f"{argument}{path(tree, index)}: has the symbolic shape {leaf.shape}; export with "
            "concrete shapes."
        )
    if dtype not in PARAM_DTYPES:
        raise TypeError(
            f"{argument}{path(tree, index)}: has dtype {dtype}; must be "
            f"{dtype_names()}. {_how_to_have_a_float(argument, dtype)}"
        )


def _how_to_have_an_array(argument: str, leaf: Any) -> str:
    if argument == "grads" and callable(leaf):
        return "call jax.grad's result with the params, and pass what that returns"
    is_number = isinstance(leaf, numbers.Number) and not isinstance(leaf, bool)
    first = "wrap it in jax.numpy.asarray" if is_number else "make it one"
    return f"{first}, or keep it out of the tree that is trained (None stands for no leaf)"


def _how_to_have_a_float(argument: str, dtype: Any) -> str:
    kept_out = "out of the tree that is trained (None stands for no leaf)."
    if "complex" in str(dtype):
        return (
            "Train the real and the imaginary part as two leaves, as "
            "optax.contrib.split_real_and_imaginary(adamw_xla.optax.adamw(...)) does, or keep it "
            + kept_out
        )
    return "Keep other leaves " + kept_out


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


def in_device_memory(argument: str, tree: Any, index: int | None, leaf: Any, advice: str) -> None:
    """Refuses what lies in the host's memory; a tree of one leaf has no index."""
    if is_on_host(jax.typeof(leaf)):
        raise ValueError(
            f"{argument}{'' if index is None else path(tree, index)}: lies in host memory, and the "
            f"update is made in the device's; {advice}."
        )


def in_host_memory(argument: str, tree: Any, index: int, leaf: Any, advice: str) -> None:
    """Refuses what lies in the device's memory, as far as its type says."""
    if not is_on_host(jax.typeof(leaf)):
        raise ValueError(
            f"{argument}{path(tree, index)}: lies in device memory; {advice}. (Of a "
            "jax.ShapeDtypeStruct JAX sees the memory of a NamedSharding alone.)"
        )


def summed(argument: str, tree: Any, index: int, leaf: Any) -> None:
    """Refuses a sum over devices that is still to be made."""
    if axes := reduced_axes(jax.typeof(leaf)):
        raise ValueError(
            f"{argument}{path(tree, index)}: is a sum pending over {sorted(axes)}; "
            f"jax.sharding.reshard, or in shard_map jax.lax.psum, makes it."
        )


def sharded_like(argument: str, tree: Any, index: int, leaf: Any, param: Any, advice: str) -> None:
    """Refuses, with explicit axes, a leaf that is not sharded as its param is."""
    found, wanted = (jax.typeof(x).sharding.spec for x in (leaf, param))
    if found != wanted:
        where = path(tree, index)
        raise ValueError(
            f"{argument}{where}: is sharded as {found}, and params{where} as {wanted}; {advice}."
        )


def structure(argument: str, params_tree: Any, tree: Any, model: str = "params") -> NoReturn:
    """Raises for a tree that is not built like the model's, naming the first difference."""
    if argument == "grads" and (what := _no_gradients(params_tree, tree)):
        raise ValueError(f"{argument}: {what}")
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


def _no_gradients(params_tree: Any, value: Any) -> str | None:
    """What another result of JAX's functions is, and what to do; None if this is of none."""
    if _is_scalar(value) or (callable(value) and jax.tree_util.all_leaves([value])):
        what = "a scalar" if _is_scalar(value) else "a function"
        return f"is {what}, and params a tree; pass what jax.grad(loss_function)(params) returns."
    if type(value) is not tuple or len(value) != 2:
        return None
    first = value[0]
    scalar = first[0] if type(first) is tuple and len(first) == 2 else first
    if _is_scalar(scalar):
        what = "a scalar" if scalar is first else "a tuple that begins with a scalar"
        return (
            f"got a tuple of 2, the first {what}: jax.value_and_grad returns (value, grads); "
            "unpack it, and pass grads alone."
        )
    if _paths(first) == _paths(params_tree):
        return (
            "got a tuple of 2, the first built like the params: jax.grad(..., has_aux=True) "
            "returns (grads, aux); unpack it, and pass grads alone."
        )
    return None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, numbers.Number) or getattr(value, "shape", None) == ()


def _paths(tree: Any) -> list[str]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in flat]


def path(tree: Any, index: int) -> str:
    """Where the leaf of this index stands, as in ``['layer'][0]``."""
    return _paths(tree)[index]


def kind(value: Any) -> str:
    """The full name of a value's class, without private modules."""
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return re.sub(r"(?<=\.)_\w+\.|^_\w+\.", "", name)
