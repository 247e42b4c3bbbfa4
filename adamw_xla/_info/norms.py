"""From sums of squares to the norms that a step tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._info.step_info import LeafNorms, StepInfo
from adamw_xla._inside.clipping import Scales, root
from adamw_xla._inside.hyper import Scalar
from adamw_xla_lowering import Squares
from adamw_xla_lowering.contract import Sums


class Measured(NamedTuple):
    """What an update measured: scalars, and of each leaf [leaves], or None.

    Attributes:
      grad_norm: before clipping.
      clip_factor: at most 1.
      param_norm: of new params.
      update_norm: of what was added to them.
      applied: bool.
      of_leaves: [3, n]: the three norms of each leaf, or of its layers, leaf after leaf.
    """

    grad_norm: jax.Array
    clip_factor: jax.Array
    param_norm: jax.Array
    update_norm: jax.Array
    applied: jax.Array
    of_leaves: jax.Array | None = None


def nothing(dtype: np.dtype[np.generic], layers: Sequence[int | None], asked: Sums) -> Measured:
    """What a call has measured that made no update; for each leaf how many layers it holds."""
    # An array each: what is donated must not be there twice.
    grad, factor, param, update = (jnp.full((), np.nan, dtype) for _ in range(4))
    count = sum(x or 1 for x in layers)
    of_leaves = jnp.full((3, count), np.nan, dtype) if asked == "leaves" else None
    return Measured(grad, factor, param, update, jnp.zeros((), bool), of_leaves)


def told(
    measured: Measured,
    rates: Sequence[jax.Array],
    layers: Sequence[int | None],
    put: Callable[[Sequence[jax.Array]], Any],
) -> StepInfo:
    """What the caller gets.

    Args:
      measured: of the call.
      rates: learning rate and weight decay.
      layers: for each leaf how many norms it has, None: one, without an axis; empty: for all.
      put: makes a tree like the params of a value for each leaf that is updated.
    """
    *scalars, applied, table = measured
    dtype = measured.grad_norm.dtype
    numbers = _together([*scalars, *rates, applied.astype(dtype)])
    grad_norm, clip_factor, param_norm, update_norm, learning_rate, weight_decay, flag = numbers
    return StepInfo(
        grad_norm=grad_norm,
        clip_factor=clip_factor,
        param_norm=param_norm,
        update_norm=update_norm,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        applied=flag != 0,
        per_leaf=None if table is None else LeafNorms(*(put(_cut(row, layers)) for row in table)),
    )


@jax.jit
def _together(numbers: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    """The numbers, by one kernel: XLA:GPU joins what reads one array, and else makes one each.

    It is the bound below which nothing is, of which XLA does not know that.
    """
    kind = numbers[0].dtype
    bounds = jnp.asarray(np.array([np.finfo(kind).min, 0], kind))
    bound = jax.lax.optimization_barrier(bounds)[0]  # type: ignore[no-untyped-call]
    return [jnp.maximum(x, bound) for x in numbers]


def _cut(norms: jax.Array, layers: Sequence[int | None]) -> list[jax.Array]:
    """Of each leaf its norm, or those of its layers."""
    if not any(layers):
        return _together(norms)
    ends = [*itertools.accumulate(count or 1 for count in layers)]
    pairs = zip(jnp.split(norms, ends[:-1]), layers, strict=True)
    return [own if count else own[0] for own, count in pairs]


def sums_needed(asked: Sums, axes: Sequence[tuple[str, ...]]) -> Sums:
    """Of what the update is to sum: of the tree, or of each leaf if these lie differently.

    Leaves are layers too, where these have sums of their own.
    """
    return "leaves" if asked == "leaves" or any(axes) else "tree"


def measured(
    sums: jax.Array,
    asked: Sums,
    axes: Sequence[tuple[str, ...]],
    clip: Scales,
    scale: Scalar,
    apply: jax.Array | None,
) -> Measured:
    """The norms of one update.

    Args:
      sums: the update's own, [kinds], or [n, kinds] of leaves and layers.
      asked: whether norms of each leaf are wanted.
      axes: for each of these the manual mesh axes over which its parts lie; empty: none.
      clip: the factors on the gradients.
      scale: the factor on every gradient before clipping.
      apply: whether the update was made; None: it was.
    """
    dtype = sums.dtype
    if any(axes):
        sums = _over_devices(sums, asked, axes)
    total = jnp.sum(sums, 0) if sums.ndim == 2 else sums
    factor = jnp.abs(jnp.asarray(scale, dtype))
    if clip.squares is None:
        grad_norm = _norm(Squares.chosen(total[0], total[1])) * factor
    else:
        grad_norm = of_all(clip.squares)
    of_leaves = None
    if asked == "leaves":
        grads = _norm(Squares.chosen(sums[:, 0], sums[:, 1])) * factor
        of_leaves = jnp.stack([grads, root(sums[:, -2]), root(sums[:, -1])])
    return Measured(
        grad_norm.astype(dtype),
        jnp.min(jnp.asarray(clip.factor, dtype), initial=1),
        root(total[-2]),
        root(total[-1]),
        jnp.ones((), bool) if apply is None else apply,
        of_leaves,
    )


def of_all(squares: Squares) -> jax.Array:
    """The norm of all, of one sum or of several in units of their own."""
    if squares.sum.ndim:
        squares = Squares.chosen(*jnp.sum(squares.in_both_units(), 1))
    return _norm(squares)


def _norm(squares: Squares) -> jax.Array:
    return root(squares.sum) / squares.unit


def _over_devices(sums: jax.Array, asked: Sums, axes: Sequence[tuple[str, ...]]) -> jax.Array:
    """Sums [leaves, kinds] of this device's parts -> those of all devices, in one all-reduce.

    Of the devices that hold the same part of a leaf, one counts it.
    """
    names = tuple(dict.fromkeys(name for lying in axes for name in lying))
    first = {name: jax.lax.axis_index(name) == 0 for name in names}
    counted = [
        jnp.all(jnp.stack([jnp.array(True), *(first[x] for x in names if x not in lying)]))
        for lying in axes
    ]
    own = jnp.where(jnp.stack(counted)[:, None], sums, 0)
    if asked == "tree":
        own = jnp.sum(own, 0)
    total: jax.Array = jax.lax.psum(own, names)  # type: ignore[no-untyped-call]
    return total
