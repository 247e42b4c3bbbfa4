"""Which leaf is in which group, as a list for the step and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Sharding

from adamw_xla._check import calls, trees
from adamw_xla._check.words import NATIVE, misplaced
from adamw_xla._config import AdamW, check_config
from adamw_xla._rules.groups import Group, shown
from adamw_xla._rules.paths import Paths, nearest, paths_of
from adamw_xla._rules.stacked import layers_of, one_layer


def first_matches(groups: Sequence[Group], leaves: Paths) -> list[int]:
    """For each leaf the first group that matches it; ``len(groups)`` where none does."""
    count = len(groups)

    def first(path: str, leaf: Any) -> int:
        if not (hasattr(leaf, "dtype") or isinstance(leaf, Sharding)):
            return count
        return next((i for i, group in enumerate(groups) if group.has(path, leaf)), count)

    return [first(path, leaf) for path, leaf in leaves]


def members(groups: Sequence[Group], params: Any, layers: Sequence[int | None]) -> list[int]:
    """``first_matches`` of the leaves of params.

    Args:
      groups: the config's.
      params: a tree of arrays, shapes or shardings.
      layers: for each leaf how many layers it holds; a callable sees one.

    Raises:
      ValueError: a group has no leaf, or all leaves are frozen.
    """
    if not groups or not layers:
        return [0] * len(layers)
    leaves = paths_of(one_layer(params, layers))
    found = first_matches(groups, leaves)
    if empty := {*range(len(groups))} - {*found}:
        raise ValueError(_without_leaf(groups, min(empty), leaves))
    if all(is_frozen(groups, i) for i in found):
        names = " and ".join(group.name for group in groups)
        raise ValueError(
            f"AdamW: groups: every leaf of params is frozen, by {names}, so there is nothing to "
            "update; let one of them match fewer."
        )
    return found


def is_frozen(groups: Sequence[Group], member: int) -> bool:
    """Whether the leaves of this entry of ``first_matches`` are left as they are."""
    return member < len(groups) and groups[member].frozen


def frozen_leaves(config: AdamW, params: Any) -> set[int]:
    """The leaves of params that groups of the config freeze.

    Raises:
      TypeError, ValueError: as ``members`` and ``layers_of``.
    """
    found = enumerate(members(config.groups, params, layers_of(config.stacked, params)))
    return {i for i, member in found if is_frozen(config.groups, member)}


def _without_leaf(groups: Sequence[Group], index: int, leaves: Paths) -> str:
    group = groups[index]
    name = f"AdamW: groups[{index}], {group.name},"
    matched = [x for x, i in zip(leaves, first_matches((group,), leaves), strict=True) if i == 0]
    if matched:
        before = sorted({*first_matches(groups, matched)})
        return (
            f"{name} has no leaf: all that it matches ({len(matched)}) are of "
            f"{' and '.join(groups[i].name for i in before)} before it, and the first that matches "
            "counts; put it first, or leave it out."
        )
    if isinstance(group.match, str):
        return (
            f"{name} {nearest(group.match, leaves)}. (adamw_xla.describe_groups(params, config) "
            "prints them all.)"
        )
    return (
        f"{name} is True for no leaf of params; it is called with a leaf's path, such as "
        f"{', '.join(repr(path) for path, _ in leaves[:3])}, and the leaf."
    )


_DESCRIBE = "describe_groups(params, config)"
_NUMBERS = ("learning_rate", "weight_decay", "beta_1", "beta_2", "epsilon")


@calls.explained("describe_groups", aliases={"model": "params", "optimizer": "config"})
def describe_groups(params: Any, config: AdamW) -> str:
    """Says which leaf is in which group, and with what numbers: two tables, as text.

    It raises nothing for a group without a leaf, but shows that it has none.

    Args:
      params: a pytree of arrays or of ``jax.ShapeDtypeStruct``.
      config: the hyperparameters.

    Returns:
      A table of the groups in order, the last row for leaves that none matches: how many leaves
      and elements each has, and its numbers, a schedule by its name. Then a table of the leaves:
      the group's number, the path, dtype and shape (of ``stacked`` layers their number and the
      shape of one, ``float32[12 x 3,4]``), and where ``weight_decay_mask`` says that it does not
      decay.

    Raises:
      TypeError: ``config`` is no ``AdamW``, or a group's callable says neither True nor False.

    Example:
      >>> import adamw_xla as ax, jax.numpy as jnp
      >>> params = {"head": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}}
      >>> config = ax.AdamW(1e-3, 0.1, groups=(ax.Group("bias", weight_decay=0.0),))
      >>> print(ax.describe_groups(params, config))
      group  match   leaves  elements  learning_rate  weight_decay  beta_1  beta_2  epsilon
      0      'bias'       1         3          0.001             0     0.9   0.999    1e-07
      -      rest         1         6          0.001           0.1     0.9   0.999    1e-07
      <BLANKLINE>
      group  leaf         type
      0      head/bias    float32[3]
      -      head/kernel  float32[2,3]
    """
    misplaced(dataclasses.replace(NATIVE, call=_DESCRIBE), params=params, config=config)
    check_config(config, _DESCRIBE)
    leaves = paths_of(params)
    layers = layers_of(config.stacked, params, may_match_none=True)
    seen = one_layer(params, layers)
    found = first_matches(config.groups, paths_of(seen))
    decays = _decays(seen, config, found)
    groups: list[Group | None] = [*config.groups, None]
    rows: list[tuple[str, ...]] = [("group", "match", "leaves", "elements", *_NUMBERS)]
    for i, group in enumerate(groups):
        own = [leaf for (_, leaf), member in zip(leaves, found, strict=True) if member == i]
        count = str(len(own)), str(sum(math.prod(getattr(x, "shape", ())) for x in own))
        rows.append((_number(groups, i), shown(group.match) if group else "rest", *count))
        rows[-1] += tuple(_text(config, group, name) for name in _NUMBERS)
    listed = [("group", "leaf", "type", "")]
    for (path, leaf), held, member, decay in zip(leaves, layers, found, decays, strict=True):
        note = "" if decay else "no decay, by the mask"
        listed.append((_number(groups, member), path, _type(leaf, held), note))
    return f"{_table(rows, left=2)}\n\n{_table(listed, left=4)}"


def _decays(params: Any, config: AdamW, found: Sequence[int]) -> list[bool]:
    """For each leaf whether the mask lets it decay; the mask sees no leaf that is frozen."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    live = [i for i, member in enumerate(found) if not is_frozen(config.groups, member)]
    kept = treedef.unflatten([x if i in live else None for i, x in enumerate(leaves)])
    mask = dict(
        zip(live, trees.mask(kept, len(live), config.weight_decay_mask, NATIVE.mask), strict=True)
    )
    return [mask.get(i, True) for i in range(len(leaves))]


def _number(groups: Sequence[Group | None], index: int) -> str:
    return "-" if groups[index] is None else str(index)


def _text(config: AdamW, group: Group | None, name: str) -> str:
    if group is not None and group.frozen:
        return "frozen" if name == "learning_rate" else "-"
    own = None if group is None else getattr(group, name)
    text = _value(getattr(config, name) if own is None else own)
    if name == "learning_rate" and group is not None and group.scale is not None:
        text += f" * {_value(group.scale)}"
    return text


def _value(value: Any) -> str:
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    return "traced" if isinstance(value, jax.core.Tracer) else f"{float(value):g}"


def _type(leaf: Any, layers: int | None) -> str:
    if not hasattr(leaf, "shape"):
        return type(leaf).__name__
    shape = ",".join(map(str, leaf.shape if layers is None else leaf.shape[1:]))
    return f"{leaf.dtype}[{shape if layers is None else f'{layers} x {shape}'.rstrip()}]"


def _table(rows: Sequence[tuple[str, ...]], left: int) -> str:
    """Columns two spaces apart, the first ``left`` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            x.ljust(width) if i < left else x.rjust(width)
            for i, (x, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
