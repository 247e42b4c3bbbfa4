"""Calls that do not fit their function: unknown keywords, arguments that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import difflib
import functools
import inspect
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "alpha", "step_size", "rate", "schedule", "lr_schedule"),
    "beta_1": ("b1", "beta1", "beta_one"),
    "beta_2": ("b2", "beta2", "beta_two"),
    "beta_1 and beta_2": ("betas", "beta"),
    "epsilon": ("eps", "epsilon_"),
    "epsilon_root": ("eps_root",),
    "weight_decay": ("wd", "decay", "decay_rate", "l2"),
    "weight_decay_mask": ("mask", "decay_mask", "exclude_from_weight_decay"),
    "state_dtype": ("mu_dtype", "m_dtype", "moment_dtype", "accumulator_dtype", "dtype"),
    "nesterov": ("use_nesterov",),
    "amsgrad": ("use_amsgrad", "ams_grad"),
    "clipvalue": ("clip_value", "max_delta", "grad_clip_value"),
    "clipnorm": ("clip_norm",),
    "global_clipnorm": (
        "max_norm",
        "max_grad_norm",
        "grad_clip",
        "grad_clip_norm",
        "gradient_clip",
        "clip_grad_norm",
        "global_clip_norm",
        "clip_global_norm",
        "clip_by_global_norm",
    ),
    "use_ema": ("ema",),
    "ema_momentum": ("ema_decay",),
    "loss_scale_factor": ("loss_scale", "grad_scale", "inv_scale"),
    "gradient_accumulation_steps": (
        "accumulation_steps",
        "accumulate_steps",
        "grad_accum_steps",
        "accumulate_grad_batches",
        "every_k_schedule",
    ),
    "skip_nonfinite": ("skip_nan", "skip_nans", "skip_non_finite", "apply_if_finite"),
    "skip_spikes": ("skip_step_on_spikes", "skip_bad_steps", "skip_step", "spike_rule"),
    "groups": ("param_groups", "parameter_groups", "group", "param_labels"),
    "stacked": ("scanned", "scan_layers", "stacked_layers", "layers"),
    "axis_names": ("axis_name", "mesh_axes", "pmean_axis_name"),
}
"""Each option by its name here, with the names that it has elsewhere."""

ALIASES = {alias: name for name, aliases in _ELSEWHERE.items() for alias in aliases}
"""The option's name here by its name elsewhere: in optax, PyTorch, Keras, or in speech."""

INFO = ("return_info", "return_metrics", "has_aux")
"""What asks an update for more than its result, here and elsewhere."""

OF_THE_STEP = {
    **{
        x: f"adamw_step(..., {x}=...) has it"
        for x in ("implementation", "offload", "state_shardings")
    },
    **{x: "adamw_step(..., return_info=True) asks for it" for x in (*INFO, "keep_info")},
}
"""Arguments of a step that are no options of a config, and where they are."""


def called_here(names: Mapping[str, str]) -> dict[str, str]:
    """``ALIASES`` for an API that has other names for some: its name by every other."""
    found = {alias: names.get(name, name) for alias, name in ALIASES.items()}
    return {**found, **names}


def unknown(
    function: str, keywords: Iterable[str], known: Iterable[str], aliases: Mapping[str, str]
) -> str:
    """The text for the first keyword that ``function`` does not have."""
    known = tuple(known)
    keyword = next(iter(keywords))
    if name := aliases.get(keyword):
        advice = f"here it is {name}." if name.replace(" and ", "").isidentifier() else f"{name}."
    elif near := difflib.get_close_matches(keyword, known, 1):
        advice = f"did you mean {near[0]}?"
    else:
        advice = f"it has {', '.join(known)}."
    return f"{function}: has no argument {keyword}; {advice}"


def explained(
    name: str,
    *,
    aliases: Mapping[str, str],
    lacking: Mapping[str, str] | None = None,
    form: str | None = None,
    is_method: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Answers a call whose arguments do not fit with which ones are meant.

    Args:
      name: what the user called.
      aliases: its argument by names from elsewhere, or what to do in place of them.
      lacking: for an argument that may be forgotten, what it is.
      form: the call as it should be; None: of the arguments that it must have.
      is_method: whether the first argument is of no concern to the caller.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except TypeError:
                # Only a call that never began does not bind.
                text = _misfit(
                    name, function, is_method, args, kwargs, aliases, lacking or {}, form
                )
                if text is None:
                    raise
            raise TypeError(text)

        return call

    return decorate


def _misfit(
    name: str,
    function: Callable[..., Any],
    is_method: bool,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    aliases: Mapping[str, str],
    lacking: Mapping[str, str],
    form: str | None,
) -> str | None:
    """Why these arguments do not fit the function; None if they do."""
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        reason = str(error)
    else:
        return None
    parameters = [*signature.parameters.values()][is_method:]
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    takes_any = len(known) < len(parameters)
    if not takes_any and (foreign := [key for key in kwargs if key not in known]):
        return unknown(name, foreign, known, aliases)
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = ", ".join(p.name for p in positional if p.default is p.empty)
    form = form or f"{name}({needed or '...'})"
    given = len(args) - is_method
    if given > len(positional):
        more = [key for key in known if key not in [p.name for p in positional]]
        rest = f"; {', '.join(more)} are given by name" if more else ""
        return f"{name}: got {given} arguments by position, and has {len(positional)}{rest}."
    for parameter in positional[given:]:
        if parameter.default is parameter.empty and parameter.name not in kwargs:
            what = lacking.get(parameter.name)
            return f"{name}: lacks {parameter.name}{f', {what}' if what else ''}; call {form}."
    return f"{name}: {reason}; call {form}."
