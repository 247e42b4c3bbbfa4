"""The class itself."""

from collections.abc import Sequence
import inspect
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import keras

from adamw_xla._check import options
from adamw_xla._config import AdamW as Config
from adamw_xla.keras import _check
from adamw_xla.keras._step import Step, dense
from adamw_xla.keras._told import Telling

_NARROW = ("bfloat16", "float16")


@keras.saving.register_keras_serializable(package="adamw_xla")
class AdamW(Telling):
    r"""``keras.optimizers.AdamW``, seen by the compiler as one operation.

    Arguments, variables, their names and order, checkpoints and semantics are those of the
    stock class; ``adamw_xla.AdamW`` has the equations. A train step has one
    ``adamw_update`` equation in place of some 50 for each variable.

    What differs from the stock class, by design:

    - State of bfloat16 and float16 variables (moments, average, accumulator) is float32, and
      so is the arithmetic: in bfloat16, stock Keras with default betas makes no update at all.
      ``float32_state=False`` stores the state in the variable's dtype.
    - Under gradient accumulation the moving average (and the overwriting of variables with it)
      moves at real updates only. ``ema_at_every_call=True`` moves it at every call, as the
      stock class on JAX does.
    - Under gradient accumulation the calls between two updates only add; the stock class
      makes the update each time and throws it away.
    - Clip norms are float32: in float16, the stock class overflows above 255.
    - After training with ``use_ema``, ``fit`` may be called again; the stock class fails to.
    - Sparse gradients may be clipped and accumulated.
    - ``learning_rate`` may be any real scalar; betas, epsilon, rates and factors are checked.

    Args:
      learning_rate: a real scalar, a ``LearningRateSchedule``, or a callable without
        arguments. Schedules see the count of calls, also under accumulation.
      weight_decay: strength of the decoupled decay, multiplied by the learning rate. See
        ``exclude_from_weight_decay``.
      beta_1: decay of the first moment, in [0, 1).
      beta_2: decay of the second moment, in [0, 1).
      epsilon: the small constant in the denominator ("epsilon hat").
      amsgrad: divide by the running maximum of the second moment.
      clipnorm: clip each variable's gradient to this L2 norm; None or 0 for none.
      clipvalue: clip each gradient element to [-clipvalue, clipvalue]; likewise.
      global_clipnorm: clip the gradient of all variables to this L2 norm; likewise.
      use_ema: keep a moving average of the variables.
      ema_momentum: its momentum, in [0, 1].
      ema_overwrite_frequency: replace the variables by their average every so many updates.
      loss_scale_factor: multiply the loss by this, and divide the gradients by it.
      gradient_accumulation_steps: make an update with the mean gradient of so many calls.
      name: prefix of the names of the optimizer's variables.
      float32_state: False: state of 16-bit variables has their dtype, as in stock Keras (the
        arithmetic stays float32). A 16-bit second moment does not decay.
      ema_at_every_call: True: the average moves at accumulating calls too, as in stock Keras.
      axis_names: where ``stateless_apply`` is called inside of ``jax.shard_map`` (with
        ``check_vma=True``), the mesh axes over which ``clipnorm`` and ``global_clipnorm`` are
        summed: each variable's over those of them that it varies over. ``()``: each device is for
        itself, or holds all variables whole. None: an error where more than one device is to
        have a norm. Elsewhere it has no effect: XLA knows.
      keep_info: keep what each call tells of itself in ``info``, an ``adamw_xla.StepInfo``: norms
        of gradients, new variables and updates, the rates, and whether an update was made. It is
        one more variable, the last, and not in files. The variables' norm is taken before Keras
        applies constraints. ``learning_rate`` is that of this call.

    The last four are in ``get_config()`` only where they differ from their defaults, so that
    otherwise the stock class can be built from it.

    Raises:
      RuntimeError: Keras runs on another backend than JAX.
      TypeError: an argument is of the wrong kind; or a subclass overrides ``update_step`` (or
        one of stock Keras' private methods for a variable, a clip or the average), which
        would never be called.
      ValueError: an argument is out of its range, or two contradict each other.

    Refused, unlike by the stock class, are gradients that would have to be broadcast to their
    variable, a ``keras.Variable`` as beta, ``gradient_accumulation_steps=2.0``, and, when it is
    built, variables that are not of a real floating dtype.

    A ``.keras`` file names its optimizer's class. One of this class opens where
    ``adamw_xla.keras`` was not imported with ``keras.saving.load_model(path,
    custom_objects={"adamw_xla>AdamW": keras.optimizers.AdamW})``; where it was, Keras takes
    the registered class, whatever the custom objects say. One of the stock class always opens
    as that, since Keras looks for its own classes first. To go on with the other class, build
    it from the optimizer's config, and load the state from the same file:

    >>> import keras
    >>> from adamw_xla.keras import AdamW
    >>> def with_ours(path):
    ...     model = keras.saving.load_model(path)
    ...     optimizer = AdamW.from_config(model.optimizer.get_config())
    ...     optimizer.build(model.trainable_variables)
    ...     model.compile(optimizer=optimizer, loss=model.loss)
    ...     model.load_weights(path)
    ...     return model

    Example:
      >>> import keras, numpy as np
      >>> from adamw_xla.keras import AdamW
      >>> model = keras.Sequential([keras.layers.Dense(1)])
      >>> model.compile(optimizer=AdamW(learning_rate=0.1), loss="mse")
      >>> x = np.linspace(-1, 1, 64)[:, None]
      >>> history = model.fit(x, 3 * x + 1, epochs=100, verbose=0)
      >>> history.history["loss"][-1] < 1e-2
      True

      With ``keep_info`` a callback has the norms. It must ask its own ``model``, which fetches the
      optimizer's variables; in ``fit`` they are elsewhere:

      >>> class GradNorm(keras.callbacks.Callback):
      ...     def on_train_batch_end(self, batch, logs=None):
      ...         print(f"{batch}: {self.model.optimizer.info.grad_norm:.1e}")
      >>> model.compile(optimizer=AdamW(keep_info=True), loss="mse")
      >>> history = model.fit(x, 3 * x + 101, batch_size=64, verbose=0, callbacks=[GradNorm()])
      0: 2.0e+02

    ``keras.optimizers.LossScaleOptimizer``, which Keras puts around the optimizer under the policy
    mixed_float16, has it as ``inner_optimizer``, does not call it where it skips a step, and writes
    all its variables to files: with ``info``, so that Keras reads them into one with it alone.
    """

    __module__ = "adamw_xla.keras"  # what saved files name
    _accumulation_steps: int | None = None

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: Any = 0.004,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        float32_state: bool = True,
        ema_at_every_call: bool = False,
        axis_names: Sequence[str] | None = None,
        keep_info: bool = False,
        **kwargs: Any,
    ) -> None:
        _check.backend(keras.config.backend())
        _check.subclass(type(self), AdamW)
        _check.keywords(kwargs, inspect.signature(AdamW).parameters)
        options.scalar_or_schedule("learning_rate", learning_rate)
        super().__init__(
            learning_rate=learning_rate if callable(learning_rate) else float(learning_rate),
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            amsgrad=amsgrad,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        options.flag("float32_state", float32_state)
        options.flag("ema_at_every_call", ema_at_every_call)
        self.float32_state = float32_state
        self.ema_at_every_call = ema_at_every_call
        self.axis_names = _check.names_of_axes(axis_names)
        _check.keep_info(keep_info)
        self._keep_info = keep_info
        self._hyperparameters()

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; see the class for the last four."""
        config: dict[str, Any] = super().get_config()
        if not self.float32_state:
            config["float32_state"] = False
        if self.ema_at_every_call:
            config["ema_at_every_call"] = True
        if self.axis_names is not None:
            config["axis_names"] = list(self.axis_names)
        if self.keep_info:
            config["keep_info"] = True
        return config

    def build(self, var_list: Sequence[Any]) -> None:
        """Creates the state for these variables.

        Raises:
          TypeError: a variable is not of a real floating dtype; names its path.
        """
        for variable in var_list:
            _check.variable(variable)
        super().build(var_list)

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Creates state of the variable's shape and layout; its dtype is float32 or wider."""
        # The accumulator of a variable that its gradient overwrites is no sum.
        overwritten = self._overwrite_variable_with_gradient(reference_variable)
        if self.float32_state and not overwritten and reference_variable.dtype in _NARROW:
            known = {k: getattr(reference_variable, k) for k in ("path", "shape", "_layout")}
            reference_variable = SimpleNamespace(**known, dtype="float32")
        return super().add_variable_from_reference(reference_variable, name, initializer)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """With ``use_ema``, gives the variables the values of their averages."""
        super().finalize_variable_values(var_list)
        if self.use_ema:
            # Stock Keras lets variable and average share an array, which the first step of
            # another ``fit`` then fails to donate twice.
            for average in self._model_variables_moving_average:
                if average is not None:
                    self.assign(average, jnp.array(average.value, copy=True))

    @property
    def gradient_accumulation_steps(self) -> int | None:
        """How many calls' mean gradient an update is made with; None: each call's own.

        Raises:
          ValueError: set to a number with which the sum that was begun, or the next one, would
            be of fewer or more gradients than it is divided by.
        """
        return self._accumulation_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int | None) -> None:
        if getattr(self, "built", False):
            calls = int(self._iterations.value)
            _check.other_steps(self._accumulation_steps or None, steps or None, calls)
        self._accumulation_steps = steps

    # ------------------------------------------------------------------ one step, inside

    def _hyperparameters(self) -> Config:
        """The attributes of this moment, checked; stock Keras reads them at each trace too."""
        return Config(
            weight_decay=0.0 if self.weight_decay is None else self.weight_decay,
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            amsgrad=bool(self.amsgrad),
            clipnorm=self.clipnorm or None,
            clipvalue=self.clipvalue or None,
            global_clipnorm=self.global_clipnorm or None,
            use_ema=bool(self.use_ema),
            ema_momentum=self.ema_momentum,
            ema_overwrite_frequency=self.ema_overwrite_frequency if self.use_ema else None,
            loss_scale_factor=self.loss_scale_factor,
            gradient_accumulation_steps=self.gradient_accumulation_steps or None,
            axis_names=self.axis_names,
        )

    def _backend_apply_gradients(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> None:
        """Clips, decays, updates, averages and accumulates, for all variables at once."""
        variables = list(trainable_variables)
        arrays = [dense(g, v) for g, v in zip(grads, variables, strict=True)]
        step = Step(self, self._hyperparameters(), variables, self._kept)
        for variable, value in step.run(arrays):
            self.assign(variable, value)
