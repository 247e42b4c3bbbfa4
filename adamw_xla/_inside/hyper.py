"""Schedules, bias corrections and clip scales -> the ``hyper`` operand.

What Python knows, it computes in float64 and rounds once; what is traced is computed
in the dtype of ``hyper``. The scalars that every step has are written in ``jax.lax``:
each ``jax.numpy`` call and operator is a nested ``jit``, and a dozen of them take longer
to trace than a hundred leaves.
"""

from collections.abc import Mapping, Sequence
import functools
import itertools
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from adamw_xla._check import options
from adamw_xla._config import AdamW
from adamw_xla._groups import Group, ScalarOrSchedule
from adamw_xla._inside import decay, explicit
from adamw_xla._inside.decay import Decay
from adamw_xla_lowering import NUM_SLOTS, Slot
from adamw_xla_lowering.formats.noise import step_factor

Scalar: TypeAlias = float | jax.Array
Column: TypeAlias = Scalar | np.ndarray[Any, Any]
"""A scalar that all rows of ``hyper`` have, or an array of [rows]."""


def as_scalar(value: Any, dtype: DTypeLike) -> Scalar:
    """A Python float where the value is known now, else an array of ``dtype``."""
    if isinstance(value, bool | int | float | np.generic | np.ndarray):
        return float(value)
    return jnp.asarray(value, dtype).reshape(())


def decay_of(holder: AdamW | Group, name: str, dtype: DTypeLike) -> Decay:
    """The holder's decay of this name: of Python floats where it is known, else of ``dtype``."""
    value = as_scalar(getattr(holder, name), dtype)
    if isinstance(value, float):
        return decay.of(value)
    return decay.rounded(getattr(holder, name), decay.known(holder, name), dtype)


def evaluate(name: str, value: ScalarOrSchedule, step: jax.Array, dtype: DTypeLike) -> Scalar:
    """The rate of this name, or what its schedule says at this step; checked."""
    now: Any = options.called(value, step) if callable(value) else value
    if hasattr(now, "__jax_array__"):  # a variable of Keras, or the like
        now = jnp.asarray(now)
    options.scheduled(name, now)
    return as_scalar(now, dtype)


def increment(count: Any, when: jax.Array | None = None) -> jax.Array:
    """``count + 1``, where ``when`` holds, without overflow."""
    one = np.int32(1)
    following = lax.add(lax.min(count, np.int32(np.iinfo(np.int32).max) - one), one)
    return following if when is None else jnp.where(when, following, count)


class Row(NamedTuple):
    """What differs from row to row of ``hyper``, with rates as they are at this step.

    Attributes:
      learning_rate: with the group's scale in it.
      decay: the weight decay; 0 where the mask says so.
      group: the group that may have numbers of its own; None: the config's are meant.
    """

    learning_rate: Scalar
    decay: Scalar
    group: Group | None = None


def rows_of(
    config: AdamW,
    kinds: Sequence[tuple[int, bool]],
    step: jax.Array,
    dtype: DTypeLike,
    overrides: Mapping[str, ScalarOrSchedule | None],
) -> tuple[Row, ...]:
    """The rows of one step.

    Args:
      config: the hyperparameters.
      kinds: for each row the entry of ``config.groups``, or their number for none, and whether
        it decays.
      step: int32 scalar, what schedules see.
      dtype: that of ``hyper``.
      overrides: of the config's ``learning_rate`` and ``weight_decay`` at this step.
    """

    @functools.cache
    def of_config(name: str) -> Scalar:
        value = overrides[name]
        return evaluate(name, getattr(config, name) if value is None else value, step, dtype)

    def rate(group: Group | None, name: str) -> Scalar:
        if group is None or (value := getattr(group, name)) is None:
            return of_config(name)
        return evaluate(group.called(name), value, step, dtype)

    @functools.cache
    def of_group(member: int) -> tuple[Group | None, Any, Scalar]:
        group = config.groups[member] if member < len(config.groups) else None
        learning_rate: Any = rate(group, "learning_rate")
        decay = rate(group, "weight_decay")
        if group is not None and group.scale is not None:
            learning_rate = _times(learning_rate, as_scalar(group.scale, dtype), dtype)
        return group, learning_rate, decay

    rows = []
    for member, decays in kinds:
        group, learning_rate, decay = of_group(member)
        rows.append(Row(learning_rate, decay if decays else 0.0, group))
    return tuple(rows)


