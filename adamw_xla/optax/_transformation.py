"""``adamw`` and ``clip_by_global_norm``: the transformations."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
import numpy as np
import optax

from adamw_xla._check import axes, calls, options, trees
from adamw_xla._check.words import misplaced
from adamw_xla._config import AdamW, Master, ParamsRounding, StateFormat
from adamw_xla._info.begun import like_before, untold
from adamw_xla._info.step_info import ReturnInfo, StepInfo, asked
from adamw_xla._inside import clipping
from adamw_xla._inside.across import Across, axes_of_leaves
from adamw_xla._inside.placed import columns_of
from adamw_xla._inside.run import run_step
from adamw_xla._inside.update import Backend
from adamw_xla._placement import moved_to
from adamw_xla._rules.groups import Group
from adamw_xla._rules.spikes import SpikeRule
from adamw_xla._state import AdamWState, begin
from adamw_xla.optax import _check
from adamw_xla.optax._state import AdamWOptState
from adamw_xla.sharding import of_tree
from adamw_xla_lowering import Implementation, adamw_sum_of_squares, adamw_update


@calls.explained("adamw", aliases=_check.ALIASES, lacking=_check.LACKING)
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    nesterov: bool = False,
    amsgrad: bool = False,
    clipnorm: ArrayLike | None = None,
    clipvalue: ArrayLike | None = None,
    global_clipnorm: ArrayLike | None = None,
    use_ema: bool = False,
    ema_momentum: ArrayLike = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: ArrayLike | None = None,
    gradient_accumulation_steps: int | None = None,
    skip_nonfinite: bool = False,
    skip_spikes: SpikeRule | None = None,
    axis_names: Any = None,
    state_format: StateFormat = "moments",
    params_rounding: ParamsRounding = "nearest",
    master: Master | None = None,
    maximize: bool = False,
    decay_times_lr: bool = True,
    cautious_decay: bool = False,
    groups: tuple[Group, ...] = (),
    stacked: Any = None,
    keep_info: ReturnInfo = False,
    updates_like_grads: bool = False,
    implementation: Implementation | None = None,
    state_shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """``optax.adamw``, as one operation for the whole tree.

    Up to ``nesterov`` the arguments, their order and defaults are optax's; the others are
    those of ``adamw_xla.AdamW``. Different from optax:

    - The state is float32 for 16-bit params. In optax it has their dtype unless
      ``mu_dtype`` says otherwise, and a bfloat16 second moment never decays.
    - The updates are not rounded: float32, or float64 for float64 params. Then
      ``optax.apply_updates`` rounds a 16-bit param once, as ``adamw_step`` does.
    - ``amsgrad`` compares the raw second moments; ``optax.amsgrad`` the corrected ones.
    - Params must be given to ``update``, and be of a real floating dtype where they have
      gradients. The whole of an Equinox model will do, of which ``init`` took the arrays.

    Under ``optax.inject_hyperparams`` with bfloat16 params pass it
    ``hyperparam_dtype=jax.numpy.float32``: b2 = 0.999 is 1 in bfloat16, an error here and NaN in
    optax. A ``mask`` that is a function must be one of its ``static_args``: it would be called as a
    schedule. ``use_ema`` averages what the params become if the updates are added as they are, so
    nothing that changes updates may follow in the chain. With ``gradient_accumulation_steps`` the
    calls between make a tree of zeros, which natively they do not; ``optax.MultiSteps`` makes none,
    and does the work of an update at each call.

    Args:
      learning_rate: a number, a scalar array, or a schedule of the count of calls.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: the constant in the denominator, outside of the root.
      eps_root: the constant under the root.
      mu_dtype: dtype of the first moments, also of a state that has another; None: float32,
        or float64 for float64 params, and that of the state in ``update``.
      weight_decay: strength of the decoupled decay, times the learning rate; the kinds of
        ``learning_rate``.
      mask: a pytree of bools, a prefix of the params' tree, or a callable from params to
        one: False where there is no decay. Arrays of one bool will do, if they are known when
        a step is traced. Of ``stacked`` layers it sees one.
      nesterov: Nesterov momentum, as ``optax.nadamw``.
      amsgrad: divide by the running maximum of the second moments.
      clipnorm: clip each leaf's gradient to this norm; of ``stacked`` layers, each layer's.
      clipvalue: clip each gradient element to [-clipvalue, clipvalue].
      global_clipnorm: clip the gradient of the whole tree to this norm; as
        ``clip_by_global_norm`` in front.
      use_ema: keep an average of the params in ``state.ema``.
      ema_momentum: its momentum, in [0, 1].
      ema_overwrite_frequency: replace the params by their average every so many updates.
      loss_scale_factor: divide the gradients by this factor.
      gradient_accumulation_steps: make an update of the mean gradient of so many calls;
        the updates of the calls between are zeros.
      skip_nonfinite: updates are zeros, and the state stays, where a gradient is NaN or
        infinite; ``state.skipped`` counts these calls.
      skip_spikes: an ``adamw_xla.SpikeRule``: likewise where the gradient's norm is far above the
        last ones, which ``state.norms`` has.
      axis_names: inside of ``jax.shard_map``, over which mesh axes the two norms are summed, and
        devices look for what is not finite: names, or a tree of ``PartitionSpec``; see
        ``adamw_xla.AdamW``.
      state_format: "moments", or "word16": ``state.words`` takes the place of ``mu`` and ``nu``,
        2 bytes for each element in place of 8; see ``adamw_xla.AdamW``.
      params_rounding: "nearest", or "stochastic": updates of bfloat16 params lead to one of the
        two numbers beside what they would be, at random.
      master: "split": ``state.remainder`` and a bfloat16 param are a float32 number together; then
        nothing that changes updates may follow in the chain, and ``optax.apply_updates`` is to add
        them: what does not cast, as Equinox' function, makes float32 params, which have no master.
      maximize: step along the gradient.
      decay_times_lr: False: the decay is ``weight_decay`` alone, not times the learning rate.
      cautious_decay: decay only where that does not oppose the step; see ``adamw_xla.AdamW``.
      groups: of ``adamw_xla.Group``: leaves, chosen by their paths, with numbers of their own, or
        frozen, in place of ``optax.partition``. Updates of frozen leaves are zeros, or None where
        the gradient is.
      stacked: which leaves hold layers along axis 0; see ``adamw_xla.AdamW``.
      keep_info: keep what each update tells of itself in ``state.info``, an
        ``adamw_xla.StepInfo``: norms of gradients, params and updates, the rates, and whether it
        was applied. True, or "per_leaf" for the norms of each leaf too. The params' norm is of
        what they become if the updates are added as they are.
      updates_like_grads: round the updates to the gradients' dtypes, as optax does.
        Wrappers that return gradients, or zeros like them, in place of updates need it for
        16-bit gradients: ``optax.apply_if_finite`` and ``optax.conditionally_transform``.
      implementation: "xla", "native" or None, as in ``adamw_xla.adamw_step``. There is no
        kernel that returns updates: XLA makes the update and the sum in one loop, and
        "native" is an error.
      state_shardings: where the state lies, if not beside its params: a tree of
        ``jax.sharding.Sharding`` like the params, as ``adamw_xla.sharding.zero1`` returns, or a
        prefix of it.
        ``init`` puts it there, and the updates come back where the params lie.

    Returns:
      A transformation, whose state is an ``AdamWOptState``. Gradients that are None have
      updates that are None, and extra arguments are ignored.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind or out of its range. Choices
        (``nesterov``, ``ema_overwrite_frequency``, ``gradient_accumulation_steps``, ...) cannot
        be traced: to ``optax.inject_hyperparams`` name the integers among them as
        ``static_args``. ``update`` raises what ``adamw_xla.adamw_step`` does.

    Example:
      >>> import adamw_xla.optax, jax, jax.numpy as jnp, optax
      >>> solver = adamw_xla.optax.adamw(learning_rate=0.1)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = solver.init(params)
      >>> grads = jax.grad(lambda x: jnp.sum(x**2))(params)
      >>> updates, state = solver.update(grads, state, params)
      >>> print(optax.apply_updates(params, updates))
      [0.89999 1.89998 2.89997]
    """
    _check.arguments(
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        weight_decay=weight_decay,
        mask=mask,
        updates_like_grads=updates_like_grads,
        implementation=implementation,
        state_shardings=state_shardings,
    )
    asked("keep_info", keep_info)
    _check.formats(state_format, params_rounding, master, mu_dtype, updates_like_grads)
    config = AdamW(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        beta_1=b1,
        beta_2=b2,
        epsilon=eps,
        amsgrad=amsgrad,
        clipnorm=clipnorm,
        clipvalue=clipvalue,
        global_clipnorm=global_clipnorm,
        use_ema=use_ema,
        ema_momentum=ema_momentum,
        ema_overwrite_frequency=ema_overwrite_frequency,
        loss_scale_factor=loss_scale_factor,
        gradient_accumulation_steps=gradient_accumulation_steps,
        epsilon_hat=False,
        weight_decay_mask=mask,
        skip_nonfinite=skip_nonfinite,
        skip_spikes=skip_spikes,
        epsilon_root=None if _is_known_zero(eps_root) else eps_root,
        nesterov=nesterov,
        axis_names=axis_names,
        state_format=state_format,
        params_rounding=params_rounding,
        master=master,
        maximize=maximize,
        decay_times_lr=decay_times_lr,
        cautious_decay=cautious_decay,
        groups=groups,
        stacked=stacked,
    )
    transform = _Transform(
        config,
        None if mu_dtype is None else options.state_dtype(mu_dtype, "mu_dtype"),
        updates_like_grads,
        implementation,
        state_shardings,
        keep_info,
    )
    return optax.GradientTransformationExtraArgs(transform.init, transform.update)


def _is_known_zero(value: Any) -> bool:
    return isinstance(value, int | float | np.generic) and value == 0


@dataclasses.dataclass(frozen=True, eq=False)
class _Transform:
    config: AdamW
    mu_dtype: DTypeLike | None
    updates_like_grads: bool
    implementation: Implementation | None
    state_shardings: Any
    keep_info: ReturnInfo

    @calls.explained("init", aliases={}, is_method=True)
    def init(self, params: Any) -> AdamWOptState:
        """The state before the first update."""
        misplaced(_check.INIT, params=params)
        places = self._places(params)
        if places is None:
            return self._made(params)
        columns_of(places, params, jax.tree.structure(params), self.config)
        there = AdamWOptState.of(places, self._begun(params, lambda _: places.count))
        if any(isinstance(p, jax.core.Tracer) for p in jax.tree.leaves(params)):
            return jax.tree.map(moved_to, self._made(params), there)
        return jax.jit(self._made, out_shardings=there)(params)  # is whole nowhere

    def _places(self, params: Any) -> AdamWState | None:
        """Where the state of these params lies, which Flax and wrappers hold in their own trees."""
        if self.state_shardings is None:
            return None
        found = _check.shardings_like(params, self.state_shardings)
        return of_tree(_check.PLACES, found, self.config, params=params)

    def _made(self, params: Any) -> AdamWOptState:
        info = self._begun(params, lambda x: x)
        return AdamWOptState.of(self._with_mu(begin(params, self.config)), info)

    def _begun(self, params: Any, value: Callable[[jax.Array], Any]) -> StepInfo | None:
        """``state.info`` before the first update, with a value in place of each scalar."""
        if not self.keep_info:
            return None
        return jax.tree.map(value, untold(params, self.config, asked("keep_info", self.keep_info)))

    def _with_mu(self, state: AdamWState) -> AdamWState:
        """The state with ``m`` in ``mu_dtype``, whatever it was in: as in optax."""
        if self.mu_dtype is None:
            return state
        dtype = options.available("mu_dtype", self.mu_dtype)
        return dataclasses.replace(state, m=jax.tree.map(lambda x: x.astype(dtype), state.m))

    @calls.explained(
        "update", aliases={}, lacking=_check.LACKING, form=_check.WORDS.call, is_method=True
    )
    def update(
        self, updates: Any, state: AdamWOptState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AdamWOptState]:
        """What to add to ``params``, and the new state; ``updates`` are the gradients."""
        del extra_args
        _check.call(updates, state, params, AdamWOptState)
        update = functools.partial(adamw_update, implementation=self.implementation)
        changes, new, info = run_step(
            params,
            updates,
            self._with_mu(state.native()),
            self.config,
            learning_rate=None,
            weight_decay=None,
            backend=Backend(update),
            state_shardings=self._places(params),
            delta=True,
            any_dtype_of_m=True,
            words=_check.WORDS,
            return_info=self.keep_info,
        )
        if self.updates_like_grads:
            changes = jax.tree.map(_like_grad, changes, updates, is_leaf=lambda x: x is None)
        return changes, AdamWOptState.of(new, info and like_before(info, state.info))


def _like_grad(change: Any, grad: Any) -> Any:
    return None if change is None else change.astype(jax.dtypes.canonicalize_dtype(grad.dtype))


# ------------------------------------------------------------------------------- clipping


def clip_by_global_norm(
    max_norm: ArrayLike, *, axis_names: Any = None
) -> optax.GradientTransformation:
    """``optax.clip_by_global_norm``, which reads the tree in a kernel or two per shape.

    The norm is taken in float32, or in float64 where a gradient is float64, and is right for
    every finite gradient; optax makes zeros of one whose squares overflow (float32: from
    1.8e19 on). Where a gradient is infinite or NaN, everything becomes NaN, so that
    ``optax.apply_if_finite`` behind it sees that.

    Args:
      max_norm: the largest norm that passes.
      axis_names: inside of ``jax.shard_map``, over which mesh axes the norm is summed: names, or a
        tree of ``PartitionSpec`` like the updates; see ``adamw_xla.AdamW``. Where ``update`` is
        given no params, types of updates tell what is sharded: average them first.

    Returns:
      A transformation without state; updates keep their dtypes.

    Raises:
      TypeError, ValueError: ``max_norm`` is no number above 0, or ``axis_names`` of the wrong
        kind; and when it is used, a gradient is not of a real floating dtype, or ``axis_names``
        does not fit.
    """
    _check.max_norm(max_norm)
    clip = functools.partial(_clip, max_norm, axes.canonical(axis_names))
    return optax.GradientTransformation(_stateless, clip)


def _stateless(params: Any) -> optax.EmptyState:
    del params
    return optax.EmptyState()


def _clip(
    max_norm: ArrayLike, axis_names: Any, updates: Any, state: Any, params: Any = None
) -> tuple[Any, Any]:
    treedef: Any
    leaves, treedef = jax.tree.flatten(updates)
    trees.params(updates, leaves, "updates")
    leaves = [jnp.asarray(x) for x in leaves]
    wide = any(x.dtype == np.float64 for x in leaves)
    one = jnp.ones((), np.float64 if wide else np.float32)
    models, like = jax.tree.flatten(params)
    over = axes_of_leaves(
        axis_names,
        "clip_by_global_norm",
        updates,
        models if like == treedef else leaves,
        leaves,
        _check.CLIP,
    )
    squares = Across(adamw_sum_of_squares, over or [()] * len(leaves))(one, leaves)
    unit, quotient = clipping.global_factors(squares, max_norm)

    def clipped(x: jax.Array) -> jax.Array:
        return (x.astype(one.dtype) * unit * quotient).astype(x.dtype)

    return treedef.unflatten(map(clipped, leaves)), state
