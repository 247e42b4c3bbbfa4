"""The checks of user input, and the texts that a refused call is answered with.

``_check_leaves`` has those of one leaf or tree, ``_check_optax`` and ``_check_keras`` what is
theirs alone. Each error names the argument (for a leaf, its path), what was found and what to
do. The paths are only built once something is wrong.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import numbers
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._check_leaves import float_leaf, kind, path, same_shape, structure
from adamw_xla_lowering import PARAM_DTYPES, dtype_names

if TYPE_CHECKING:
    from adamw_xla._config import AdamW

# ------------------------------------------------------------------------ hyperparameters

_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


def config(c: "AdamW") -> None:
    """Checks every field of a config that is being built."""
    coefficients(
        rates={"learning_rate": c.learning_rate, "weight_decay": c.weight_decay},
        betas={"beta_1": c.beta_1, "beta_2": c.beta_2},
        epsilons={"epsilon": c.epsilon},
    )
    if c.epsilon_root is not None:
        scalar("epsilon_root", c.epsilon_root, lambda x: x >= 0, "at least 0, or None for none")
    scalar("ema_momentum", c.ema_momentum, lambda x: 0 <= x <= 1, "in [0, 1]")
    for name in (*_CLIPS, "loss_scale_factor"):
        if getattr(c, name) is not None:
            scalar(name, getattr(c, name), lambda x: x > 0, "above 0, or None for none")
    for name in ("amsgrad", "use_ema", "epsilon_hat", "skip_nonfinite", "nesterov"):
        flag(name, getattr(c, name))
    _count("ema_overwrite_frequency", c.ema_overwrite_frequency, 1)
    _count("gradient_accumulation_steps", c.gradient_accumulation_steps, 2)
    if not isinstance(c.name, str):
        raise TypeError(f"AdamW: name must be a string, got {c.name!r}.")
    chosen = [name for name in _CLIPS if getattr(c, name) is not None]
    if len(chosen) > 1:
        raise ValueError(f"AdamW: at most one clip option may be given, got {', '.join(chosen)}.")
    if c.ema_overwrite_frequency is not None and not c.use_ema:
        raise ValueError(
            "AdamW: ema_overwrite_frequency needs use_ema=True; without it there is no "
            "average to overwrite the params with."
        )


def coefficients(
    rates: Mapping[str, Any], betas: Mapping[str, Any], epsilons: Mapping[str, Any]
) -> None:
    """Checks the numbers that every front end has, by the names that it has for them."""
    for name, value in rates.items():
        scalar_or_schedule(name, value)
    for name, value in betas.items():
        scalar(name, value, lambda x: 0 <= x < 1, "in [0, 1)")
    for name, value in epsilons.items():
        scalar(name, value, lambda x: x >= 0, "at least 0")


def scalar_or_schedule(name: str, value: Any) -> None:
    """Checks a rate: a number at least 0, a scalar array, or a callable."""
    if not callable(value):
        scalar(name, value, lambda x: x >= 0, "at least 0")


def scheduled(name: str, value: Any) -> None:
    """Checks a rate at one step: what a schedule returned, or a rebuilt config holds."""
    name, expected = f"{name} (or what its schedule returns)", "at least 0"
    _one_number(name, value, expected)
    if not isinstance(value, jax.Array):  # of an array it would wait for the device
        _in_range(name, value, lambda x: x >= 0, expected)


def state_dtype(dtype: Any, name: str = "state_dtype") -> np.dtype[Any]:
    """The dtype, if state may have it."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"AdamW: {name} must be a dtype, got {dtype!r}.") from None
    if found not in PARAM_DTYPES:
        raise ValueError(f"AdamW: {name} must be {dtype_names()}, got {found}.")
    return found


