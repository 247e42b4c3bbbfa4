"""The same AdamW in plain ``jax.numpy``: differentiable, readable, slow.

Use it where a step itself is differentiated (meta-learning, hyperparameter gradients),
and to read what the kernels compute. ``adamw_step`` here takes the arguments of
``adamw_xla.adamw_step``; ``adamw_update`` those of ``adamw_xla.lowering.adamw_update``.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._check import calls
from adamw_xla._config import AdamW
from adamw_xla._info.step_info import ReturnInfo, StepInfo
from adamw_xla._inside.clipping import root
from adamw_xla._inside.run import run_step
from adamw_xla._inside.update import Backend, as_varying_as_after
from adamw_xla._rules.groups import ScalarOrSchedule
from adamw_xla._state import AdamWState
from adamw_xla._step import ALIASES, LACKING
from adamw_xla_lowering import (
    Slot,
    Squares,
    UpdateResult,
    compute_dtype,
    join_params,
    small_unit,
    unpack,
)
from adamw_xla_lowering.contract import Sums
from adamw_xla_lowering.formats import narrow, word
from adamw_xla_lowering.formats.arrays import OPS

Leaves = Sequence[jax.Array]


class _Rates(TypedDict, total=False):
    """What takes the place of the config's rates for a step, as in ``adamw_xla.adamw_step``."""

    learning_rate: ScalarOrSchedule | None
    weight_decay: ScalarOrSchedule | None


@overload
def adamw_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    config: AdamW,
    *,
    return_info: Literal[False] = False,
    **rates: Unpack[_Rates],
) -> tuple[Any, AdamWState]: ...


@overload
def adamw_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    config: AdamW,
    *,
    return_info: Literal[True, "per_leaf"],
    **rates: Unpack[_Rates],
) -> tuple[Any, AdamWState, StepInfo]: ...


@calls.explained("reference.adamw_step", aliases=ALIASES, lacking=LACKING)
def adamw_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    config: AdamW,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    return_info: ReturnInfo = False,
) -> tuple[Any, ...]:
    """Makes one step of AdamW, differentiable with respect to everything but the counts.

    Arguments and results are those of ``adamw_xla.adamw_step``, but for ``implementation``, and
    so are the TypeErrors and ValueErrors. The derivative of the square root at ``v == 0`` is
    taken as 0: there the true one is infinite.

    Example:
      >>> import adamw_xla as ax, jax, jax.numpy as jnp
      >>> params, grads = jnp.array([1.0]), jnp.array([0.5])
      >>> def after(learning_rate):
      ...     config = ax.AdamW(learning_rate=learning_rate, weight_decay=0.0)
      ...     state = ax.adamw_init(params, config)
      ...     return ax.reference.adamw_step(params, grads, state, config)[0][0]
      >>> print(f"{jax.grad(after)(0.1):.3f}")
      -1.000
    """
    made = run_step(
        params,
        grads,
        state,
        config,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        backend=Backend(adamw_update, sum_of_squares, _do_if),
        return_info=return_info,
    )
    return made[: 2 + bool(return_info)]


def _do_if(condition: jax.Array, body: Callable[[Any], Any], x: Any) -> Any:
    """``body(x)`` where the condition holds, else ``x``; differentiable."""
    return jax.lax.cond(condition, body, lambda x: x, as_varying_as_after(condition, body, x))


def sum_of_squares(scale: jax.Array, leaves: Leaves, *, per_leaf: bool = False) -> Squares:
    """Sums ``(scale * x)**2`` over all leaves or each, in a unit that fits: [] or [leaves]."""

    if not leaves:
        zeros = jnp.zeros((0,) * per_leaf, scale.dtype)
        return Squares(zeros, jnp.ones_like(zeros))

    def summed(unit: float) -> jax.Array:
        scaled = (x.astype(scale.dtype) * scale * unit for x in leaves)
        sums = jnp.stack([jnp.sum(jnp.square(x)) for x in scaled])
        return sums if per_leaf else jnp.sum(sums)

    return Squares.chosen(summed(1.0), summed(small_unit(scale.dtype)))


