"""Schedules, bias corrections and clip scales -> the ``hyper`` operand.

What Python knows, it computes in float64 and rounds once; what is traced is computed
in the dtype of ``hyper``.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, TypeAlias

from adamw_xla_lowering import NUM_SLOTS, Slot
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
import numpy as np

from adamw_xla._config import AdamW, ScalarOrSchedule

Scalar: TypeAlias = float | jax.Array


def as_scalar(value: Any, dtype: DTypeLike) -> Scalar:
    """A Python float where the value is known now, else an array of ``dtype``."""
    if isinstance(value, bool | int | float | np.generic | np.ndarray):
        return float(value)
    return jnp.asarray(value, dtype).reshape(())


def evaluate(value: ScalarOrSchedule, step: jax.Array, dtype: DTypeLike) -> Scalar:
    """The value, or what a schedule says at this step."""
    return as_scalar(value(step) if callable(value) else value, dtype)


def _one_minus_power(beta: Scalar, t: jax.Array) -> jax.Array:
    """``1 - beta**t`` without cancellation."""
    if isinstance(beta, float):
        log_beta: Scalar = math.log(beta) if beta > 0 else -math.inf
    else:
        log_beta = jnp.log(beta)
    return -jnp.expm1(t * log_beta)


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
    t = count.astype(dtype) + 1
    beta_1, beta_2 = as_scalar(config.beta_1, dtype), as_scalar(config.beta_2, dtype)
    bias_1, bias_2 = _one_minus_power(beta_1, t), _one_minus_power(beta_2, t)
    if config.epsilon_hat:
        step_size = learning_rate * jnp.sqrt(bias_2) / bias_1
        v_correction: Scalar = 1.0
    else:
        step_size = learning_rate / bias_1
        v_correction = 1 / jnp.sqrt(bias_2)
    slots: dict[Slot, Scalar] = {
        Slot.GRAD_SCALE: grad_scale,
        Slot.STEP_SIZE: step_size,
        Slot.V_CORRECTION: v_correction,
        Slot.BETA_1: beta_1,
        Slot.ONE_MINUS_BETA_1: 1 - beta_1,
        Slot.BETA_2: beta_2,
        Slot.ONE_MINUS_BETA_2: 1 - beta_2,
        Slot.EPSILON: as_scalar(config.epsilon, dtype),
        Slot.APPLY: apply,
        **_clip_slots(config, dtype),
        **_ema_slots(config, count, dtype),
    }
    rows = [_pack({**slots, Slot.DECAY_RATE: learning_rate * rate}, dtype) for rate in decay]
    return rows[0][None] if len(rows) == 1 else jnp.stack(rows)


def _clip_slots(config: AdamW, dtype: DTypeLike) -> dict[Slot, Scalar]:
    if config.clipvalue is None:
        return {}
    return {Slot.CLIP_VALUE: as_scalar(config.clipvalue, dtype)}


def _ema_slots(config: AdamW, count: jax.Array, dtype: DTypeLike) -> dict[Slot, Scalar]:
    if not config.use_ema:
        return {}
    momentum = as_scalar(config.ema_momentum, dtype)
    first = count == 0  # the first update sets the average to the params
    slots: dict[Slot, Scalar] = {
        Slot.EMA_MOMENTUM: jnp.where(first, 0, momentum),
        Slot.ONE_MINUS_EMA_MOMENTUM: jnp.where(first, 1, 1 - momentum),
    }
    if (frequency := config.ema_overwrite_frequency) is not None:
        slots[Slot.EMA_OVERWRITE] = (count + 1) % frequency == 0
    return slots


def _pack(slots: Mapping[Slot, ArrayLike], dtype: DTypeLike) -> jax.Array:
    """One row; neighbouring constants make one constant."""
    parts: list[Any] = []
    constants: list[float] = []

    def flush() -> None:
        if constants:
            parts.append(np.array(constants, dtype))
            constants.clear()

    for slot in range(NUM_SLOTS):
        value = slots.get(Slot(slot), 0.0)
        if isinstance(value, jax.Array):
            flush()
            parts.append(value.astype(dtype).reshape(1))
        else:
            constants.append(float(value))  # type: ignore[arg-type]
    flush()
    return jnp.concatenate(parts)