def hyper_rows(
    config: AdamW,
    count: jax.Array,
    *,
    rows: Sequence[Row],
    grad_scale: Scalar,
    apply: Scalar,
    dtype: DTypeLike,
) -> jax.Array:
    """The ``hyper`` operand of one update.

    Args:
      config: the hyperparameters.
      count: int32 scalar, updates done before this one.
      rows: what differs from row to row.
      grad_scale: the factor on every gradient.
      apply: 0 where this step is to be skipped.
      dtype: float32 or float64, that of the result.

    Returns:
      [rows, NUM_SLOTS] of ``dtype``.
    """
    # From count + 1, which is also the new count: reading the old one in two places would
    # cost a copy of it where it is donated.
    update = increment(count)
    t = lax.convert_element_type(update, dtype)
    groups = _numbers(config, rows, dtype)
    if len(groups) == 1:  # rows differ in decay alone
        (own,), parts = groups.values(), [[row] for row in rows]
    else:  # one operation for all rows: one for each would be kernels more on some devices
        parts = [[*rows]]
        each = [groups[id(row.group)] for row in rows]
        own = jax.tree.map(lambda *values: _column(values, dtype), *each)
    along = t if len(groups) == 1 else lax.broadcast(t, (len(rows),))
    slots: dict[Slot, Column] = {
        Slot.GRAD_SCALE: grad_scale,
        Slot.BETA_1: own.beta_1.value,
        Slot.ONE_MINUS_BETA_1: own.beta_1.complement,
        Slot.BETA_2: own.beta_2.value,
        Slot.ONE_MINUS_BETA_2: own.beta_2.complement,
        Slot.EPSILON: _at_least(_LEAST[config.state_format], own.epsilon, dtype),
        Slot.APPLY: apply,
        **({Slot.SALT: t} if is_salted(config) else {}),
        **_step_slots(config, own, along),
        **_clip_slots(config, dtype),
        **ema_slots(config, update, dtype),
    }
    packed = []
    for part in parts:
        decay = _column([row.decay for row in part], dtype)
        times = own.learning_rate if config.decay_times_lr else 1.0
        decays = {Slot.DECAY_RATE: _times(times, decay, dtype)}
        packed.append(_pack({**slots, **decays}, dtype, len(part)))
    return lax.concatenate(packed, 0) if len(packed) > 1 else packed[0]


class _Numbers(NamedTuple):
    """What follows from a group: scalars, or columns of one for each row."""

    learning_rate: Column
    beta_1: Decay
    beta_2: Decay
    epsilon: Column


def _numbers(config: AdamW, rows: Sequence[Row], dtype: DTypeLike) -> dict[int, _Numbers]:
    """The numbers of each group that rows are of, by its identity."""

    @functools.cache
    def beta(owner: int, name: str) -> Decay:
        return decay_of(holders[owner], name, dtype)

    holders: dict[int, AdamW | Group] = {id(config): config}
    found: dict[int, _Numbers] = {}
    for row in rows:
        group = row.group
        if id(group) in found:
            continue
        owners = {name: id(config) for name in ("beta_1", "beta_2", "epsilon")}
        if group is not None:
            holders[id(group)] = group
            owners |= {name: id(group) for name in owners if getattr(group, name) is not None}
        found[id(group)] = _Numbers(
            row.learning_rate,
            beta(owners["beta_1"], "beta_1"),
            beta(owners["beta_2"], "beta_2"),
            as_scalar(holders[owners["epsilon"]].epsilon, dtype),
        )
    return found


def _column(values: Sequence[Scalar], dtype: DTypeLike) -> Column:
    """One value as it is; several as an array of [rows], in NumPy where all are known."""
    if len(values) == 1:
        return values[0]
    if all(isinstance(x, float) for x in values):
        return np.asarray(values)
    parts = [jnp.asarray(x, dtype).reshape(1) for x in values]
    return lax.concatenate(explicit.on_one_mesh(parts), 0)


def is_salted(config: AdamW) -> bool:
    """Whether something is rounded at random, anew at each update."""
    return config.state_format == "word16" or config.params_rounding == "stochastic"


_LEAST = {"moments": float(np.finfo(np.float32).tiny), "word16": 1e-14}
"""The least epsilon. With 0, an element that never had a gradient would be 0/0, also in float64,
where some leaves may be float32. In words a v below 2^-100 may be 0 while m is not."""


def _at_least(least: float, epsilon: Column, dtype: DTypeLike) -> Column:
    if isinstance(epsilon, float):
        return max(epsilon, least)
    if isinstance(epsilon, np.ndarray):
        return np.maximum(epsilon, least)
    return lax.max(epsilon, np.full(epsilon.shape, least, dtype))


def _power_minus_one(beta: Decay, t: jax.Array) -> jax.Array:
    """``beta**t - 1`` without cancellation."""
    return lax.expm1(lax.mul(t, _array(beta.log, t.dtype)))


