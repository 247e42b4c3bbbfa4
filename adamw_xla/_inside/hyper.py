"""Schedules, bias corrections and clip scales -> the ``hyper`` operand.

What Python knows, it computes in float64 and rounds once; what is traced is computed
in the dtype of ``hyper``. The scalars that every step has are written in ``jax.lax``:
each ``jax.numpy`` call and operator is a nested ``jit``, and a dozen of them take longer
to trace than a hundred leaves.
"""

from collections.abc import Callable, Mapping, Sequence
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
from adamw_xla._inside import decay, explicit
from adamw_xla._inside.decay import Beta, Decay, of_complement
from adamw_xla._rules.groups import Group, ScalarOrSchedule
from adamw_xla_lowering import NUM_SLOTS, Slot
from adamw_xla_lowering.formats.noise import complement_in_words, step_factor

Scalar: TypeAlias = float | jax.Array


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


def rates_of(
    config: AdamW,
    step: jax.Array,
    dtype: DTypeLike,
    overrides: Mapping[str, ScalarOrSchedule | None],
) -> Callable[[str], Scalar]:
    """A config's ``learning_rate`` and ``weight_decay`` at a step, by name; schedules run once.

    Args:
      config: the hyperparameters.
      step: int32 scalar, what schedules see.
      dtype: that of ``hyper``.
      overrides: what takes the place of the config's, where it is not None.
    """

    @functools.cache
    def rate(name: str) -> Scalar:
        value = overrides[name]
        return evaluate(name, getattr(config, name) if value is None else value, step, dtype)

    return rate


def rows_of(
    config: AdamW,
    kinds: Sequence[tuple[int, bool]],
    step: jax.Array,
    dtype: DTypeLike,
    of_config: Callable[[str], Scalar],
) -> tuple[Row, ...]:
    """The rows of one step.

    Args:
      config: the hyperparameters.
      kinds: for each row the entry of ``config.groups``, or their number for none, and whether
        it decays.
      step: int32 scalar, what schedules see.
      dtype: that of ``hyper``.
      of_config: the config's rates, from ``rates_of``.
    """

    def rate(group: Group | None, name: str) -> Scalar:
        if group is None or (value := getattr(group, name)) is None:
            return of_config(name)
        return evaluate(group.called(name), value, step, dtype)

    @functools.cache
    def of_group(member: int) -> tuple[Group | None, Scalar, Scalar]:
        group = config.groups[member] if member < len(config.groups) else None
        learning_rate, decay = rate(group, "learning_rate"), rate(group, "weight_decay")
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
    counts = {"beta_1": t, "beta_2": t}
    if len(rows) > 1:
        # Of what more than 15 places read, XLA:CPU makes a kernel: each of the two has a half.
        again: jax.Array = lax.optimization_barrier(update)  # type: ignore[no-untyped-call]
        counts["beta_2"] = lax.convert_element_type(again, dtype)
    betas: dict[tuple[int, str], Beta] = {}
    own: dict[int, dict[Slot, Scalar]] = {}  # rows that differ in decay alone have one for all

    def beta(group: Group | None, name: str) -> Beta:
        holder = _holder(config, group, name)
        key = id(holder), name
        if key not in betas:
            found = decay_of(holder, name, dtype)
            if name == "beta_2" and config.state_format == "word16":
                found = of_complement(complement_in_words(found.complement))
            betas[key] = Beta(found, counts[name])
        return betas[key]

    for row in rows:
        if id(row.group) not in own:
            own[id(row.group)] = _own_slots(
                config, row, beta(row.group, "beta_1"), beta(row.group, "beta_2"), dtype
            )
    shared: dict[Slot, Scalar] = {
        Slot.GRAD_SCALE: grad_scale,
        Slot.APPLY: apply,
        **({Slot.SALT: t} if is_salted(config) else {}),
        **_clip_slots(config, dtype),
        **ema_slots(config, update, dtype),
    }
    found = []
    for row in rows:
        times = row.learning_rate if config.decay_times_lr else 1.0
        decay = {Slot.DECAY_RATE: times * row.decay}
        found.append({**shared, **own[id(row.group)], **decay})
    return _pack(found, dtype)


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


def _holder(config: AdamW, group: Group | None, name: str) -> AdamW | Group:
    """Whose number of this name counts."""
    return config if group is None or getattr(group, name) is None else group


