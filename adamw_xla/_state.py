"""``AdamWState`` and how it begins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
import dataclasses
import functools
from typing import Any, TypeVar

import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import Sharding
import numpy as np

from adamw_xla._check import calls, formats, trees
from adamw_xla._check.leaves import float_leaf, path, same_dtype
from adamw_xla._check.words import (
    NATIVE,
    Words,
    in_another_format,
    misplaced,
    not_a_state,
    of_other_options,
)
from adamw_xla._config import AdamW, check_config
from adamw_xla._inside.grouped import frozen_leaves
from adamw_xla._placement import filled, fixed_places, of_scalars, zeros_like
from adamw_xla._rules import spikes
from adamw_xla._saved import flax

Tree = TypeVar("Tree")

COLUMNS = ("m", "v", "words", "v_max", "ema", "remainder", "accumulated")
"""Fields that mirror the params."""

LATER = ("words", "remainder", "norms")
"""Fields that states of version 0.1.0 have not."""

COUNTERS = ("count", "micro_step", "skipped")
"""Fields that are int32 scalars."""

OF_ALL = (*COUNTERS, "norms")
"""Fields of the whole tree: all devices hold all of them."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class AdamWState:
    """What AdamW remembers between steps: a pytree.

    Each field but the counters and ``norms`` mirrors the params' tree, so a tree of shardings for
    the params serves for it. Fields that the config does not use are None.

    Attributes:
      count: int32 scalar, updates done.
      m: first moments (float32, or ``config.state_dtype``); with ``state_format="word16"`` None.
      v: second moments (float32; float64 for float64 params); likewise.
      v_max: with ``amsgrad``, the running maxima of ``v``.
      ema: with ``use_ema``, the average of the params; the params themselves at first.
      accumulated: with ``gradient_accumulation_steps``, the sum of the gradients so far.
      micro_step: with it too, int32 scalar: calls since the last update.
      skipped: with ``skip_nonfinite`` or ``skip_spikes``, int32 scalar: calls that were skipped.
      words: with ``state_format="word16"``, m and v of each element in one bfloat16;
        ``adamw_xla.unpack_state`` makes moments of them.
      remainder: with ``master="split"``, int16: the rest of each param's float32 master.
      norms: with ``skip_spikes``, float32 [window]: the norms of the last updates' gradients, the
        newest last; -1 where there is none yet.
    """

    count: jax.Array
    m: Any = None
    v: Any = None
    v_max: Any = None
    ema: Any = None
    accumulated: Any = None
    micro_step: jax.Array | None = None
    skipped: jax.Array | None = None
    words: Any = None
    remainder: Any = None
    norms: jax.Array | None = None

    def __post_init__(self) -> None:
        """Makes the state known to Flax' checkpoints, where Flax is in use."""
        flax.register(type(self))

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """All fields are children, but for later ones that are None.

        So a state that has none of them is the tree that versions before them saved.
        """
        kept = vars(self).get("_kept", ())
        later = tuple(x for x in LATER if getattr(self, x) is not None or x in kept)
        keys = (*_FIRST, *later)
        return tuple((jax.tree_util.GetAttrKey(x), getattr(self, x)) for x in keys), later

    @classmethod
    def tree_unflatten(cls, later: tuple[str, ...], children: Any) -> AdamWState:
        """The state of these children."""
        state = cls(**dict(zip((*_FIRST, *later), children, strict=True)))
        if any(getattr(state, x) is None for x in later):  # a leaf that was taken out of the tree
            object.__setattr__(state, "_kept", later)
        return state


_FIRST = tuple(x.name for x in dataclasses.fields(AdamWState) if x.name not in LATER)

# Lets `jax.export` write functions that take or return a state.
export.register_pytree_node_serialization(
    AdamWState,
    serialized_name="adamw_xla.AdamWState",
    serialize_auxdata=lambda later: ",".join(later).encode(),
    deserialize_auxdata=lambda data: tuple(filter(None, bytes(data).decode().split(","))),
)


