"""Schedules, bias corrections and clip scales -> the ``hyper`` operand.

What Python knows, it computes in float64 and rounds once; what is traced is computed
in the dtype of ``hyper``. The scalars that every step has are written in ``jax.lax``:
each ``jax.numpy`` call and operator is a nested ``jit``, and a dozen of them take longer
to trace than a hundred leaves.
"""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from adamw_xla._check import options
from adamw_xla._config import AdamW, ScalarOrSchedule, known_decay
from adamw_xla._inside import decay, explicit
from adamw_xla._inside.decay import Decay
from adamw_xla_lowering import NUM_SLOTS, Slot
from adamw_xla_lowering.formats.noise import step_factor

Scalar: TypeAlias = float | jax.Array


def as_scalar(value: Any, dtype: DTypeLike) -> Scalar:
    """A Python float where the value is known now, else an array of ``dtype``."""
    if isinstance(value, bool | int | float | np.generic | np.ndarray):
        return float(value)
    return jnp.asarray(value, dtype).reshape(())


def decay_of(config: AdamW, name: str, dtype: DTypeLike) -> Decay:
    """The config's decay of this name: of Python floats where it is known, else of ``dtype``."""
    value = as_scalar(getattr(config, name), dtype)
    if isinstance(value, float):
        return decay.of(value)
    return decay.rounded(getattr(config, name), known_decay(config, name), dtype)


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


def hyper_rows(
    config: AdamW,
    count: jax.Array,
    *,
    learning_rate: Scalar,
    decay: Sequence[Scalar],
    grad_scale: Scalar,
    apply: Scalar,
    dtype: DTypeLike,
) -> jax.Array:
    """The ``hyper`` operand of one update.

    Args:
      config: the hyperparameters.
      count: int32 scalar, updates done before this one.
      learning_rate: this step's.
      decay: this step's weight decay for each group.
      grad_scale: the factor on every gradient.
      apply: 0 where this step is to be skipped.
      dtype: float32 or float64, that of the result.

    Returns:
      [groups, NUM_SLOTS] of ``dtype``.
    """
    # From count + 1, which is also the new count: reading the old one in two places would
    # cost a copy of it where it is donated.
    update = increment(count)
    t = lax.convert_element_type(update, dtype)
    beta_1, beta_2 = decay_of(config, "beta_1", dtype), decay_of(config, "beta_2", dtype)
    slots: dict[Slot, Scalar] = {
        Slot.GRAD_SCALE: grad_scale,
        Slot.BETA_1: beta_1.value,
        Slot.ONE_MINUS_BETA_1: beta_1.complement,
        Slot.BETA_2: beta_2.value,
        Slot.ONE_MINUS_BETA_2: beta_2.complement,
        Slot.EPSILON: _at_least(_LEAST[config.state_format], config.epsilon, dtype),
        Slot.APPLY: apply,
        **({Slot.SALT: t} if is_salted(config) else {}),
        **_step_slots(config, _array(learning_rate, dtype), t, beta_1, beta_2),
        **_clip_slots(config, dtype),
        **ema_slots(config, update, dtype),
    }
    times = learning_rate if config.decay_times_lr else 1.0
    rows = [_pack({**slots, Slot.DECAY_RATE: times * rate}, dtype) for rate in decay]
    return lax.concatenate(rows, 0) if len(rows) > 1 else rows[0]


def is_salted(config: AdamW) -> bool:
    """Whether something is rounded at random, anew at each update."""
    return config.state_format == "word16" or config.params_rounding == "stochastic"


_LEAST = {"moments": float(np.finfo(np.float32).tiny), "word16": 1e-14}
"""The least epsilon. With 0, an element that never had a gradient would be 0/0, also in float64,
where some leaves may be float32. In words a v below 2^-100 may be 0 while m is not."""


def _at_least(least: float, value: Any, dtype: DTypeLike) -> Scalar:
    epsilon = as_scalar(value, dtype)
    if isinstance(epsilon, float):
        return max(epsilon, least)
    return lax.max(epsilon, np.asarray(least, dtype))


def _power_minus_one(beta: Decay, t: jax.Array) -> jax.Array:
    """``beta**t - 1`` without cancellation."""
    return lax.expm1(lax.mul(t, _array(beta.log, t.dtype)))


def _step_slots(
    config: AdamW, learning_rate: Any, t: jax.Array, beta_1: Decay, beta_2: Decay
) -> dict[Slot, Scalar]:
    """How far to go along ``m`` (and the gradient), and what to divide by."""
    dtype = t.dtype
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
        following = _power_minus_one(beta_1, lax.add(t, np.ones((), dtype)))
        slots[Slot.STEP_SIZE] = lax.mul(lax.div(minus_rate, following), _array(beta_1.value, dtype))
    if config.state_format == "word16":
        factor = step_factor(_array(beta_2.complement, dtype), t)
        slots = {slot: lax.mul(size, factor) for slot, size in slots.items()}
    if config.epsilon_hat:
        slots = {slot: lax.mul(size, root_2) for slot, size in slots.items()}
    slots[Slot.V_CORRECTION] = 1.0 if config.epsilon_hat else lax.div(np.ones((), dtype), root_2)
    if config.epsilon_root is not None:
        # v / bias_2 + epsilon_root = (v + epsilon_root * bias_2) / bias_2
        root: Any = _array(as_scalar(config.epsilon_root, dtype), dtype)
        slots[Slot.EPSILON_ROOT] = root if config.epsilon_hat else lax.mul(root, bias_2)
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


def _pack(slots: Mapping[Slot, Scalar], dtype: DTypeLike) -> jax.Array:
    """One row, [1, NUM_SLOTS]; neighbouring constants make one constant."""
    values = [slots.get(Slot(slot), 0.0) for slot in range(NUM_SLOTS)]
    parts: list[Any] = []
    for is_constant, run in itertools.groupby(values, lambda x: isinstance(x, float | int)):
        if is_constant:
            parts.append(np.array([list(run)], dtype))
        else:
            parts.extend(lax.reshape(_array(x, dtype), (1, 1)) for x in run)
    return lax.concatenate(explicit.on_one_mesh(parts), 1)


def _array(value: Scalar, dtype: DTypeLike) -> jax.Array | np.ndarray[Any, Any]:
    if isinstance(value, float | int):
        return np.asarray(value, dtype)
    return lax.convert_element_type(value, dtype)