def _own_slots(
    config: AdamW, row: Row, beta_1: Beta, beta_2: Beta, dtype: DTypeLike
) -> dict[Slot, Scalar]:
    """What follows from the betas, the epsilon and the rate of a row."""
    epsilon = _holder(config, row.group, "epsilon").epsilon
    return {
        Slot.BETA_1: beta_1.value,
        Slot.ONE_MINUS_BETA_1: beta_1.complement,
        Slot.BETA_2: beta_2.value,
        Slot.ONE_MINUS_BETA_2: beta_2.complement,
        Slot.EPSILON: _at_least(_LEAST[config.state_format], epsilon, dtype),
        **_step_slots(config, _array(row.learning_rate, dtype), beta_1, beta_2, dtype),
    }


def _step_slots(
    config: AdamW, learning_rate: Any, beta_1: Beta, beta_2: Beta, dtype: DTypeLike
) -> dict[Slot, Scalar]:
    """How far to go along ``m`` (and the gradient), and what to divide by."""
    root_2 = beta_2.root
    # Both signs are turned, so that a constant rate costs no operation.
    is_known = isinstance(learning_rate, np.ndarray)
    minus_rate = np.negative(learning_rate) if is_known else lax.neg(learning_rate)
    slots: dict[Slot, Any] = {Slot.STEP_SIZE: lax.div(minus_rate, beta_1.minus_bias)}
    if config.nesterov:
        complement, value = (_array(x, dtype) for x in (beta_1.complement, beta_1.value))
        slots[Slot.GRAD_STEP_SIZE] = lax.mul(slots[Slot.STEP_SIZE], complement)
        slots[Slot.STEP_SIZE] = lax.mul(lax.div(minus_rate, beta_1.following), value)
    if config.state_format == "word16":
        factor = step_factor(_array(beta_2.complement, dtype), beta_2.t)
        slots = {slot: lax.mul(size, factor) for slot, size in slots.items()}
    if config.epsilon_hat:
        slots = {slot: lax.mul(size, root_2) for slot, size in slots.items()}
    slots[Slot.V_CORRECTION] = 1.0 if config.epsilon_hat else beta_2.inverse_root
    if config.epsilon_root is not None:
        # v / bias_2 + epsilon_root = (v + epsilon_root * bias_2) / bias_2
        root: Any = _array(as_scalar(config.epsilon_root, dtype), dtype)
        slots[Slot.EPSILON_ROOT] = root if config.epsilon_hat else lax.mul(root, beta_2.bias)
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


def _pack(rows: Sequence[Mapping[Slot, Scalar]], dtype: DTypeLike) -> jax.Array:
    """[rows, NUM_SLOTS]; neighbouring constants make one constant.

    Column by column, so that what rows share is one value to XLA: of GPT-2 small in eight groups
    XLA:GPU makes 20 kernels, where rows on top of each other made 25.
    """
    columns = [[row.get(Slot(slot), 0.0) for row in rows] for slot in range(NUM_SLOTS)]
    parts: list[Any] = []
    for is_constant, run in itertools.groupby(columns, _is_constant):
        if is_constant:
            parts.append(np.array(list(run), dtype).T)
        else:
            parts.extend(_column(values, dtype) for values in run)
    return lax.concatenate(explicit.on_one_mesh(parts), 1)


def _is_constant(values: Sequence[Scalar]) -> bool:
    return all(isinstance(x, float | int) for x in values)


def _column(values: Sequence[Scalar], dtype: DTypeLike) -> jax.Array:
    """[rows, 1] of a value for each row."""
    if len(values) == 1:
        return lax.reshape(_array(values[0], dtype), (1, 1))
    # What all have is not broadcast: of a root that is, XLA:CPU makes a kernel.
    column = [lax.reshape(_array(x, dtype), (1, 1)) for x in values]
    return lax.concatenate(explicit.on_one_mesh(column), 0)


def _array(value: Scalar, dtype: DTypeLike) -> jax.Array | np.ndarray[Any, Any]:
    if isinstance(value, float | int):
        return np.asarray(value, dtype)
    return lax.convert_element_type(value, dtype)


def _times(a: Scalar, b: Scalar, dtype: DTypeLike) -> Scalar:
    """A product, a Python float where both are."""
    if isinstance(a, float) and isinstance(b, float):
        return a * b
    return lax.mul(jnp.asarray(a, dtype), jnp.asarray(b, dtype))
