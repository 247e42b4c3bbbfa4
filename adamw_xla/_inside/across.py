"""Norms of what lies on several devices, where the program is one device's: ``shard_map``."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._check import axes
from adamw_xla._check.leaves import path
from adamw_xla._check.words import Words
from adamw_xla._inside.clipping import SumOfSquares
from adamw_xla_lowering import Squares, manual_axes, types_say_varying, varying_axes


@dataclasses.dataclass(frozen=True)
class Across:
    """A sum of squares over all devices that hold a part of a leaf.

    Attributes:
      sum_of_squares: that of the parts which one device holds.
      axes: for each leaf the mesh axes over which its parts lie.
    """

    sum_of_squares: SumOfSquares
    axes: Sequence[tuple[str, ...]]

    def __call__(
        self, scale: jax.Array, leaves: Sequence[jax.Array], *, per_leaf: bool = False
    ) -> Squares:
        """As ``adamw_sum_of_squares``; one all-reduce for all leaves that lie alike."""
        alike: dict[tuple[str, ...], list[int]] = {}
        for i, names in enumerate(self.axes):
            alike.setdefault(names, []).append(i)
        if not any(alike):  # also where there are no leaves
            return self.sum_of_squares(scale, leaves, per_leaf=per_leaf)
        pairs = []
        for names, indices in alike.items():
            own = self.sum_of_squares(scale, [leaves[i] for i in indices], per_leaf=per_leaf)
            pairs.append(_total(own.in_both_units(), names))
        if not per_leaf:
            return Squares.chosen(*sum(pairs[1:], pairs[0]))
        if len(alike) == 1:
            return Squares.chosen(*pairs[0])
        order = np.argsort([i for indices in alike.values() for i in indices])
        return Squares.chosen(*jnp.concatenate(pairs, 1)[:, order])


def _total(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    if not names:
        return x
    total: jax.Array = jax.lax.psum(x, names)  # type: ignore[no-untyped-call]
    return total


def axes_of_leaves(
    axis_names: Any,
    option: str | None,
    tree: Any,
    params: Sequence[Any],
    grads: Sequence[Any],
    words: Words,
) -> list[tuple[str, ...]] | None:
    """For each leaf the manual axes over which its parts are to be summed.

    Args:
      axis_names: the config's.
      option: that which needs a norm; None: there is none.
      tree: the params' tree, for their paths.
      params: its leaves.
      grads: for each of them its gradient, or None.
      words: of the caller's API.

    Returns:
      The axes in the mesh's order; None where there is nothing to sum.

    Raises:
      ValueError: an axis is not there; or ``axis_names`` does not say enough, or says other than
        types do; or a gradient is not yet averaged.
    """
    manual = manual_axes()
    names = axes.named(axis_names)
    axes.known(names, manual, jax.sharding.get_abstract_mesh().axis_names)
    if option is None or not manual:
        return None
    types_tell = types_say_varying(manual)
    if axis_names is None:
        if any(size > 1 for size in manual.values()):
            raise axes.not_said(words, option, [*manual], types_tell)
        # One device: it knows all, but types do not tell that before it is summed.
        names = [*manual] if types_tell else []
        axis_names = tuple(names)
    flat = axes.is_flat(axis_names)
    if flat and not types_tell:
        if any(manual[name] > 1 for name in names):
            raise axes.needs_a_tree(names)
        return None
    said = None if flat else axes.of_each_leaf(axis_names, tree, len(params))
    found = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        over = frozenset[str]() if said is None else said[i]
        if types_tell and g is not None:
            checked = {*names} if flat else {*manual}
            varying = varying_axes(p) & checked
            if said is not None and over != varying:
                raise axes.contradicts_types(path(tree, i), over, varying)
            if rest := (varying_axes(g) & checked) - varying:
                raise axes.not_averaged(path(tree, i), rest)
            over = varying
        found.append(tuple(name for name in manual if name in over))
    return found


def not_over_layers(
    axis_names: Any,
    tree: Any,
    layers: Sequence[int | None],
    over: Sequence[tuple[str, ...]],
) -> None:
    """Refuses leaves whose layers, each with a norm of its own, lie on several devices.

    Args:
      axis_names: the config's.
      tree: the params' tree.
      layers: for each of its leaves how many layers it holds.
      over: for each the axes over which its parts lie.

    Raises:
      ValueError: names the leaf.
    """
    if not any(names for count, names in zip(layers, over, strict=True) if count):
        return
    first = axes.of_axis_0(axis_names, tree, len(layers))
    for i, (count, names) in enumerate(zip(layers, over, strict=True)):
        if count and names and (first[i] is None or first[i]):
            raise axes.over_layers(path(tree, i), names, first[i])