def _step_slots(config: AdamW, own: _Numbers, t: jax.Array) -> dict[Slot, Column]:
    """How far to go along ``m`` (and the gradient), and what to divide by."""
    dtype, (rate, beta_1, beta_2, _) = t.dtype, own
    learning_rate, one = _array(rate, dtype), np.ones(t.shape, dtype)
    bias_2 = lax.neg(_power_minus_one(beta_2, t))
    root_2 = lax.sqrt(bias_2)
    # Both signs are turned, so that a constant rate costs no operation.
    is_known = isinstance(learning_rate, np.ndarray)
    minus_rate = np.negative(learning_rate) if is_known else lax.neg(learning_rate)
    slots: dict[Slot, Any] = {Slot.STEP_SIZE: lax.div(minus_rate, _power_minus_one(beta_1, t))}
    if config.nesterov:
        slots[Slot.GRAD_STEP_SIZE] = lax.mul(
            slots[Slot.STEP_SIZE], _array(beta_1.complement, dtype)
        )
        following = _power_minus_one(beta_1, lax.add(t, one))
        slots[Slot.STEP_SIZE] = lax.mul(lax.div(minus_rate, following), _array(beta_1.value, dtype))
    if config.state_format == "word16":
        factor = step_factor(_array(beta_2.complement, dtype), t)
        slots = {slot: lax.mul(size, factor) for slot, size in slots.items()}
    if config.epsilon_hat:
        slots = {slot: lax.mul(size, root_2) for slot, size in slots.items()}
    slots[Slot.V_CORRECTION] = 1.0 if config.epsilon_hat else lax.div(one, root_2)
    if config.epsilon_root is not None:
        # v / bias_2 + epsilon_root = (v + epsilon_root * bias_2) / bias_2
        root: Any = _array(as_scalar(config.epsilon_root, dtype), dtype)
        slots[Slot.EPSILON_ROOT] = (
            root if config.epsilon_hat else lax.mul(_broadcast(root, t.shape), bias_2)
        )
    return slots


def _clip_slots(config: AdamW, dtype: DTypeLike) -> dict[Slot, Scalar]:
    if config.clipvalue is None:
        return {}
    return {Slot.CLIP_VALUE: as_scalar(config.clipvalue, dtype)}


def ema_slots(config: AdamW, update: jax.Array, dtype: DTypeLike) -> dict[Slot, Scalar]:
    """What update number ``update``, counted from 1, does to the average."""
    if not config.use_ema:
        return {}
    momentum = decay_of(config, "ema_momentum", dtype)
    first = update == 1  # the first update sets the average to the params
    slots: dict[Slot, Scalar] = {
        Slot.EMA_MOMENTUM: jnp.where(first, 0, momentum.value),
        Slot.ONE_MINUS_EMA_MOMENTUM: jnp.where(first, 1, momentum.complement),
    }
    if (frequency := config.ema_overwrite_frequency) is not None:
        slots[Slot.EMA_OVERWRITE] = update % frequency == 0
    return slots


def _pack(slots: Mapping[Slot, Column], dtype: DTypeLike, rows: int) -> jax.Array:
    """So many rows, [rows, NUM_SLOTS]; neighbouring constants make one constant."""
    values = [slots.get(Slot(slot), 0.0) for slot in range(NUM_SLOTS)]
    parts: list[Any] = []
    for is_constant, run in itertools.groupby(values, _is_known):
        if is_constant:
            columns = [np.broadcast_to(x, rows) for x in run]
            parts.append(np.stack(columns, 1).astype(dtype))
        else:
            cells = (_array(x, dtype) for x in run)
            parts.extend(
                lax.reshape(x, (rows, 1)) if x.size == rows else lax.broadcast(x, (rows, 1))
                for x in cells
            )
    return lax.concatenate(explicit.on_one_mesh(parts), 1)


def _is_known(value: Any) -> bool:
    return isinstance(value, float | int | np.ndarray)


def _array(value: Column, dtype: DTypeLike) -> jax.Array | np.ndarray[Any, Any]:
    if isinstance(value, float | int | np.ndarray):
        return np.asarray(value, dtype)
    return lax.convert_element_type(value, dtype)


def _broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    """A scalar for each row; a column as it is."""
    if x.ndim == len(shape):
        return x
    return np.broadcast_to(x, shape) if isinstance(x, np.ndarray) else lax.broadcast(x, shape)


def _times(a: Column, b: Column, dtype: DTypeLike) -> Column:
    """A product, which is known where both are; each a scalar, or a column of the other's shape."""
    if _is_known(a) and _is_known(b):
        return a * b
    shape = np.broadcast_shapes(np.shape(a), np.shape(b))
    return lax.mul(*(_broadcast(_array(x, dtype), shape) for x in (a, b)))
