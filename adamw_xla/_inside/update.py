"""A flat list of leaves: accumulate; clip, make the step's numbers, update."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._config import AdamW
from adamw_xla._info import norms
from adamw_xla._inside import clipping
from adamw_xla._inside.clipping import SumOfSquares
from adamw_xla._inside.hyper import Row, Scalar, hyper_rows
from adamw_xla._rules import spikes
from adamw_xla._state import used_fields
from adamw_xla_lowering import (
    STATE_KINDS,
    UpdateResult,
    adamw_sum_of_squares,
    adamw_update,
    manual_axes,
    varying_axes,
)
from adamw_xla_lowering.contract import Sums


def do_if(condition: jax.Array, body: Callable[[Any], Any], x: Any) -> Any:
    """``body(x)`` where the condition holds, else ``x``; in place, where ``x`` may be written.

    A loop of at most one round. XLA:GPU copies what goes through a conditional (2 GB for
    GPT-2 small) and updates what a loop carries in place. A loop has no reverse derivative.
    Eagerly it is just the body, since a loop would be compiled anew at each call.
    """
    is_traced = isinstance(condition, jax.core.Tracer)
    if not is_traced:
        return body(x) if condition else x

    def once(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jnp.logical_and(carry[0], False), body(carry[1])

    carry = condition, as_varying_as_after(condition, body, x)
    return jax.lax.while_loop(lambda carry: carry[0], once, carry)[1]


def as_varying_as_after(condition: jax.Array, body: Callable[[Any], Any], x: Any) -> Any:
    """``x``, varying over the manual axes that ``body(x)`` and the condition vary over.

    Where devices of ``jax.shard_map`` differ on whether to call it, its results differ too.
    """
    while manual_axes():
        after = jax.eval_shape(body, x)
        found = [varying_axes(a) | varying_axes(condition) for a in jax.tree.leaves(after)]
        treedef: Any
        leaves, treedef = jax.tree.flatten(x)
        missing = [axes - varying_axes(a) for axes, a in zip(found, leaves, strict=True)]
        if not any(missing):
            break
        x = treedef.unflatten(
            jax.lax.pcast(a, tuple(axes), to="varying") if axes else a
            for axes, a in zip(missing, leaves, strict=True)
        )
    return x


class Backend(NamedTuple):
    """What does the work of a step.

    Attributes:
      update: ``adamw_update`` or its like.
      sum_of_squares: over all devices.
      do_if: runs a body or not.
      offload: whether ``update`` streams the state.
      axes: for each leaf, or layer of it, the manual mesh axes over which its parts lie; empty:
        none.
      layers: for each leaf how many layers have sums of their own; None, or empty: none.
    """

    update: Callable[..., UpdateResult] = adamw_update
    sum_of_squares: SumOfSquares = adamw_sum_of_squares
    do_if: Callable[..., Any] = do_if
    offload: bool = False
    axes: Sequence[tuple[str, ...]] = ()
    layers: Sequence[int | None] = ()


class Updated(NamedTuple):
    """What an update makes.

    Attributes:
      leaves: the new ones.
      apply: with ``skip_nonfinite`` or ``skip_spikes``, whether the update was made.
      cleared: where asked for, zeros in place of the gradients.
      window: with ``skip_spikes``, the last norms with this update's.
      measured: where asked for, its norms.
    """

    leaves: UpdateResult
    apply: jax.Array | None
    cleared: list[jax.Array] | None
    window: jax.Array | None
    measured: norms.Measured | None


Kind = TypeVar("Kind", bool, tuple[int, bool])


def groups_of(leaves: Sequence[Kind]) -> tuple[tuple[int, ...], tuple[Kind, ...]]:
    """For each leaf its row of ``hyper``, from of what kind it is; and for each row its kind."""
    kinds = tuple(sorted(set(leaves), reverse=True))
    rows = {kind: row for row, kind in enumerate(kinds)}
    return tuple(rows[kind] for kind in leaves), kinds


def hyper_dtype(dtypes: Sequence[Any]) -> np.dtype[Any]:
    """The dtype of the numbers of a step on params of these dtypes."""
    return np.dtype(np.float64 if any(dtype == np.float64 for dtype in dtypes) else np.float32)


def _read_by_all(array: jax.Array) -> jax.Array:
    """Its first element: as XLA:GPU sees all leaves read an array, it merges them (gpu.py)."""
    return jax.lax.optimization_barrier(array)[0]  # type: ignore[no-untyped-call]


def scaled_like(
    totals: Sequence[jax.Array], grads: Sequence[jax.Array], scale: Scalar, dtype: np.dtype[Any]
) -> list[jax.Array]:
    """``scale`` times the gradients, in the dtypes of ``totals``, to be added to them."""
    factor = _read_by_all(jnp.stack([jnp.asarray(x, dtype) for x in (scale, 0)]))
    return [(g.astype(dtype) * factor).astype(a.dtype) for a, g in zip(totals, grads, strict=True)]


def cleared(totals: Sequence[jax.Array], squares: jax.Array | None) -> list[jax.Array]:
    """Zeros in place of ``totals``, once the sums of their squares are taken.

    XLA would make one array of zeros for each shape, and copy it to every place. What a flag
    chooses, of which XLA cannot know that it is false, is written in place. The flag hangs on
    the sums, or XLA:GPU would clear in the kernels that make them, in copies, since the update
    is yet to read what they clear.
    """
    if squares is None:
        flags = jnp.array([False, True])
    else:
        below = np.array([-1, -np.inf], squares.dtype)  # no sum is, nor is NaN
        flags = jnp.ravel(squares)[0] < below
    keep = _read_by_all(flags)
    return [jax.lax.select(keep, a, jnp.zeros_like(a)) for a in totals]


def update_leaves(
    config: AdamW,
    old: Mapping[str, Sequence[jax.Array]],
    grads: Sequence[jax.Array],
    scale: Scalar,
    *,
    count: jax.Array,
    window: jax.Array | None = None,
    rows: Sequence[Row],
    groups: Sequence[int],
    dtype: np.dtype[Any],
    backend: Backend,
    delta: bool = False,
    clear: bool = False,
    asked: Sums | None = None,
) -> Updated:
    """Updates the leaves with ``scale`` times ``grads``.

    Args:
      config: the hyperparameters, but for what rows have of their own.
      old: params, and all state that mirrors them: kind -> leaves.
      grads: one per param.
      scale: the factor on every gradient, before clipping.
      count: int32 scalar, updates done before this one.
      window: with ``skip_spikes``, the norms of the last updates' gradients.
      rows: those of ``hyper``.
      groups: for each leaf its row.
      dtype: ``hyper_dtype`` of the params.
      backend: what does the work.
      delta: return the params' changes instead of new params.
      clear: return zeros in place of the gradients too.
      asked: return norms too, of the tree or also of its leaves.
    """
    if config.maximize:
        scale = -scale
    clip = clipping.scales(config, grads, scale, dtype, backend.sum_of_squares)
    squares = clip.squares
    apply = None
    if config.skip_nonfinite:
        assert squares is not None
        apply = clipping.is_good(config, squares)
    if config.skip_spikes is not None:
        assert squares is not None
        assert window is not None
        passes, entered = spikes.judged(config.skip_spikes, window, norms.of_all(squares))
        window = entered if apply is None else jnp.where(apply, entered, window)
        apply = passes if apply is None else passes & apply
    hyper = hyper_rows(
        config,
        count,
        rows=rows,
        grad_scale=clip.tree,
        apply=1.0 if apply is None else apply,
        dtype=dtype,
    )
    # A caller may have state that this update leaves as it is: Keras' average, say.
    used = used_fields(config)
    new = backend.update(
        hyper,
        old["params"],
        grads,
        leaf_scale=clip.per_leaf,
        **{kind: old[kind] for kind in STATE_KINDS if kind in used},
        groups=groups,
        ema_overwrite=config.ema_overwrite_frequency is not None,
        clip_value=config.clipvalue is not None,
        skip=apply is not None,
        epsilon_root=config.epsilon_root is not None,
        nesterov=config.nesterov,
        stochastic=config.params_rounding == "stochastic",
        cautious=config.cautious_decay,
        delta=delta,
        sums=asked and norms.sums_needed(asked, backend.axes),
        grad_sums=asked == "leaves" or (asked == "tree" and squares is None),
    )
    zeros = cleared(grads, squares and squares.sum) if clear else None
    if asked is None:
        return Updated(new, apply, zeros, window, None)
    assert new.sums is not None
    found = norms.measured(new.sums, asked, backend.axes, clip, scale, apply)
    return Updated(new._replace(sums=None), apply, zeros, window, found)
