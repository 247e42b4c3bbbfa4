"""A state in the host's memory: refused, or streamed through the update.

What streams it is the lowering (``adamw_xla_lowering/rules/streamed.py``); here stands who may.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from adamw_xla._check.leaves import in_device_memory, in_host_memory, path
from adamw_xla._check.words import Words
from adamw_xla._config import AdamW
from adamw_xla._placement import is_host
from adamw_xla._state import OF_ALL, AdamWState
from adamw_xla_lowering import is_on_host

_THERE = (
    "jax.device_put(state, adamw_xla.sharding.state_shardings(params, config, "
    'memory_kind="pinned_host")) moves it to the host\'s, from where offload=True streams it'
)
_HERE = "jax.device_put({}, jax.memory.Space.Device), inside of the jitted function too, moves it"


def check_memory(
    params_tree: Any,
    leaves: Sequence[Any],
    grads: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    live: Collection[int],
    state: AdamWState,
    config: AdamW,
    offload: bool,
    is_placed: bool,
    words: Words,
) -> None:
    """Refuses leaves in host memory, but for a state that is offloaded.

    Args:
      params_tree: the params.
      leaves: its leaves.
      grads: their gradients.
      columns: for each field that mirrors the params, its leaves.
      live: the leaves that have a gradient.
      state: the state.
      config: the hyperparameters.
      offload: whether the state is streamed.
      is_placed: whether the caller said where the state lies, and has it fetched from there.
      words: of the caller's API.

    Raises:
      TypeError: ``offload`` is no bool.
      ValueError: a leaf lies where it may not: names it. Or the config accumulates gradients,
        and the state is to be streamed.
    """
    _check_offload(offload, config)
    for i in live:
        in_device_memory("params", params_tree, i, leaves[i], _HERE.format("params"))
        in_device_memory("grads", params_tree, i, grads[i], _HERE.format("grads"))
    advice = _HERE.format(words.state)
    if words.offload:
        advice = f"{words.offload} streams the state from there and back; or {advice}"
    if is_placed and not offload:
        return
    for field, column in columns.items():
        argument = words.of_state(field)
        for i in live:
            if offload:
                in_host_memory(argument, params_tree, i, column[i], _THERE)
            else:
                in_device_memory(argument, params_tree, i, column[i], advice)
    for name in () if offload else OF_ALL:
        if (counter := getattr(state, name)) is not None:
            in_device_memory(words.of_state(name), counter, None, counter, advice)


def check_places(params_tree: Any, places: Mapping[str, Sequence[Sharding | None]]) -> None:
    """Refuses, of a state that is streamed, new places outside of the host's memory.

    Raises:
      ValueError: names the leaf.
    """
    for field, column in places.items():
        for i, place in enumerate(column):
            if place is not None and not is_host(place):
                raise ValueError(
                    f"state_shardings.{field}{path(params_tree, i)}: is in the device's memory, "
                    "and offload=True keeps the state in the host's; build them with "
                    'adamw_xla.sharding.state_shardings(..., memory_kind="pinned_host"), or leave '
                    "offload out."
                )


def _check_offload(offload: Any, config: AdamW) -> None:
    if not isinstance(offload, bool):
        raise TypeError(f"offload: must be True or False, got {offload!r}; {_THERE}.")
    if offload and config.gradient_accumulation_steps is not None:
        raise ValueError(
            "offload: does not go with gradient_accumulation_steps, whose sum of gradients would "
            "travel at each call; sum them before the step, as in a jax.lax.scan over "
            "micro-batches, and leave the option out."
        )


def to_device(x: jax.Array) -> jax.Array:
    """``x`` where it can be computed with."""
    return jax.device_put(x, jax.memory.Space.Device) if is_on_host(jax.typeof(x)) else x


def as_before(new: jax.Array, old: Any) -> jax.Array:
    """A counter, in the memory of the one before."""
    return jax.device_put(new, jax.memory.Space.Host) if is_on_host(jax.typeof(old)) else new
