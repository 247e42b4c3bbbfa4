"""``adapt_state``: a state for the options and the containers that a training goes on with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adamw_xla._check import calls, formats, restored, trees
from adamw_xla._check.leaves import float_leaf, path
from adamw_xla._check.words import NATIVE, misplaced, not_a_state
from adamw_xla._config import AdamW, check_config
from adamw_xla._formats import packed
from adamw_xla._inside.grouped import frozen_leaves
from adamw_xla._inside.offload import to_device
from adamw_xla._placement import (
    filled,
    fixed_places,
    moved_beside,
    of_scalars,
    placed_at,
    zeros_like,
)
from adamw_xla._rules import spikes
from adamw_xla._state import COLUMNS, COUNTERS, AdamWState, first_of, used_fields
from adamw_xla_lowering import unpack

_ADAPT = dataclasses.replace(NATIVE, call="adapt_state(state, params, config)")


@calls.explained(
    "adapt_state",
    aliases={"opt_state": "state", "optimizer": "config", "model": "params"},
    lacking={
        "params": "the params of the step that the state is of",
        "config": "the options to go on with, an adamw_xla.AdamW",
    },
)
def adapt_state(state: Any, params: Any, config: AdamW) -> AdamWState:
    """Fits the state of a training to options that were turned on or off, and keeps the rest.

    Use it between two steps, or after a restore with the options that the state was saved with.
    Works eagerly, and under ``jax.jit``: of a state in the host's memory give it ``out_shardings``.

    What the config newly asks for begins: ``v_max`` as ``v``, ``ema`` as the params,
    ``remainder``, ``accumulated``, ``micro_step`` and ``skipped`` as zeros, ``norms`` with none,
    with the shardings of the state. Of norms for another window the newest are kept. Moments become
    words, as ``pack_state`` makes them, and words moments, exactly. What
    it no longer uses is dropped, and cannot come back: the average of the params
    (``adamw_finalize`` returns it, before), the maxima, the remainders (``master_params`` has the
    params that they belong to), the gradients of an accumulation that is not complete. What has
    another dtype than the config asks for is cast. The state of leaves that a group freezes is
    dropped; a leaf without state stays without, also where no group freezes it any more: from
    zeros its moments would be corrected as if they were as old as the count says, and its first
    steps several times too large. All else is as it was.

    Args:
      state: an ``AdamWState``, or what a checkpoint returned for one without its class: a dict of
        its fields, or a list of them in order. Its trees may hold the leaves in other containers
        than the params do, as such checkpoints return them; each goes where its path says.
      params: the params of the same step.
      config: the hyperparameters to go on with.

    Returns:
      The state for ``adamw_step(params, grads, state, config)``. It shares with the old one every
      array that did not change: donate only one of them.

    Raises:
      TypeError: ``state`` is none; ``config`` is no ``AdamW``; or a leaf is no array, or not of a
        real floating dtype: names its path.
      ValueError: the state is of other params, or has fields that this version does not know; a
        group of the config has no leaf; or a moment that is to become words has a NaN: names the
        leaf (under ``jax.jit`` it cannot be seen).

    Example:
      >>> import adamw_xla as ax, jax.numpy as jnp
      >>> params, config = {"w": jnp.ones(3)}, ax.AdamW()
      >>> params, state = ax.adamw_step(params, params, ax.adamw_init(params, config), config)
      >>> averaging = ax.AdamW(use_ema=True)
      >>> state = ax.adapt_state(state, params, averaging)
      >>> params, state = ax.adamw_step(params, params, state, averaging)
      >>> int(state.count)
      2
    """
    misplaced(_ADAPT, state=state, params=params, config=config)
    check_config(config, _ADAPT.call)
    old = _fields(state)
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    columns = {
        field: _column(field, params, treedef, tree, len(leaves))
        for field, tree in old.items()
        if field in COLUMNS
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for i in frozen_leaves(config, params):
        rows[i] = dict.fromkeys(rows[i])
    new = [_Leaf(params, i, leaves[i], row, config).adapted() for i, row in enumerate(rows)]
    used = used_fields(config)
    trees_of = {
        field: treedef.unflatten([row[field] for row in new]) for field in COLUMNS if field in used
    }
    return AdamWState(**_of_all(old, used, config), **trees_of)


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a state, or of what was one, by their names."""
    names = [field.name for field in dataclasses.fields(AdamWState)]
    if isinstance(value, AdamWState):
        return {name: getattr(value, name) for name in names}
    found = restored.find(value, _ADAPT.state, _ADAPT.state_class)
    if found is None or found.call not in (f"{_ADAPT.state_class}({x}state)" for x in ("*", "**")):
        raise not_a_state(_ADAPT, value)
    if isinstance(value, Mapping):
        return {name: value.get(name) for name in names}
    return dict.fromkeys(names) | dict(zip(names, value, strict=False))


