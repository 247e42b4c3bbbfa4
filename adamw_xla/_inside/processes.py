"""Whether all processes of a training were given the same options."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from adamw_xla._check import calls
from adamw_xla._check.options import called
from adamw_xla._check.trees import is_known_bool, is_mask_function
from adamw_xla._config import AdamW, check_config
from adamw_xla._rules.groups import Group
from adamw_xla._rules.spikes import SpikeRule

_TEXT, _DIGEST = 48, 16
"""Bytes of a value's text that are sent, for people, and of its digest, which is compared."""

_COUNTS = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
"""Where schedules are compared."""


@calls.explained("check_same_config", aliases={"optimizer": "config"})
def check_same_config(config: AdamW) -> None:
    """Refuses to go on where processes were given different options.

    Each process compiles its own program. Where a number differs, none of them notices: each
    updates its part, or its copy, of the params with its own, and a model that is nobody's comes of
    it. Where one clips or accumulates and others do not, they may wait for each other for ever.

    Call it once, before the first step, in **every** process: like all that processes do together
    it waits for the others. It sends 1.5 kB from each to all, through the devices; with one process
    it does nothing.

    Numbers are compared as they are, schedules by their values at some counts up to 1,000,000, and
    masks leaf by leaf. Of masks that are functions only that they are; ``name`` is not compared.

    Args:
      config: the hyperparameters.

    Raises:
      TypeError: ``config`` is no ``AdamW``; or a number of it is traced: call it outside of
        ``jax.jit``.
      ValueError: in all processes, where they disagree: names the options, and who has what.
    """
    check_config(config, "check_same_config(config)")
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(config)):
        raise TypeError(
            "check_same_config: config has a traced number; call it outside of jax.jit, before "
            "the first step."
        )
    if jax.process_count() == 1:
        return
    names = [field.name for field in dataclasses.fields(config) if field.name != "name"]
    texts = [_text(name, getattr(config, name)) for name in names]
    mine = np.frombuffer(b"".join(map(_packed, texts)), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    rows = everyone.reshape(jax.process_count(), len(names), _DIGEST + _TEXT)
    different = [i for i in range(len(names)) if len(np.unique(rows[:, i], axis=0)) > 1]
    if different:
        said = "; ".join(f"{names[i]} is {_who_has_what(rows[:, i])}" for i in different)
        raise ValueError(
            f"check_same_config: the processes disagree: {said}. Give all of them one config."
        )


def _text(option: str, value: Any) -> str:
    """An option's value as a text that is equal where the values are."""
    if option == "groups":
        return ", ".join(map(_group_text, value)) or "()"
    if isinstance(value, SpikeRule):
        return f"SpikeRule({value.window}, {_text('deviations', value.deviations)})"
    if is_mask_function(value):
        if option in ("weight_decay_mask", "stacked"):  # called with params, which are not here
            return "a function"
        try:
            values = [float(np.asarray(called(value, np.int32(k)))) for k in _COUNTS]
        except Exception:  # a schedule that is not to be called here
            return "a function"
        return f"a schedule: {', '.join(map(repr, values))}"
    if isinstance(value, jax.Array | np.ndarray | np.generic) and np.ndim(value) == 0:
        return f"{value.dtype} {value.item()!r}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    leaves, treedef = jax.tree.flatten(value)
    if jax.tree_util.treedef_is_leaf(treedef):
        return str(value)
    return f"{[bool(x) if is_known_bool(x) else x for x in leaves]} in {treedef}"


def _group_text(group: Group) -> str:
    """A group's; functions that match are called with params, which are not here."""
    numbers = {name: getattr(group, name) for name in group.NUMBERS}
    given = [f"{name}={_text(name, x)}" for name, x in numbers.items() if x is not None]
    named = repr(group.match) if isinstance(group.match, str) else "a function"
    return f"Group({', '.join([named, *given, *['frozen'] * bool(group.frozen)])})"


def _packed(text: str) -> bytes:
    data = text.encode()
    return hashlib.blake2b(data, digest_size=_DIGEST).digest() + data[:_TEXT].ljust(_TEXT, b"\0")


def _who_has_what(rows: Any) -> str:
    """A text and the processes that have it, and so on."""
    processes: dict[bytes, list[int]] = {}
    for process, row in enumerate(rows):
        processes.setdefault(bytes(row), []).append(process)
    texts = [row[_DIGEST:].rstrip(b"\0").decode(errors="ignore") for row in processes]
    pairs = zip(texts, processes.values(), strict=True)
    return " and ".join(f"{text} on {_listed(found)}" for text, found in pairs)


def _listed(processes: Sequence[int]) -> str:
    shown = ", ".join(map(str, processes[:8]))
    more = f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    return f"process{'es' * (len(processes) > 1)} {shown}{more}"
