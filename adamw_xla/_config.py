"""``AdamW``: the hyperparameters, as an immutable pytree."""

from __future__ import annotations

from collections.abc import Hashable
import dataclasses
import functools
from typing import Any, ClassVar, Literal, TypeAlias

import jax
from jax import export
from jax.typing import ArrayLike, DTypeLike
import numpy as np

from adamw_xla._check import axes, calls, fields, formats, options
from adamw_xla._check.trees import is_mask_function
from adamw_xla._check.words import NATIVE, not_a_config
from adamw_xla._inside import decay
from adamw_xla._rules import spikes, stacked
from adamw_xla._rules.groups import Group, ScalarOrSchedule, checked
from adamw_xla._rules.spikes import SpikeRule
from adamw_xla._saved.static import Compared, Static, from_bytes, to_bytes
from adamw_xla_lowering import compute_dtype

StateFormat: TypeAlias = Literal["moments", "word16"]
ParamsRounding: TypeAlias = Literal["nearest", "stochastic"]
Master: TypeAlias = Literal["split"]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class AdamW(Compared):
    r"""Hyperparameters of AdamW, with the names and defaults of Keras.

    With :math:`\alpha` the learning rate, :math:`\lambda` the weight decay and
    :math:`t` the number of this update, counted from 1, each element becomes

    .. math::

      \begin{align*}
        m_t &\leftarrow \beta_1 m_{t-1} + (1-\beta_1) g_t \\
        v_t &\leftarrow \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        \theta_t &\leftarrow \theta_{t-1} - \alpha_t \left( \lambda \theta_{t-1} +
          \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t} \cdot
          \frac{m_t}{\sqrt{v_t} + \hat\epsilon} \right)
      \end{align*}

    with ``epsilon_hat=True``, and with ``epsilon_hat=False``

    .. math::

      \theta_t \leftarrow \theta_{t-1} - \alpha_t \left( \lambda \theta_{t-1} +
        \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon} \right).

    The arithmetic is float32 (float64 for float64 params) whatever the params' dtype,
    and the new param is rounded to its dtype last. So a step below half of the spacing of
    the param's dtype is lost: at a learning rate of 1e-3 a bfloat16 param of 1 stays 1. Keep
    float32 params and cast them in the loss function, where steps are that small.

    The config is a pytree: its numbers are leaves, its choices and callables are static.
    Closed over by a jitted function, the numbers are constants of the program; passed in
    as an argument, they are traced, and a changed learning rate does not recompile; with the
    betas go ``1 - beta`` and ``log(beta)`` in float64, so that nothing is lost. (It is where
    a traced config is rebuilt by ``dataclasses.replace``: from a beta that is rounded.) To
    batch one with ``jax.vmap``, build it inside of the mapped function.

    Args:
      learning_rate: a number, a scalar array, or a callable from the step count (int32
        scalar, 0 at the first step) to a scalar: an optax schedule, a Keras
        ``LearningRateSchedule``. The count is of calls: under gradient accumulation it
        rises at each micro-step, as in Keras. A callable without arguments, which Keras allows,
        is called when a step is traced: what it then returns is what the program has.
      weight_decay: strength of the decoupled decay, multiplied by the learning rate; a
        number, scalar array or schedule. 0 for none.
      beta_1: decay of the first moment, in [0, 1); number or scalar array.
      beta_2: decay of the second moment, in [0, 1); number or scalar array.
      epsilon: the small constant in the denominator. 0 counts as 1.2e-38: what never had a
        gradient does not move.
      amsgrad: divide by the running maximum of ``v``. As in Keras and PyTorch the raw
        ``v`` is compared; optax compares the bias-corrected one.
      clipnorm: clip each leaf's gradient to this L2 norm; of leaves that hold ``stacked`` layers,
        each layer's.
      clipvalue: clip each gradient element to [-clipvalue, clipvalue].
      global_clipnorm: clip the gradient of the whole tree to this L2 norm, summed over all
        devices; inside of ``jax.shard_map`` ``axis_names`` says over which.
        The norm is right for every finite gradient, also where its squares overflow (float32:
        from 1.8e19 on; there stock Keras makes everything NaN). Elements below 1.1e-19 count as
        0 in it. A gradient whose norm is above 8.5e37 times the bound becomes 0. One that has a
        NaN or an infinity makes everything NaN, unless ``skip_nonfinite`` skips it.
      use_ema: keep a moving average of the params; ``adamw_finalize`` returns it.
      ema_momentum: its momentum, in [0, 1].
      ema_overwrite_frequency: replace the params by their average every so many updates.
      loss_scale_factor: the gradients are of ``scale_loss(loss, config)``, and are
        divided by this factor.
      gradient_accumulation_steps: make an update of the mean gradient of so many calls.
        Unlike Keras on JAX, the calls between leave params and their average alone. It may
        be changed in mid-accumulation: the mean is of the gradients that were summed.
      name: for people; stored, never read.
      epsilon_hat: True: epsilon as in Keras and before Section 2.1 of Kingma and Ba.
        False: as in their Algorithm 1, PyTorch and optax.
      weight_decay_mask: a pytree of bools, a prefix of the params' tree, or a callable
        from params to one: False where there is no decay. Arrays of one bool will do, if they
        are known when a step is traced. A callable sees None where a leaf has no state. Takes
        the place of Keras' ``exclude_from_weight_decay``. Of ``stacked`` layers it sees one, a
        shape and a dtype.
      skip_nonfinite: a step whose gradient has a NaN or an infinity, or whose squared norm
        overflows after clipping (so that ``v`` would never recover), leaves params, state and
        count as they were, and is counted in ``state.skipped``. Decided on the device.
      skip_spikes: a ``SpikeRule``, or None: a step whose gradient's norm is above the mean of the
        last ones by more than so many deviations is skipped likewise.
      epsilon_root: a constant added to (the corrected) ``v`` under the root, optax's
        ``eps_root``: it bounds the root's derivative, where steps are differentiated. None:
        none, and no addition.
      nesterov: step along :math:`\beta_1 m_t / (1-\beta_1^{t+1}) + (1-\beta_1) g_t /
        (1-\beta_1^t)` in place of :math:`m_t / (1-\beta_1^t)` (Dozat 2016, as in optax).
      state_dtype: dtype of the optimizer's state; None: float32, or float64 for float64
        params. A 16-bit dtype is for ``m`` alone: a 16-bit ``v`` would never decay, since
        beta_2 = 0.999 moves it by less than half a unit in its last place.
      state_format: "moments": ``m`` and ``v``, an array each. "word16": both in one bfloat16 for
        each element, 2 bytes in place of 8, rounded at random by bits that follow from the
        element's gradient and param and the count alone; ``adamw_xla_lowering.formats.word`` has
        the format. What the step itself computes is float32 as ever, but ``1 - beta_2`` is up to
        9 % less, since a ``v`` that is rounded is forgotten sooner, and the rate up to 3 %, since
        its noise would make steps longer (``formats.noise`` derives both). An ``epsilon``
        below 1e-14 counts as that. ``m`` may be 7.5 times the root of ``v`` there, which is all
        that a ``beta_1`` of 0.9 and a ``beta_2`` of 0.999 make; at 0.9999 the next steps are up to
        30 % shorter where gradients grow tenfold at once. Not with ``amsgrad`` or ``state_dtype``,
        nor for float64 params.
      params_rounding: of bfloat16 params: "nearest", or "stochastic", so that steps below
        half of their spacing are made on average. Others are rounded to the nearest.
      master: "split": the state holds 16 bits more for each param, its ``remainder``: with it a
        bfloat16 param is a float32 number, exactly; the param is that number rounded to nearest.
        None: the params are what they are. Float32 and float64 params have no use for it.
      maximize: step along the gradient and not against it, as in PyTorch: the gradient counts as
        its negative.
      decay_times_lr: False: the decay of a step is ``weight_decay`` alone, not times the learning
        rate, so that its schedule is its own: :math:`\theta_t \leftarrow \theta_{t-1} -
        \lambda_t \theta_{t-1} - \ldots` (Loshchilov and Hutter's own form; give small numbers: of
        the default, 0.004, half of each param is gone after 173 steps).
      cautious_decay: an element decays only where that does not oppose its step, that is where
        the step (without decay) does not move it away from 0: :math:`\lambda` counts as 0 where
        :math:`\theta_{t-1}` and what is subtracted from it differ in sign (Chen et al. 2025).
      groups: ``Group``s: leaves, chosen by their paths, with numbers of their own, or frozen. A
        leaf is of the first that matches it; one that none matches has the config's numbers.
        ``describe_groups`` prints which is where. A group without a leaf is an error of
        ``adamw_init`` and ``adamw_step``.
      stacked: which leaves hold layers along axis 0, as ``jax.lax.scan`` takes them: a regular
        expression for paths or a tuple of them, or a callable from a path and the leaf to a bool,
        as a ``Group`` has; or a tree of bools, a prefix of the params'. Each layer is clipped to
        ``clipnorm`` by itself, and callables of ``groups`` and of ``weight_decay_mask`` see one
        layer, a ``jax.ShapeDtypeStruct``: all is as with a list of the layers. A pattern without
        a leaf is an error. None: no leaf does.
      axis_names: inside of ``jax.shard_map`` (and only there; elsewhere XLA knows), over which
        manual mesh axes the norms of ``clipnorm`` and ``global_clipnorm`` are summed, and
        ``skip_nonfinite`` looks, so that all devices clip and skip alike. A tuple of names, as
        ``mesh.axis_names``: each leaf is summed over those of them that its param varies over, by
        its type, in one all-reduce for all leaves of the same axes. With ``check_vma=False``
        types do not tell: give what ``in_specs`` has for the params, a tree of ``PartitionSpec``
        (or of tuples of names), of which a prefix will do. ``()``: each device is for itself, as
        in a population, or holds all leaves whole. None: an error where more than one device is
        to have a norm. Gradients are to be averaged over data axes before; one that varies where
        its param does not is an error, where types tell.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of its range, or two contradict each other.

    Example:
      >>> import adamw_xla as ax, jax, jax.numpy as jnp
      >>> config = ax.AdamW(learning_rate=0.1)
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> state = ax.adamw_init(params, config)
      >>> grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      >>> params, state = ax.adamw_step(params, grads, state, config)
      >>> print([f"{x:.4f}" for x in params["w"]], state.count)
      ['0.8996', '-1.8992'] 1

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014, Algorithm 1;
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019, Algorithm 2 (there the decay is not
      multiplied by the learning rate, only by its schedule; here, as in Keras, optax
      and PyTorch, it is);
      Dozat, `Incorporating Nesterov Momentum into Adam
      <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016;
      Chen et al., `Cautious Weight Decay <https://arxiv.org/abs/2510.12402>`_, 2025;
      Reddi et al., `On the Convergence of Adam and Beyond
      <https://openreview.net/forum?id=ryQu7f-RZ>`_, 2018, Algorithm 2.
    """

    learning_rate: ScalarOrSchedule = 0.001
    weight_decay: ScalarOrSchedule = 0.004
    beta_1: ArrayLike = 0.9
    beta_2: ArrayLike = 0.999
    epsilon: ArrayLike = 1e-7
    amsgrad: bool = False
    clipnorm: ArrayLike | None = None
    clipvalue: ArrayLike | None = None
    global_clipnorm: ArrayLike | None = None
    use_ema: bool = False
    ema_momentum: ArrayLike = 0.99
    ema_overwrite_frequency: int | None = None
    loss_scale_factor: ArrayLike | None = None
    gradient_accumulation_steps: int | None = None
    name: str | None = "adamw"
    _: dataclasses.KW_ONLY
    epsilon_hat: bool = True
    weight_decay_mask: Any = None
    skip_nonfinite: bool = False
    skip_spikes: SpikeRule | None = None
    epsilon_root: ArrayLike | None = None
    nesterov: bool = False
    state_dtype: DTypeLike | None = None
    state_format: StateFormat = "moments"
    params_rounding: ParamsRounding = "nearest"
    master: Master | None = None
    maximize: bool = False
    decay_times_lr: bool = True
    cautious_decay: bool = False
    groups: tuple[Group, ...] = ()
    stacked: Any = None
    axis_names: Any = None

    _NUMBERS: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "weight_decay",
        "beta_1",
        "beta_2",
        "epsilon",
        "clipnorm",
        "clipvalue",
        "global_clipnorm",
        "ema_momentum",
        "loss_scale_factor",
        "epsilon_root",
    )
    _RULES: ClassVar[dict[str, Any]] = {"groups": (), "skip_spikes": None}
    _CHOICES: ClassVar[tuple[str, ...]] = (
        "amsgrad",
        "use_ema",
        "ema_overwrite_frequency",
        "gradient_accumulation_steps",
        "name",
        "epsilon_hat",
        "skip_nonfinite",
        "nesterov",
        "state_dtype",
        "state_format",
        "params_rounding",
        "master",
        "maximize",
        "decay_times_lr",
        "cautious_decay",
    )

    def __post_init__(self) -> None:
        """Checks every argument."""
        if self.state_dtype is not None:
            object.__setattr__(self, "state_dtype", options.state_dtype(self.state_dtype))
        object.__setattr__(self, "axis_names", axes.canonical(self.axis_names))
        if self.name is None:  # Keras' own default
            object.__setattr__(self, "name", "adamw")
        object.__setattr__(self, "groups", checked(self.groups))
        spikes.checked(self.skip_spikes)
        object.__setattr__(self, "stacked", stacked.checked(self.stacked))
        fields.check(self)

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], Hashable]:
        """Numbers are children; schedules, choices, the mask and the axes are static.

        Behind them stands what follows from the decays, in float64: a traced decay is rounded.
        """
        values = {name: getattr(self, name) for name in self._NUMBERS}
        schedules = tuple((name, value) for name, value in values.items() if callable(value))
        following = {
            f"{part}_{name}": getattr(decay.known(self, name), part)
            for name, parts in _following(self.use_ema).items()
            for part in parts
        }
        children = tuple(
            (jax.tree_util.GetAttrKey(name), None if callable(value) else value)
            for name, value in (values | following).items()
        )
        # What is not used is no child: what was exported before it was there has none.
        rules = tuple(name for name in self._RULES if getattr(self, name))
        children += tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in rules)
        choices = tuple(getattr(self, name) for name in self._CHOICES)
        trees = (self.weight_decay_mask, self.axis_names, self.stacked)
        kept = tuple(x if is_mask_function(x) else Static.of(x) for x in trees)
        return children, (schedules, choices, *kept, rules)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> AdamW:
        """Rebuilds without checks: the leaves may be tracers, or no numbers at all."""
        schedules, choices, *kept, rules = aux
        trees = (x.tree() if isinstance(x, Static) else x for x in kept)
        config = object.__new__(cls)
        numbers, following = children[: len(cls._NUMBERS)], iter(children[len(cls._NUMBERS) :])
        fields = {
            **dict(zip(cls._NUMBERS, numbers, strict=True)),
            **dict(schedules),
            **dict(zip(cls._CHOICES, choices, strict=True)),
            **dict(zip(("weight_decay_mask", "axis_names", "stacked"), trees, strict=True)),
        }
        for name, value in fields.items():
            object.__setattr__(config, name, value)
        decays = {
            name: decay.Decay(fields[name], **dict(zip(parts, following, strict=False)))
            for name, parts in _following(fields["use_ema"]).items()
        }
        object.__setattr__(config, "_decays", decays)
        for name, value in {**cls._RULES, **dict(zip(rules, following, strict=False))}.items():
            object.__setattr__(config, name, value)
        return config

    def dtype_of(self, field: str, param_dtype: Any) -> np.dtype[Any]:
        """The dtype of a field of the state for a param of this dtype."""
        if field in formats.DTYPES:
            return formats.DTYPES[field]
        computed = compute_dtype(jax.dtypes.canonicalize_dtype(param_dtype))
        if self.state_dtype is None:
            return computed
        dtype = options.available("state_dtype", self.state_dtype)
        # All but m is never below float32.
        return dtype if field == "m" or dtype.itemsize >= 4 else computed


