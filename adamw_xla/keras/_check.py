"""What ``adamw_xla.keras`` refuses, and the texts that it answers with."""

from collections.abc import Iterable
import dataclasses
import json
import math
import os
from pathlib import Path
import sys
from typing import Any

from adamw_xla._check import calls, options
from adamw_xla._check.words import NATIVE
from adamw_xla._config import AdamW
from adamw_xla_lowering import PARAM_DTYPES, dtype_names, manual_axes, types_say_varying


def backend(name: str) -> None:
    """Refuses every backend but JAX."""
    if name != "jax":
        raise RuntimeError(
            f"adamw_xla.keras.AdamW: Keras runs on the {name} backend; it must run on JAX. Set "
            "KERAS_BACKEND=jax before Keras is imported, or use keras.optimizers.AdamW."
        )


def chosen_backend() -> None:
    """Refuses every backend but JAX before Keras is imported, when it can still be chosen."""
    if "keras" in sys.modules:
        return
    user = Path.home() if os.access(Path.home(), os.W_OK) else Path("/tmp")
    home = Path(os.environ.get("KERAS_HOME", user / ".keras")).expanduser()
    name = os.environ.get("KERAS_BACKEND") or _configured(home / "keras.json")
    backend(name or "tensorflow")  # Keras' own default


def _configured(file: Path) -> str | None:
    """The backend that Keras' file names, if there is one that Keras can read."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found.get("backend") if isinstance(found, dict) else None


_NOT_OF_KERAS = {
    field.name: f"stock Keras has none either; adamw_xla.AdamW has {field.name}"
    for field in dataclasses.fields(AdamW)
    if field.kw_only and field.name != "axis_names"
}

ALIASES = calls.called_here(
    {
        **_NOT_OF_KERAS,
        "weight_decay_mask": "call exclude_from_weight_decay(...) of the optimizer",
        "state_dtype": "float32_state",
        "return_info": "keep_info",
        **dict.fromkeys(
            ("state_format", "params_rounding", "master", "skip_spikes"),
            "an optimizer's variables are stock Keras', which its files have; adamw_xla.adamw_step "
            "has it",
        ),
        "stacked": "Keras' layers have variables of their own; adamw_xla.AdamW has stacked",
        "maximize": "pass a loss of the other sign",
        "groups": "give each group an optimizer of its own, in keras.optimizers.MultiOptimizer",
        "skip_nonfinite": "keras.optimizers.LossScaleOptimizer skips such steps",
    }
)


def other_steps(old: int | None, new: int | None, calls: int) -> None:
    """Refuses another number of accumulation steps where a mean would be of another number.

    Keras makes an update when the count of calls is a multiple of the steps, and divides by the
    steps whatever was summed.
    """
    if old == new:
        return
    what = f"AdamW: gradient_accumulation_steps cannot become {new}"
    if old is None:
        raise ValueError(
            f"{what}: the optimizer was built with None, so that it has no sums. Build another "
            "with it from get_config(), and give it this one's variables."
        )
    begun, apart = calls % old, calls % (new or 1)
    if begun or apart:
        summed = f"{begun} of {old} gradients are summed" if begun else "the next sum"
        when = math.lcm(old, new or 1)
        raise ValueError(
            f"{what} after {calls} calls: {summed}"
            f"{', and' if begun else ''} would be divided by another number. Change it when the "
            f"calls are a multiple of {when}: after {-calls % when} more."
        )


def keywords(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuses arguments that the class does not have and knows by another name.

    What it does not know either goes to Keras, which has a text of its own.
    """
    foreign = [name for name in given if name in ALIASES and name != "decay"]
    if foreign:
        raise TypeError(calls.unknown("AdamW", foreign, known, ALIASES))


def keep_info(value: Any) -> None:
    """Refuses what is not a bool."""
    if isinstance(value, str) and value == "per_leaf":
        raise ValueError(
            'AdamW: keep_info must be True or False, got "per_leaf"; the norms of each leaf are in '
            'what adamw_xla.adamw_step(..., return_info="per_leaf") returns.'
        )
    options.flag("keep_info", value)


def no_info() -> AttributeError:
    """The error where info is asked for and was not kept."""
    return AttributeError(
        "AdamW: info is what keep_info=True keeps, and this optimizer was made without; make one "
        'with AdamW.from_config(optimizer.get_config() | {"keep_info": True}), into which this '
        "one's files load."
    )


def names_of_axes(value: Any) -> tuple[str, ...] | None:
    """The names as a tuple; a file has them as a list."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
        raise TypeError(
            f"AdamW: axis_names must be names of mesh axes in a tuple or list, got {value!r}; one "
            "name is ('data',), none is ()."
        )
    return tuple(value)


WORDS = dataclasses.replace(NATIVE, options="the optimizer")


def types_tell(option: str, axis_names: Any) -> None:
    """Refuses names, or their lack, where types do not say what varies."""
    manual = manual_axes()
    asked = axis_names or (axis_names is None and any(size > 1 for size in manual.values()))
    if manual and asked and not types_say_varying(manual):
        raise ValueError(
            f"AdamW: {option} needs to know, inside of jax.shard_map, which variables are sharded, "
            "and with check_vma=False types do not tell; leave check_vma on, or give the optimizer "
            "axis_names=() where each device holds all variables whole, or is for itself."
        )


_NEVER_CALLED = (
    "update_step",
    "_backend_update_step",
    "_apply_weight_decay",
    "_clip_gradients",
    "_clip_by_norm",
    "_update_model_variables_moving_average",
    "_overwrite_model_variables_with_average_value",
)


def subclass(cls: type, ours: type) -> None:
    """Refuses a subclass that overrides what the update of all variables does not call."""
    whole = "_backend_apply_gradients"
    if getattr(cls, whole) is not getattr(ours, whole):
        return  # it may well call them
    for name in _NEVER_CALLED:
        if getattr(cls, name) is not getattr(ours, name):
            raise TypeError(
                f"AdamW: {cls.__name__} overrides {name}, which is never called: "
                "adamw_xla.keras.AdamW updates all variables at once. Derive "
                f"{cls.__name__} from keras.optimizers.AdamW."
            )


def variable(value: Any) -> None:
    """Refuses a variable that cannot be updated."""
    if value.dtype not in {dtype.name for dtype in PARAM_DTYPES}:
        raise TypeError(
            f"AdamW: variable {value.path} has dtype {value.dtype}; must be "
            f"{dtype_names()}. Set its trainable=False, or give it another optimizer."
        )


def gradient(variable: Any, grad: Any) -> None:
    """Refuses a gradient that is not of its variable's shape."""
    if grad.shape != variable.shape:
        raise ValueError(
            f"AdamW: the gradient of variable {variable.path} has shape {grad.shape}; must be "
            f"{variable.shape}, the variable's."
        )