_INIT = dataclasses.replace(NATIVE, call="adamw_init(params, config)")


@calls.explained(
    "adamw_init",
    aliases={"optimizer": "config", "model": "params", "parameters": "params"},
    lacking={"config": "the options, an adamw_xla.AdamW"},
)
def adamw_init(params: Any, config: AdamW) -> AdamWState:
    """Builds the state for ``params``.

    Works eagerly, under ``jax.jit`` and under ``jax.eval_shape``. The new arrays take the
    shapes and shardings of the params, also under ``jit`` with automatic axes, unless its
    ``out_shardings`` say otherwise; counters are replicated over the params' mesh.

    Args:
      params: a pytree of arrays, bfloat16, float16, float32 or float64. Of shapes without
        values ``adamw_xla.sharding.abstract_state`` makes the state's.
      config: the hyperparameters.

    Returns:
      The state before the first update; None for leaves that a group freezes.

    Raises:
      TypeError: ``config`` is no ``AdamW``; or a leaf is no array, or not of a real floating
        dtype: names its path.
      ValueError: ``config.state_dtype`` is float64, and JAX has none now; or one of its groups
        has no leaf.
    """
    misplaced(_INIT, params=params, config=config)
    check_config(config, _INIT.call)
    _check_values(params)
    return begin(params, config)