def _following(use_ema: bool) -> dict[str, tuple[str, ...]]:
    """What is passed on beside each decay: no more than is read, for each is an argument."""
    parts = ("complement", "log")
    return {"beta_1": parts, "beta_2": parts, **({"ema_momentum": parts[:1]} if use_ema else {})}


def needs_norm(config: AdamW) -> str | None:
    """The option of the config that asks for a sum of squares; None: there is none."""
    clips = ("clipnorm", "global_clipnorm", "skip_spikes")
    found = next((name for name in clips if getattr(config, name) is not None), None)
    return "skip_nonfinite" if found is None and config.skip_nonfinite else found


def check_config(value: Any, call: str = NATIVE.call) -> None:
    """Refuses what is not an ``AdamW``; ``call`` is the call that needs one."""
    if not isinstance(value, AdamW):
        raise not_a_config(value, call)


# Lets `jax.export` write functions that take a config.
export.register_pytree_node_serialization(
    AdamW,
    serialized_name="adamw_xla.AdamW",
    serialize_auxdata=functools.partial(to_bytes, AdamW._CHOICES),
    deserialize_auxdata=functools.partial(from_bytes, AdamW._CHOICES),
)
AdamW.__init__ = calls.explained(  # type: ignore[method-assign]
    "AdamW", aliases=calls.ALIASES | calls.OF_THE_STEP, is_method=True
)(AdamW.__init__)
