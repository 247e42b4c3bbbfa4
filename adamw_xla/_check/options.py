"""Checks of numbers and choices, each by the name that its caller has for it.

Errors begin with ``api``, what was called.
"""

from collections.abc import Callable, Mapping
import inspect
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla_lowering import PARAM_DTYPES, dtype_names


def coefficients(
    rates: Mapping[str, Any],
    betas: Mapping[str, Any],
    epsilons: Mapping[str, Any],
    api: str = "AdamW",
) -> None:
    """Checks the numbers that every front end has, by the names that it has for them."""
    for name, value in rates.items():
        scalar_or_schedule(name, value, api)
    for name, value in betas.items():
        scalar(name, value, lambda x: 0 <= x < 1, "in [0, 1)", api)
    for name, value in epsilons.items():
        scalar(name, value, lambda x: x >= 0, "at least 0", api)


def scalar_or_schedule(name: str, value: Any, api: str = "AdamW") -> None:
    """Checks a rate: a number at least 0, a scalar array, or a callable."""
    if not callable(value):
        scalar(name, value, lambda x: x >= 0, "at least 0", api)
    elif not (takes(value, 1) or takes(value, 0)):
        raise TypeError(
            f"{api}: {name} is a callable that cannot be called with the step count alone, got "
            f"{value!r}; must be a number, or a schedule: a callable from the count to one. (If "
            "it makes schedules, call it, and pass what it returns.)"
        )


def takes(value: Callable[..., Any], arguments: int) -> bool:
    """Whether a callable can be called with so many arguments; True where it does not say."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * arguments)
    except TypeError:
        return False
    return True


def called(schedule: Callable[..., Any], count: Any) -> Any:
    """What a schedule returns; as in Keras, it may be a callable without arguments."""
    return schedule(count) if takes(schedule, 1) else schedule()


def scheduled(name: str, value: Any) -> None:
    """Checks a rate at one step: what a schedule returned, or a rebuilt config holds."""
    name, expected = f"AdamW: {name} (or what its schedule returns)", "at least 0"
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


def available(name: str, dtype: Any) -> np.dtype[Any]:
    """The dtype, if arrays can have it now."""
    found = np.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise ValueError(
            f"AdamW: {name} is {found}, which JAX has with jax_enable_x64 alone; set "
            f"jax.config.update('jax_enable_x64', True) first, or leave {name} out."
        )
    return found


def scalar(
    name: str, value: Any, fits: Callable[[float], bool], expected: str, api: str = "AdamW"
) -> None:
    """Refuses what is not one real number that fits; of a traced one, the kind and shape."""
    _one_number(f"{api}: {name}", value, expected)
    if not isinstance(value, jax.core.Tracer):
        _in_range(f"{api}: {name}", value, fits, expected)


def _one_number(name: str, value: Any, expected: str) -> None:
    if isinstance(value, bool | np.bool_ | str | None) or not _is_real(value):
        raise TypeError(
            f"{name} must be a real number {expected}, got {value!r}"
            f"{_how_to_have_a_number(name, value, expected)}."
        )
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}. For one value per "
            "replica build the optimizer inside of the function that is given to jax.vmap."
        )


def _how_to_have_a_number(name: str, value: Any, expected: str) -> str:
    if value is None and "None" not in expected:
        return "; 0 is for none" if "at least 0" in expected else "; leave it out for its default"
    if callable(value) and "schedule" not in name:
        return "; schedules there may be of learning_rate and weight_decay alone"
    if isinstance(value, bool | np.bool_ | str):
        return "; give the number itself"
    return ""


def _in_range(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> None:
    number = float(value)
    if not (math.isfinite(number) and fits(number)):
        raise ValueError(f"{name} must be finite and {expected}, got {number}.{_rounding(value)}")


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


def mask(name: str, value: Any) -> None:
    """Refuses what has no bool for any leaf: names, say. Arrays and numbers wait for the params."""
    for key, leaf in [] if callable(value) else jax.tree_util.tree_leaves_with_path(value):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
            raise TypeError(
                f"AdamW: {name}{jax.tree_util.keystr(key)} must be True or False, got {leaf!r}; "
                "give a tree of bools, a prefix of the params' tree, or a function from params "
                "to one."
            )


def flag(name: str, value: Any, api: str = "AdamW") -> None:
    """Refuses what is not a bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{api}: {name} must be True or False, got {value!r}. It is a choice, not data: it "
            f"cannot be traced.{_static(name, value)}"
        )


def _static(name: str, value: Any) -> str:
    if not isinstance(value, jax.Array):
        return ""
    return (
        " (optax.inject_hyperparams makes arrays of numbers: name this one in its "
        f"static_args=({name!r},).)"
    )


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuses what is none of the choices."""
    if not any(value is x or (isinstance(value, str) and value == x) for x in choices):
        *some, last = map(repr, choices)
        raise ValueError(f"AdamW: {name} must be {', '.join(some)} or {last}, got {value!r}.")


def count(name: str, value: Any, least: int) -> None:
    """Refuses what is neither None nor an integer from ``least`` on."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"AdamW: {name} must be an integer or None, got {value!r}.{_static(name, value)}"
        )
    if value < least:
        raise ValueError(f"AdamW: {name} must be at least {least}, or None; got {value}.")