def adamw_update(
    hyper: jax.Array,
    params: Leaves,
    grads: Leaves,
    m: Leaves | None = None,
    v: Leaves | None = None,
    v_max: Leaves | None = None,
    ema: Leaves | None = None,
    leaf_scale: jax.Array | None = None,
    *,
    words: Leaves | None = None,
    remainder: Leaves | None = None,
    groups: Sequence[int] | None = None,
    ema_overwrite: bool = False,
    clip_value: bool = False,
    skip: bool = False,
    epsilon_root: bool = False,
    nesterov: bool = False,
    cautious: bool = False,
    stochastic: bool = False,
    delta: bool = False,
    sums: Sums | None = None,
    grad_sums: bool = False,
) -> UpdateResult:
    """Updates all leaves; see ``adamw_xla_lowering.contract`` for the equations.

    What is rounded at random has the derivative of what is rounded; words and remainders have none.
    """
    n = len(params)
    nothing = [None] * n
    state = {"m": m, "v": v, "words": words, "v_max": v_max, "ema": ema, "remainder": remainder}
    columns = {"params": params, **state}
    new: dict[str, Any] = {k: [] for k, x in columns.items() if x is not None}
    summed: list[jax.Array] = []
    for i in range(n):
        old = {kind: (column or nothing)[i] for kind, column in columns.items()}
        row = hyper[0 if groups is None else groups[i]]
        dtype = compute_dtype(params[i].dtype)
        x = {k: x.astype(dtype) for k, x in old.items() if x is not None}
        x["grads"] = grads[i].astype(dtype)
        rounding = _Rounding(params[i].dtype, stochastic, remainder is not None, row)
        leaf = _update_leaf(
            row.astype(dtype),
            None if leaf_scale is None else leaf_scale[i],
            rounding.read(old, x),
            clip_value=clip_value,
            ema_overwrite=ema_overwrite,
            epsilon_root=epsilon_root,
            nesterov=nesterov,
            cautious=cautious,
        )
        leaf |= rounding.written(old, leaf)
        if delta:
            leaf["params"] = leaf["params"] - params[i].astype(dtype)
            old["params"] = jnp.zeros_like(leaf["params"])
        for kind, column in new.items():
            kept = old[kind]
            assert kept is not None
            after = leaf[kind].astype(kept.dtype)
            column.append(jnp.where(row[Slot.APPLY] != 0, after, kept) if skip else after)
        if sums is not None:
            first = new["params"][-1].astype(dtype)
            added = leaf["added"]
            squared = {
                "params": params[i].astype(dtype) + first if delta else first,
                "updates": jnp.where(row[Slot.APPLY] != 0, added, 0) if skip else added,
            }
            if grad_sums:
                own = grads[i].astype(dtype)
                squared = {"grads": own, "small_grads": own * small_unit(dtype), **squared}
            summed.append(jnp.stack([jnp.sum(jnp.square(x)) for x in squared.values()]))
    if sums is None:
        return UpdateResult(**new)
    empty = jnp.zeros((0, 4 if grad_sums else 2))
    table = (jnp.stack(summed) if summed else empty).astype(hyper.dtype)
    return UpdateResult(**new, sums=table if sums == "leaves" else jnp.sum(table, 0))


class _Rounding:
    """What is stored of one leaf otherwise than it is computed with."""

    def __init__(self, dtype: Any, stochastic: bool, is_split: bool, row: jax.Array) -> None:
        is_narrow = dtype == jnp.bfloat16
        self._is_split, self._is_stochastic = is_narrow and is_split, is_narrow and stochastic
        self._salt = row[Slot.SALT].astype(np.float32)
        self._random: Any = None

    def read(self, old: dict[str, Any], x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The operands that are computed with, from those that are stored."""
        if self._is_split:
            joined = join_params(old["params"], old["remainder"])
            x = x | {"params": _standing_for(joined, x["params"])}
        if "words" in x or self._is_stochastic:
            self._random = word.random_bits(OPS, x["grads"], x["params"], self._salt)
        if "words" in x:
            x = x | dict(zip("mv", unpack(old["words"]), strict=True))
        return x

    def written(self, old: dict[str, Any], new: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What is stored, from what was computed."""
        stored, p = {}, new["params"]
        if old["words"] is not None:
            kept = word.encode(OPS, new["m"], new["v"], self._random)
            stored["words"] = jax.lax.stop_gradient(kept)
        if old["remainder"] is not None:
            stored["remainder"] = old["remainder"]
        if self._is_split:
            param, stored["remainder"] = narrow.split(OPS, p)
            stored["params"] = _standing_for(param, p)
        elif self._is_stochastic:
            stored["params"] = _standing_for(narrow.stochastic(OPS, p, self._random), p)
        return stored


@jax.custom_jvp
def _standing_for(value: jax.Array, x: jax.Array) -> jax.Array:
    """``value``, with the derivative of ``x``."""
    del x
    return value


@_standing_for.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[1]


def _update_leaf(
    row: jax.Array,
    scale: jax.Array | None,
    x: dict[str, jax.Array],
    *,
    clip_value: bool,
    ema_overwrite: bool,
    epsilon_root: bool,
    nesterov: bool,
    cautious: bool,
) -> dict[str, jax.Array]:
    g = x["grads"] * row[Slot.GRAD_SCALE]
    if scale is not None:
        g = g * scale.astype(row.dtype)
    if clip_value:
        g = jnp.clip(g, -row[Slot.CLIP_VALUE], row[Slot.CLIP_VALUE])
    m = row[Slot.BETA_1] * x["m"] + row[Slot.ONE_MINUS_BETA_1] * g
    v = row[Slot.BETA_2] * x["v"] + row[Slot.ONE_MINUS_BETA_2] * g * g
    w = jnp.maximum(x["v_max"], v) if "v_max" in x else v
    square = w + row[Slot.EPSILON_ROOT] if epsilon_root else w
    denominator = root(square) * row[Slot.V_CORRECTION] + row[Slot.EPSILON]
    step = row[Slot.STEP_SIZE] * m
    if nesterov:
        step = step + row[Slot.GRAD_STEP_SIZE] * g
    p, step = x["params"], step / denominator
    decay = row[Slot.DECAY_RATE] * p
    if cautious:
        decay = jnp.where(p * step < 0, 0, decay)
    added = -(decay + step)
    old, p = p, p + added
    new = {"params": p, "m": m, "v": v, "v_max": w, "added": added}
    if "ema" in x:
        momentum, rest = row[Slot.EMA_MOMENTUM], row[Slot.ONE_MINUS_EMA_MOMENTUM]
        new["ema"] = momentum * x["ema"] + rest * p
        if ema_overwrite:
            overwrite = row[Slot.EMA_OVERWRITE] != 0
            new["params"] = jnp.where(overwrite, new["ema"], p)
            new["added"] = jnp.where(overwrite, new["ema"] - old, added)
    return new
