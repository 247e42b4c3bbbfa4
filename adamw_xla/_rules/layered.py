"""Leaves that hold layers along axis 0, each clipped by a norm of its own: ``vmap`` of the update.

Leaves of as many layers are one equation, whose batch the layers are; it reads and writes the
stacks as they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._inside import explicit
from adamw_xla_lowering import STATE_KINDS, Squares, UpdateResult, shard_alike


@dataclasses.dataclass(frozen=True)
class Layered:
    """An update, and sums of squares, of leaves of which some hold layers.

    Leaves that hold as many, which lie alike, are a part. Norms' sums and ``leaf_scale``, of each
    leaf or layer, stand in one vector: part after part, in a part layer after layer.

    Attributes:
      layers: for each leaf how many layers it holds; None: none but itself.
      inner: the update.
      whole: the sum of squares of all leaves, over all devices.
      of_part: that of some, given their indices.
    """

    layers: Sequence[int | None]
    inner: Callable[..., UpdateResult]
    whole: Callable[..., Squares]
    of_part: Callable[[Sequence[int]], Callable[..., Squares]]

    def sum_of_squares(
        self, scale: jax.Array, leaves: Sequence[jax.Array], *, per_leaf: bool = False
    ) -> Squares:
        """As ``adamw_sum_of_squares``; with ``per_leaf`` of each layer."""
        if not per_leaf:
            return self.whole(scale, leaves)
        found = []
        for layers, indices in self._parts(leaves):
            function = functools.partial(self.of_part(indices), scale, per_leaf=True)
            own = [leaves[i] for i in indices]
            found.append((jax.vmap(function) if layers else function)(own))
        columns = ([jnp.ravel(explicit.whole(x)) for x in xs] for xs in zip(*found, strict=True))
        return Squares(*map(jnp.concatenate, columns))

    def update(
        self,
        hyper: jax.Array,
        params: Sequence[jax.Array],
        grads: Sequence[jax.Array],
        *,
        leaf_scale: jax.Array | None,
        groups: Sequence[int],
        **rest: Any,
    ) -> UpdateResult:
        """As ``adamw_update``, in an equation for each part; sums of leaves are of each layer.

        These stand leaf after leaf, in a leaf layer after layer.
        """
        state = {kind: rest.pop(kind) for kind in STATE_KINDS if kind in rest}
        columns = {"params": params, "grads": grads, **state}
        parts = self._parts(grads)
        ends = itertools.accumulate(len(indices) * (layers or 1) for layers, indices in parts)
        scales: Sequence[jax.Array | None] = [None] * len(parts)
        if leaf_scale is not None:
            scales = jnp.split(leaf_scale, [*ends][:-1])
        made: list[Any] = []
        for (layers, indices), scale in zip(parts, scales, strict=True):
            own = {kind: [xs[i] for i in indices] for kind, xs in columns.items()}
            own_groups = [groups[i] for i in indices]

            def updated(own: Any, scale: Any, groups: Any = own_groups) -> UpdateResult:
                return self.inner(hyper, **own, leaf_scale=scale, groups=groups, **rest)

            if layers:
                table = None
                if scale is not None:
                    table = explicit.axis_0_like(scale.reshape(layers, -1), own["grads"][0])
                made.append(_lying_alike(jax.vmap(updated)(own, table), own))
            else:
                made.append(updated(own, scale))
        order = np.argsort([i for _, indices in parts for i in indices])
        lists = {
            kind: [x for new in made for x in getattr(new, kind)]
            for kind in UpdateResult._fields
            if kind != "sums" and getattr(made[0], kind) is not None
        }
        found: Any = {kind: [xs[i] for i in order] for kind, xs in lists.items()}
        if made[0].sums is not None:
            sums = [
                explicit.whole(new.sums) if layers else new.sums[None]
                for (layers, _), new in zip(parts, made, strict=True)
            ]
            found["sums"] = _joined(sums, [indices for _, indices in parts])
        return UpdateResult(**found)

    def _parts(self, grads: Sequence[jax.Array]) -> list[tuple[int, list[int]]]:
        """How many layers the leaves of each part hold, 0 for none, and which these are."""
        found: dict[tuple[int, Any], list[int]] = {}
        for i, (layers, g) in enumerate(zip(self.layers, grads, strict=True)):
            key = (layers, explicit.axis_0_of(g)) if layers else (0, None)
            found.setdefault(key, []).append(i)
        return [(layers, indices) for (layers, _), indices in found.items()]


def _joined(sums: Sequence[jax.Array], parts: Sequence[Sequence[int]]) -> jax.Array:
    """From sums [layers, kinds] or [layers, leaves, kinds] of each part those of all parts."""
    if sums[0].ndim == 2:
        return functools.reduce(jnp.add, [jnp.sum(x, 0) for x in sums])
    pairs = zip(sums, parts, strict=True)
    rows = {i: table[:, k] for table, indices in pairs for k, i in enumerate(indices)}
    return jnp.concatenate([rows[i] for i in sorted(rows)])


def _lying_alike(new: UpdateResult, old: Mapping[str, Sequence[jax.Array]]) -> UpdateResult:
    """The results, sharded as what they replace.

    All leaves of a part read one table, by which XLA would conclude of one from another.
    """
    columns = new._asdict()
    tied: Any = {
        kind: [shard_alike(x, like) for x, like in zip(columns[kind], old[kind], strict=True)]
        for kind in columns
        if kind in old and columns[kind] is not None
    }
    return new._replace(**tied)
