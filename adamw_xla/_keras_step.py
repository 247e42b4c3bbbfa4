"""One step of ``adamw_xla.keras.AdamW``, between Keras' variables and the update.

Nothing here imports Keras: a variable is whatever has a ``value``.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax import lax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np

from adamw_xla import _check
from adamw_xla._config import AdamW
from adamw_xla._hyper import as_scalar, ema_slots
from adamw_xla._update import Backend, Rates, groups_of, hyper_dtype, update_leaves
from adamw_xla_lowering import PARAM_DTYPES, Slot

Arrays: TypeAlias = list[jax.Array]
Variables: TypeAlias = list[Any]


class Step:
    """What one call does to the variables that have a gradient, and to their state.

    Args:
      optimizer: the Keras optimizer, built.
      config: its hyperparameters at this moment.
      variables: those of its variables that have a gradient.
    """

    def __init__(self, optimizer: Any, config: AdamW, variables: Variables) -> None:
        self._optimizer, self._config, self._variables = optimizer, config, variables
        self._columns = {
            "params": variables,
            "m": self._of(optimizer._momentums),
            "v": self._of(optimizer._velocities),
        }
        if config.amsgrad:
            self._columns["v_max"] = self._of(optimizer._velocity_hats)
        self._idle: list[tuple[Any, Any]] = []
        if config.use_ema:
            averages = optimizer._model_variables_moving_average
            self._columns["ema"] = self._of(averages)
            live = {id(variable) for variable in variables}
            pairs = zip(optimizer._trainable_variables, averages, strict=True)
            # Variables without a gradient are averaged too, but for those without an average.
            self._idle = [(v, e) for v, e in pairs if e is not None and id(v) not in live]
        self._dtype = hyper_dtype([variable.dtype for variable in variables])
        # Updates done before this call, as an int32 scalar.
        calls, steps = optimizer._iterations.value, config.gradient_accumulation_steps
        self._count = jnp.asarray(calls if steps is None else calls // steps, np.int32)

    def run(self, grads: Arrays) -> list[tuple[Any, jax.Array]]:
        """Makes the step: pairs of a variable and its new value."""
        written = [*_chain(self._columns.values()), *_chain(self._idle)]
        steps = self._config.gradient_accumulation_steps
        if steps is None:
            return list(zip(written, self._updated(grads, 1.0), strict=True))
        sums = self._of(self._optimizer._accumulated_gradients)
        total = [_add(x.value, g) for x, g in zip(sums, grads, strict=True)]
        last = (self._optimizer._iterations.value + 1) % steps == 0
        new = _cond(last, self._real, self._between, total)
        return list(zip([*written, *sums], new, strict=True))

    def _of(self, state: Sequence[Any]) -> Variables:
        return [state[self._optimizer._get_variable_index(v)] for v in self._variables]

    def _updated(self, grads: Arrays, scale: float) -> Arrays:
        """All that an update writes, after a real one with ``scale`` times ``grads``."""
        c, dtype, optimizer = self._config, self._dtype, self._optimizer
        groups, kinds = groups_of([optimizer._use_weight_decay(v) for v in self._variables])
        learning_rate = as_scalar(_value(optimizer.learning_rate), dtype)
        weight_decay = as_scalar(_value(c.weight_decay), dtype)
        new, _ = update_leaves(
            c,
            self._old(),
            grads,
            scale,
            count=self._count,
            rates=Rates(learning_rate, tuple(weight_decay if k else 0.0 for k in kinds)),
            groups=groups,
            dtype=dtype,
            backend=Backend(),
        )
        return [*_chain(column for column in new if column is not None), *self._idle_averaged()]

    def _old(self) -> dict[str, Arrays]:
        return {kind: [x.value for x in column] for kind, column in self._columns.items()}

    def _real(self, total: Arrays) -> Arrays:
        steps = self._config.gradient_accumulation_steps
        assert steps is not None
        return [*self._updated(total, 1 / steps), *map(jnp.zeros_like, total)]

    def _between(self, total: Arrays) -> Arrays:
        old = self._old()
        idle = [x.value for x in _chain(self._idle)]
        if self._config.use_ema and self._optimizer.ema_at_every_call:
            old["params"], old["ema"] = self._averaged(old["params"], old["ema"])
            idle = self._idle_averaged()
        return [*_chain(old.values()), *idle, *total]

    def _idle_averaged(self) -> Arrays:
        if not self._idle:
            return []
        params = [variable.value for variable, _ in self._idle]
        averages = [average.value for _, average in self._idle]
        return _chain(zip(*self._averaged(params, averages), strict=True))

    def _averaged(self, params: Arrays, averages: Arrays) -> tuple[Arrays, Arrays]:
        """The average moved towards params, and params overwritten where it is time."""
        slots = ema_slots(self._config, self._count + 1, self._dtype)
        momentum, rest = slots[Slot.EMA_MOMENTUM], slots[Slot.ONE_MINUS_EMA_MOMENTUM]
        overwrite = jnp.asarray(slots.get(Slot.EMA_OVERWRITE, 0.0)) != 0
        moved = [momentum * e + rest * p for p, e in zip(params, averages, strict=True)]
        new = [jnp.where(overwrite, e, p) for p, e in zip(params, moved, strict=True)]
        return _like(new, params), _like(moved, averages)


def dense(grad: Any, variable: Any) -> jax.Array:
    """A gradient as an array of the variable's shape, of a dtype that the update takes."""
    if isinstance(grad, sparse.JAXSparse):
        grad = grad.todense()
    grad = jnp.asarray(grad)
    _check.keras_gradient(variable, grad)
    return grad if grad.dtype in PARAM_DTYPES else grad.astype(variable.dtype)


def _add(total: jax.Array, grad: jax.Array) -> jax.Array:
    return lax.add(total, lax.convert_element_type(grad, total.dtype))


def _like(new: Arrays, old: Arrays) -> Arrays:
    return [x.astype(y.dtype) for x, y in zip(new, old, strict=True)]


def _value(x: Any) -> Any:
    return getattr(x, "value", x)


def _chain(columns: Any) -> list[Any]:
    return [x for column in columns for x in column]


def _cond(which: jax.Array, yes: Any, no: Any, operand: Any) -> Any:
    """``lax.cond``; eagerly just the branch, which would be compiled anew at each call."""
    if isinstance(which, jax.core.Tracer):
        return lax.cond(which, yes, no, operand)
    return (yes if which else no)(operand)