def begin(params: Any, config: AdamW) -> AdamWState:
    """What ``adamw_init`` does; of shapes without values it makes real zeros, as optax does."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    frozen = frozen_leaves(config, params)
    live = {i: leaf for i, leaf in enumerate(leaves) if i not in frozen}
    for i, leaf in live.items():
        float_leaf("params", params, i, leaf, needs_values=config.use_ema)
    for i, leaf in live.items():
        formats.check_param(params, i, leaf, config)
    place = of_scalars(fixed_places(leaves))

    def column(field: str) -> Any:
        dtypes = [config.dtype_of(field, p.dtype) for p in live.values()]
        if field == "ema":
            # A copy, so that params and state can be donated side by side.
            pairs = zip(live.values(), dtypes, strict=True)
            new = [jnp.array(p, dtype, copy=True) for p, dtype in pairs]
        else:
            new = zeros_like([*live.values()], dtypes)
        there = dict(zip(live, new, strict=True))
        return treedef.unflatten([there.get(i) for i in range(len(leaves))])

    return built(config, column, lambda field: first_of(field, config, place))


def _check_values(params: Any) -> None:
    """Refuses shapes without values, of which real zeros would be made."""
    for i, leaf in enumerate(jax.tree.leaves(params)):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"params{path(params, i)}: is a jax.ShapeDtypeStruct, a shape without values; "
                "adamw_xla.sharding.abstract_state(params, config) makes the state of shapes, and "
                "allocates nothing. (Under jax.eval_shape or jax.jit(...).lower, init takes them.)"
            )


def built(config: AdamW, column: Callable[[str], Any], of_all: Callable[[str], Any]) -> AdamWState:
    """A state with the fields that a config has.

    Args:
      config: the hyperparameters.
      column: makes the tree of a field that mirrors the params.
      of_all: makes one of the others.
    """
    used = used_fields(config)
    return AdamWState(**{x: (of_all if x in OF_ALL else column)(x) for x in used})


def first_of(field: str, config: AdamW, place: Sharding | None) -> jax.Array:
    """What a field of the whole tree begins with, at a place where there is one."""
    if field != "norms":
        return filled(place)
    assert config.skip_spikes is not None
    return filled(place, spikes.EMPTY, (config.skip_spikes.window,), np.float32)


def used_fields(config: AdamW) -> tuple[str, ...]:
    """The fields that a state for this config has."""
    return ("count", *(x for x, (_, is_used) in optional_fields(config).items() if is_used))


def optional_fields(c: AdamW) -> dict[str, tuple[str, bool]]:
    """For each field that a state may lack the option that it is for, and whether that is set."""
    is_in_words = c.state_format == "word16"
    moments = 'state_format="moments"', not is_in_words
    accumulates = "gradient_accumulation_steps", c.gradient_accumulation_steps is not None
    looks = "skip_spikes", c.skip_spikes is not None
    skips = looks if looks[1] else ("skip_nonfinite", c.skip_nonfinite)
    return {
        "m": moments,
        "v": moments,
        "words": ('state_format="word16"', is_in_words),
        "v_max": ("amsgrad", c.amsgrad),
        "ema": ("use_ema", c.use_ema),
        "remainder": ('master="split"', c.master == "split"),
        "accumulated": accumulates,
        "micro_step": accumulates,
        "norms": looks,
        "skipped": skips,
    }


def check_kind(value: Any, words: Words = NATIVE) -> None:
    """Refuses what is no state at all."""
    if not isinstance(value, AdamWState):
        raise not_a_state(words, value)


def check_state(
    params_tree: Any,
    treedef: Any,
    leaves: Sequence[Any],
    value: AdamWState,
    c: AdamW,
    live: Collection[int] = (),
    *,
    any_dtype_of_m: bool = False,
    words: Words = NATIVE,
) -> dict[str, list[Any]]:
    """Checks that a state fits the params and was built for a config like ``c``.

    A leaf without state is not looked at, unless it is live.

    Args:
      params_tree: the params.
      treedef: its structure.
      leaves: its leaves.
      value: the state.
      c: the config.
      live: the leaves that have a gradient.
      any_dtype_of_m: the caller answers for the dtype of ``m``.
      words: of the caller's API.

    Returns:
      For each field that mirrors the params its value for each of their leaves, None where a
      leaf has no state.
    """
    needs = optional_fields(c)
    if value.norms is not None and not c.skip_nonfinite:  # both are of the same option
        needs["skipped"] = needs["norms"]
    is_wrong = {x: (getattr(value, x) is not None) != needed for x, (_, needed) in needs.items()}
    if leaves and is_wrong["words"] and is_wrong["m"]:
        raise in_another_format(words, needs["words"][1])
    for field, (option, needed) in needs.items():
        if is_wrong[field] and leaves and not (needed and field in ("m", "v", "words")):
            changed = [x for x, wrong in is_wrong.items() if wrong and needs[x][0] == option]
            raise of_other_options(words, field, option, needed, changed)
    for field in COUNTERS:
        counter = getattr(value, field)
        is_number = type(counter) is int and field != "micro_step"  # an old state has none
        if not is_number and (counter is not None or field == "count"):
            trees.counter(words.of_state(field), counter)
    if value.norms is not None and c.skip_spikes is not None:
        advice = f"; {words.adapt} makes one of it, with the newest norms"
        trees.window(words.of_state("norms"), value.norms, c.skip_spikes.window, advice)
    trees_of = {field: getattr(value, field) for field in COLUMNS}
    columns = {
        field: trees.state_like_params(words, field, params_tree, treedef, tree)
        for field, tree in trees_of.items()
        if tree is not None or (leaves and needs.get(field, ("", False))[1])
    }
    dtype_of = functools.cache(c.dtype_of)
    for i, (p, *row) in enumerate(zip(leaves, *columns.values(), strict=True)):
        if i not in live and all(x is None for x in row):
            continue
        float_leaf("params", params_tree, i, p)
        formats.check_param(params_tree, i, p, c)
        for field, x in zip(columns, row, strict=True):
            if x is None and i not in live:
                continue
            pattern = formats.DTYPES.get(field)
            trees.state_leaf(words.of_state(field), params_tree, i, x, p, pattern)
            if pattern is None and not (any_dtype_of_m and field == "m"):
                same_dtype(words.of_state(field), params_tree, i, x, dtype_of(field, p.dtype))
    return columns