def scalar(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> None:
    """Refuses what is not one real number that fits; of a traced one, the kind and shape."""
    _one_number(name, value, expected)
    if not isinstance(value, jax.core.Tracer):
        _in_range(name, value, fits, expected)


def _one_number(name: str, value: Any, expected: str) -> None:
    if isinstance(value, bool | np.bool_ | str | None) or not _is_real(value):
        raise TypeError(f"AdamW: {name} must be a real number {expected}, got {value!r}.")
    if np.ndim(value) != 0:
        raise ValueError(
            f"AdamW: {name} must be a scalar, got shape {np.shape(value)}. For one value per "
            "replica build the config inside of the function that is given to jax.vmap."
        )


def _in_range(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> None:
    number = float(value)
    if not (math.isfinite(number) and fits(number)):
        raise ValueError(
            f"AdamW: {name} must be finite and {expected}, got {number}.{_rounding(value)}"
        )


def _rounding(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    if dtype is None or dtype.itemsize > 2:
        return ""
    return (
        f" It is of dtype {dtype}; numbers near 1 need float32. (optax.inject_hyperparams gives "
        "them the params' dtype: pass it hyperparam_dtype=jax.numpy.float32.)"
    )


def _is_real(value: Any) -> bool:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return jnp.issubdtype(value.dtype, np.floating) or jnp.issubdtype(value.dtype, np.integer)
    return isinstance(value, numbers.Real)


def flag(name: str, value: Any) -> None:
    """Refuses what is not a bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"AdamW: {name} must be True or False, got {value!r}. It is a choice, not data: it "
            f"cannot be traced.{_static(name, value)}"
        )


def _static(name: str, value: Any) -> str:
    if not isinstance(value, jax.Array):
        return ""
    return (
        " (optax.inject_hyperparams makes arrays of numbers: name this one in its "
        f"static_args=({name!r},).)"
    )


def _count(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"AdamW: {name} must be an integer or None, got {value!r}.{_static(name, value)}"
        )
    if value < least:
        raise ValueError(f"AdamW: {name} must be at least {least}, or None; got {value}.")


# ----------------------------------------------------------------------- trees of a step


def is_config(value: Any) -> None:
    """Refuses what is not an ``AdamW``."""
    from adamw_xla._config import AdamW

    if not isinstance(value, AdamW):
        raise TypeError(f"config must be an adamw_xla.AdamW, got {kind(value)}.")


def params(tree: Any, leaves: Sequence[Any], argument: str = "params") -> None:
    """Checks that every leaf is an array of a real floating dtype."""
    for i, leaf in enumerate(leaves):
        float_leaf(argument, tree, i, leaf)


def grads(params_tree: Any, treedef: Any, leaves: Sequence[Any], tree: Any) -> list[Any]:
    """Checks gradients against params; returns one per param, None where frozen."""
    try:
        flat = treedef.flatten_up_to(tree)
    except ValueError:
        structure("grads", params_tree, tree)
    for i, (g, p) in enumerate(zip(flat, leaves, strict=True)):
        if g is None:
            continue
        if not hasattr(g, "dtype") and not jax.tree_util.all_leaves([g]):
            structure("grads", params_tree, tree)
        float_leaf("grads", params_tree, i, g)
        same_shape("grads", params_tree, i, g, p)
    if leaves and all(g is None for g in flat):
        raise ValueError(
            "grads: every leaf is None, so there is nothing to update; pass the gradients of "
            "at least one param."
        )
    return flat


def state(params_tree: Any, treedef: Any, leaves: Sequence[Any], value: Any, c: "AdamW") -> None:
    """Checks that a state fits the params and was built for a config like ``c``."""
    from adamw_xla._state import AdamWState

    if not isinstance(value, AdamWState):
        raise TypeError(
            f"state must be an adamw_xla.AdamWState, got {kind(value)}; build it with "
            "adamw_init(params, config). (The order is adamw_step(params, grads, state, config).)"
        )
    accumulates = "gradient_accumulation_steps"
    needs = {
        "v_max": ("amsgrad", c.amsgrad),
        "ema": ("use_ema", c.use_ema),
        "accumulated": (accumulates, c.gradient_accumulation_steps is not None),
        "micro_step": (accumulates, c.gradient_accumulation_steps is not None),
        "skipped": ("skip_nonfinite", c.skip_nonfinite),
    }
    for field, (option, needed) in needs.items():
        if (getattr(value, field) is not None) != needed and leaves:
            has, wants = ("lacks", "sets") if needed else ("has", "does not set")
            raise ValueError(
                f"state.{field}: the state {has} it, but the config {wants} {option}: it was "
                "built for another config. Build it with adamw_init(params, config)."
            )
    for field in ("count", "micro_step", "skipped"):
        counter = getattr(value, field)
        is_number = type(counter) is int and field != "micro_step"  # that one is added to arrays
        if not is_number and (counter is not None or field == "count"):
            _counter(f"state.{field}", counter)
    for field in ("m", "v", "v_max", "ema", "accumulated"):
        tree = getattr(value, field)
        if tree is None and field not in ("m", "v"):
            continue
        if jax.tree.structure(tree) != treedef:
            structure(f"state.{field}", params_tree, tree)
        for i, (x, p) in enumerate(zip(jax.tree.leaves(tree), leaves, strict=True)):
            float_leaf(f"state.{field}", params_tree, i, x)
            same_shape(f"state.{field}", params_tree, i, x, p)


def _counter(name: str, value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        raise TypeError(f"{name}: must be an int32 scalar, got {value!r}.")
    if dtype != np.int32:
        raise TypeError(f"{name}: must be an int32 scalar, got one of dtype {dtype}.")
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


def mask(params_tree: Any, treedef: Any, value: Any) -> list[bool]:
    """For each leaf whether it decays."""
    if value is None:
        return [True] * treedef.num_leaves
    tree = value(params_tree) if is_mask_function(value) else value
    try:
        full = jax.tree.leaves(
            jax.tree.map(lambda keep, part: jax.tree.map(lambda _: keep, part), tree, params_tree)
        )
    except (ValueError, TypeError):
        structure("weight_decay_mask", params_tree, tree)
    for i, keep in enumerate(full):
        if not is_known_bool(keep):
            raise TypeError(
                f"weight_decay_mask{path(params_tree, i)}: must be True or False, known when "
                f"the step is traced; got {keep!r}."
            )
    return [bool(keep) for keep in full]
