"""One step of ``adamw_xla.keras.AdamW``, between Keras' variables and the update.

Nothing here imports Keras: a variable is whatever has a ``value``.
"""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any, TypeAlias

import jax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np

from adamw_xla._config import AdamW, needs_norm
from adamw_xla._info.norms import Measured, nothing
from adamw_xla._inside.across import Across, axes_of_leaves
from adamw_xla._inside.hyper import Row, Scalar, as_scalar, ema_slots
from adamw_xla._inside.update import (
    Backend,
    do_if,
    groups_of,
    hyper_dtype,
    scaled_like,
    update_leaves,
)
from adamw_xla.keras import _check
from adamw_xla.keras._info import Kept, packed
from adamw_xla_lowering import PARAM_DTYPES, Slot, adamw_sum_of_squares

Arrays: TypeAlias = list[jax.Array]
Columns: TypeAlias = dict[str, Arrays]
Variables: TypeAlias = list[Any]


class Step:
    """What one call does to an optimizer's variables.

    They stand in columns: params, m, v, v_max and ema of the variables that have a gradient;
    "idle" are those without, which the average follows all the same, in "idle_ema".

    Args:
      optimizer: the Keras optimizer, built.
      config: its hyperparameters at this moment.
      variables: those of its variables that have a gradient.
      kept: where to keep what the step tells; None: nowhere.
    """

    def __init__(
        self, optimizer: Any, config: AdamW, variables: Variables, kept: Kept | None
    ) -> None:
        self._kept = kept
        self._rates: tuple[Scalar, Scalar] | None = None
        self._optimizer, self._config, self._variables = optimizer, config, variables
        self._columns = {
            "params": variables,
            "m": self._of(optimizer._momentums),
            "v": self._of(optimizer._velocities),
        }
        if config.amsgrad:
            self._columns["v_max"] = self._of(optimizer._velocity_hats)
        if config.use_ema:
            averages = optimizer._model_variables_moving_average
            live = {id(variable) for variable in variables}
            pairs = zip(optimizer._trainable_variables, averages, strict=True)
            idle = [(v, e) for v, e in pairs if e is not None and id(v) not in live]
            self._columns["ema"] = self._of(averages)
            self._columns["idle"] = [variable for variable, _ in idle]
            self._columns["idle_ema"] = [average for _, average in idle]
        self._backend = Backend()
        self._dtype = hyper_dtype([variable.dtype for variable in variables])
        # Updates done before this call, as an int32 scalar.
        calls, steps = optimizer._iterations.value, config.gradient_accumulation_steps
        self._count = jnp.asarray(calls if steps is None else calls // steps, np.int32)

    def run(self, grads: Arrays) -> Iterable[tuple[Any, jax.Array]]:
        """Makes the step: pairs of a variable and its new value."""
        values = {kind: [x.value for x in column] for kind, column in self._columns.items()}
        option = needs_norm(self._config) or ("keep_info" if self._kept else None)
        self._backend = _backend(self._config, option, values["params"], grads)
        if self._kept is None:
            return _pairs(*self._run(values, grads))
        # Here, since what a callable returns in the loop of an update stays there.
        self._rates = self._current_rates()
        columns, values = self._run(values, grads)
        row = packed(Measured(*values["measured"]), self._rates)
        return [*_pairs(columns, values), (self._kept.variable, row)]

    def _run(self, values: Columns, grads: Arrays) -> tuple[dict[str, Variables], Columns]:
        """Columns of variables, and their new values."""
        steps, columns = self._config.gradient_accumulation_steps, self._columns
        if steps is None:
            return columns, self._updated(self._config, values, grads, 1.0)
        sums = self._of(self._optimizer._accumulated_gradients)
        old = [x.value for x in sums]
        scaled = scaled_like(old, grads, 1.0, self._dtype)
        values["sums"] = [a + g for a, g in zip(old, scaled, strict=True)]
        if self._kept is not None:
            values["measured"] = _scalars(nothing(self._dtype, (), "tree"))
        last = (self._optimizer._iterations.value + 1) % steps == 0
        everywhere = self._config.use_ema and self._optimizer.ema_at_every_call
        values = do_if(last, self._with_sums_alone if everywhere else self._with_sums, values)
        if everywhere:
            values |= self._averaged(values, "params", "ema")
            values |= self._averaged(values, "idle", "idle_ema")
        return columns | {"sums": sums}, values

    def _current_rates(self) -> tuple[Scalar, Scalar]:
        learning_rate = as_scalar(_value(self._optimizer.learning_rate), self._dtype)
        return learning_rate, as_scalar(_value(self._config.weight_decay), self._dtype)

    def _of(self, state: Sequence[Any]) -> Variables:
        return [state[self._optimizer._get_variable_index(v)] for v in self._variables]

    def _with_sums(self, values: Columns) -> Columns:
        return self._with(self._config, values)

    def _with_sums_alone(self, values: Columns) -> Columns:
        """The same without the average."""
        config = dataclasses.replace(self._config, use_ema=False, ema_overwrite_frequency=None)
        return values | self._with(config, values)

    def _with(self, config: AdamW, values: Columns) -> Columns:
        steps, sums = config.gradient_accumulation_steps, values["sums"]
        assert steps is not None
        return self._updated(config, values, sums, 1 / steps, clear=True)

    def _updated(
        self, config: AdamW, old: Columns, grads: Arrays, scale: float, clear: bool = False
    ) -> Columns:
        """The columns after a real update with ``scale`` times ``grads``.

        With ``clear``, the gradients are the sums, and zero afterwards.
        """
        optimizer, dtype = self._optimizer, self._dtype
        groups, kinds = groups_of([optimizer._use_weight_decay(v) for v in self._variables])
        learning_rate, weight_decay = self._rates or self._current_rates()
        made = update_leaves(
            config,
            old,
            grads,
            scale,
            count=self._count,
            rows=[Row(learning_rate, weight_decay if k else 0.0) for k in kinds],
            groups=groups,
            dtype=dtype,
            backend=self._backend,
            clear=clear,
            asked=None if self._kept is None else "tree",
        )
        measured = made.measured and _scalars(made.measured)
        found = {**made.leaves._asdict(), "sums": made.cleared, "measured": measured}
        columns = {kind: x for kind, x in found.items() if x is not None}
        return columns | (self._averaged(old, "idle", "idle_ema") if config.use_ema else {})

    def _averaged(self, values: Columns, variables: str, averages: str) -> Columns:
        """The averages moved to their variables, and these overwritten where it is time."""
        slots = ema_slots(self._config, self._count + 1, self._dtype)
        momentum, rest = slots[Slot.EMA_MOMENTUM], slots[Slot.ONE_MINUS_EMA_MOMENTUM]
        overwrite = jnp.asarray(slots.get(Slot.EMA_OVERWRITE, 0.0)) != 0
        old = zip(values[variables], values[averages], strict=True)
        moved = [(p, e, momentum * e + rest * p) for p, e in old]
        return {
            variables: [jnp.where(overwrite, x, p).astype(p.dtype) for p, _, x in moved],
            averages: [x.astype(e.dtype) for _, e, x in moved],
        }


def _backend(config: AdamW, option: str | None, params: Arrays, grads: Arrays) -> Backend:
    """What does the work: inside of ``shard_map``, with norms over several devices."""
    names = config.axis_names
    if option is not None:
        _check.types_tell(option, names)
    over = axes_of_leaves(names, option, params, params, grads, _check.WORDS)
    if over is None:
        return Backend()
    return Backend(sum_of_squares=Across(adamw_sum_of_squares, over), axes=over)


def _scalars(measured: Measured) -> Arrays:
    return [x for x in measured if x is not None]


def dense(grad: Any, variable: Any) -> jax.Array:
    """A gradient as an array of the variable's shape, of a dtype that the update takes."""
    if isinstance(grad, sparse.JAXSparse):
        grad = grad.todense()
    grad = jnp.asarray(grad)
    _check.gradient(variable, grad)
    return grad if grad.dtype in PARAM_DTYPES else grad.astype(variable.dtype)


def _pairs(columns: dict[str, Variables], values: Columns) -> Iterable[tuple[Any, jax.Array]]:
    for kind, variables in columns.items():
        yield from zip(variables, values[kind], strict=True)


def _value(x: Any) -> Any:
    return getattr(x, "value", x)