def _column(field: str, params: Any, treedef: Any, tree: Any, count: int) -> list[Any]:
    """A field's value for each leaf of the params; None where there is none."""
    if tree is None:
        return [None] * count
    return trees.like_params_or_by_names(_ADAPT.of_state(field), params, treedef, tree)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One param with its state."""

    params: Any
    index: int
    param: Any
    state: Mapping[str, Any]
    config: AdamW

    def adapted(self) -> dict[str, Any]:
        """All that a state may have for it; None where it has no state."""
        if all(x is None for x in self.state.values()):
            return dict(self.state)
        float_leaf("params", self.params, self.index, self.param)
        for field, x in self.state.items():
            argument = _ADAPT.of_state(field)
            if x is not None:
                pattern = formats.DTYPES.get(field)
                trees.state_leaf(argument, self.params, self.index, x, self.param, pattern)
            elif field in ("m", "v") and self.state["words"] is None:
                raise ValueError(
                    f"{argument}{path(self.params, self.index)}: is None, and other fields of the "
                    "state have a leaf there; a param has all of its state, or none."
                )
        formats.check_param(self.params, self.index, self.param, self.config)
        there = {field: x for field, x in self.state.items() if x is not None}
        used = used_fields(self.config)
        if "words" in used and "words" not in there:
            m, v = there["m"], there["v"]
            there["words"] = packed(_ADAPT.of_state, self.params, self.index, m, v)
        elif "v" in used and "v" not in there:
            there["m"], there["v"] = unpack(to_device(there["words"]))
        kept = {field: self._cast(field, x) for field, x in there.items()}
        first = next(kept[x] for x in ("v", "words") if x in used)
        begins: dict[str, Callable[[], jax.Array]] = {
            "v_max": lambda: _copy(first, self._dtype("v_max"), first),
            "ema": lambda: _copy(self.param, self._dtype("ema"), first),
            "remainder": lambda: zeros_like([first], [self._dtype("remainder")])[0],
            "accumulated": lambda: zeros_like([first], [self._dtype("accumulated")])[0],
        }
        new = {x: begin() for x, begin in begins.items() if x in used and x not in kept}
        return dict.fromkeys(self.state) | kept | new

    def _dtype(self, field: str) -> Any:
        return self.config.dtype_of(field, self.param.dtype)

    def _cast(self, field: str, x: Any) -> Any:
        wanted = self._dtype(field)
        return x if jax.dtypes.canonicalize_dtype(x.dtype) == wanted else x.astype(wanted)


def _copy(x: Any, dtype: Any, like: Any) -> jax.Array:
    """A copy with the sharding of ``like``: it may be donated beside what it is of."""
    return jnp.array(moved_beside(x, like), dtype, copy=True)


def _of_all(old: Mapping[str, Any], used: Collection[str], config: AdamW) -> dict[str, Any]:
    """The counters, which a checkpoint may have returned as numbers, and the norms."""
    count = old["count"]
    if type(count) is int:
        place = of_scalars(fixed_places(jax.tree.leaves((old["m"], old["words"]))))
        count = filled(place) + count
    trees.counter(_ADAPT.of_state("count"), count)
    found = {"count": count}
    for name in COUNTERS[1:]:
        if name in used:
            value = old[name]
            if value is None or type(value) is int:
                value = filled(placed_at(count)) + (value or 0)
            trees.counter(_ADAPT.of_state(name), value)
            found[name] = value
    if "norms" in used:
        found["norms"] = begun = first_of("norms", config, placed_at(count))
        if (norms := old["norms"]) is not None:
            trees.window(_ADAPT.of_state("norms"), norms, None, "")
            same = isinstance(norms, jax.Array) and norms.shape == begun.shape
            found["norms"] = norms if same else spikes.resized(norms, len(begun))
    return found
