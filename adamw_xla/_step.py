"""``adamw_step`` and its kin: check, make the step's scalars, update."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from adamw_xla import _check
from adamw_xla._config import AdamW, ScalarOrSchedule
from adamw_xla._hyper import Scalar, as_scalar, evaluate, increment
from adamw_xla._state import AdamWState
from adamw_xla._update import Backend, Rates, groups_of, hyper_dtype, update_leaves
from adamw_xla_lowering import Implementation, adamw_update, compute_dtype


def adamw_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    config: AdamW,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    implementation: Implementation | None = None,
) -> tuple[Any, AdamWState]:
    """Makes one step of AdamW: the whole tree in one operation.

    Call it inside of ``jax.jit`` with params and state donated; then the update is made
    in place. ``AdamW`` has the equations.

    Args:
      params: a pytree of arrays, bfloat16, float16, float32 or float64.
      grads: the gradients, built and shaped like params, of any of those dtypes. A leaf
        that is None is frozen: its param and state stay as they are.
      state: from ``adamw_init(params, config)`` or the last step.
      config: the hyperparameters.
      learning_rate: takes the place of the config's for this step.
      weight_decay: likewise.
      implementation: "xla" (StableHLO on every platform; what ``jax.export`` writes),
        "native" (this platform's own kernel, or an error that says why not), or None: the
        faster of what can run.

    Returns:
      New params and new state, of the structures, shapes and dtypes of the old.

    Raises:
      TypeError: a leaf's dtype or kind does not fit; the message names its path.
      ValueError: a tree or shape does not fit, or the state is another config's.

    Example:
      >>> import adamw_xla as ax, functools, jax, jax.numpy as jnp
      >>> config = ax.AdamW(learning_rate=0.1, weight_decay=0.0)
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def train_step(params, state, x):
      ...     loss, grads = jax.value_and_grad(lambda p: (p["w"] @ x - 1.0) ** 2)(params)
      ...     params, state = ax.adamw_step(params, grads, state, config)
      ...     return params, state, loss
      >>> params = {"w": jnp.zeros(2)}
      >>> state = ax.adamw_init(params, config)
      >>> for _ in range(100):
      ...     params, state, loss = train_step(params, state, jnp.array([1.0, 2.0]))
      >>> bool(loss < 1e-3), int(state.count)
      (True, 100)
    """
    return run_step(
        params,
        grads,
        state,
        config,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        backend=Backend(functools.partial(adamw_update, implementation=implementation)),
    )


def adamw_finalize(params: Any, state: AdamWState, config: AdamW) -> Any:
    """Returns the moving average as params, at the end of a training with ``use_ema``.

    Args:
      params: the params of the last step.
      state: the state of the last step.
      config: the hyperparameters.

    Returns:
      ``state.ema`` in the dtypes of ``params``; without ``use_ema`` params as they are.

    Raises:
      TypeError, ValueError: as ``adamw_step``.
    """
    _check.is_config(config)
    leaves, treedef = jax.tree.flatten(params)
    _check.params(params, leaves)
    _check.state(params, treedef, leaves, state, config)
    if state.ema is None:
        return params
    return jax.tree.map(lambda p, e: e.astype(p.dtype), params, state.ema)


def scale_loss(loss: jax.Array, config: AdamW) -> jax.Array:
    """Multiplies a loss by ``config.loss_scale_factor``, where there is one.

    Differentiate the scaled loss; ``adamw_step`` divides its gradients again. It keeps
    small float16 gradients from becoming zero.
    """
    _check.is_config(config)
    factor = config.loss_scale_factor
    return loss if factor is None else loss * jnp.asarray(factor, loss.dtype)


# ------------------------------------------------------------------------ one step inside


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """The leaves that have a gradient, and the way back to the whole trees."""

    treedef: Any
    live: tuple[int, ...]
    groups: tuple[int, ...]

    def take(self, tree: Any) -> list[Any]:
        flat = self.treedef.flatten_up_to(tree)
        return [flat[i] for i in self.live]

    def put(self, tree: Any, new: Sequence[Any]) -> Any:
        flat = self.treedef.flatten_up_to(tree)
        for i, x in zip(self.live, new, strict=True):
            flat[i] = x
        return self.treedef.unflatten(flat)


def run_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    config: AdamW,
    *,
    learning_rate: ScalarOrSchedule | None,
    weight_decay: ScalarOrSchedule | None,
    backend: Backend,
    delta: bool = False,
) -> tuple[Any, AdamWState]:
    """``adamw_step`` on any backend; ``reference`` brings its own.

    With ``delta``, the first result is what to add to the params, in the dtype of the
    arithmetic, and None where the gradient is.
    """
    _check.is_config(config)
    leaves, treedef = jax.tree.flatten(params)
    _check.params(params, leaves)
    _check.state(params, treedef, leaves, state, config)
    flat = _check.grads(params, treedef, leaves, grads)
    decays = _check.mask(params, treedef, config.weight_decay_mask)
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
        if value is not None:
            _check.scalar_or_schedule(name, value)
    if not leaves:
        return params, state

    live = tuple(i for i, g in enumerate(flat) if g is not None)
    groups, kinds = groups_of([decays[i] for i in live])
    chosen = _Leaves(treedef, live, groups)
    dtype = hyper_dtype([leaves[i].dtype for i in live])

    calls = _calls(state, config)
    lr = evaluate(config.learning_rate if learning_rate is None else learning_rate, calls, dtype)
    wd = evaluate(config.weight_decay if weight_decay is None else weight_decay, calls, dtype)
    rates = Rates(lr, tuple(wd if k else 0.0 for k in kinds))
    step = _Step(config, chosen, backend, dtype, rates, delta)
    live_grads = [flat[i] for i in live]
    if config.gradient_accumulation_steps is None:
        return step.update_with(params, state, live_grads, step.unscale)
    return step.accumulate(params, state, live_grads)


def _calls(state: AdamWState, config: AdamW) -> jax.Array:
    """How many calls came before this one, but for skipped ones: what schedules see."""
    if config.gradient_accumulation_steps is None or state.micro_step is None:
        return state.count
    return state.count * config.gradient_accumulation_steps + state.micro_step


@dataclasses.dataclass(frozen=True)
class _Step:
    config: AdamW
    leaves: _Leaves
    backend: Backend
    dtype: Any
    rates: Rates
    delta: bool

    @property
    def unscale(self) -> Scalar:
        """The factor that takes the loss scale out of a gradient."""
        factor = self.config.loss_scale_factor
        return 1.0 if factor is None else 1 / as_scalar(factor, self.dtype)

    def update_with(
        self, params: Any, state: AdamWState, grads: list[jax.Array], scale: Scalar
    ) -> tuple[Any, AdamWState]:
        """A real update with ``scale`` times ``grads``."""
        c, take = self.config, self.leaves.take
        trees = {"params": params, "m": state.m, "v": state.v, "v_max": state.v_max}
        new, apply = update_leaves(
            c,
            {k: take(x) for k, x in {**trees, "ema": state.ema}.items() if x is not None},
            grads,
            scale,
            count=state.count,
            rates=self.rates,
            groups=self.leaves.groups,
            dtype=self.dtype,
            backend=self.backend,
            delta=self.delta,
        )
        put = self.leaves.put
        return self._results(params, new.params), dataclasses.replace(
            state,
            count=increment(state.count, apply),
            m=put(state.m, new.m),
            v=put(state.v, new.v),
            v_max=None if new.v_max is None else put(state.v_max, new.v_max),
            ema=None if new.ema is None else put(state.ema, new.ema),
            skipped=None if apply is None else increment(state.skipped, ~apply),
        )

    def accumulate(
        self, params: Any, state: AdamWState, grads: list[jax.Array]
    ) -> tuple[Any, AdamWState]:
        """Adds to the mean gradient; every so many calls, updates with it.

        The calls between do no more than the addition: the update stands in a branch.
        """
        steps, micro_step = self.config.gradient_accumulation_steps, state.micro_step
        assert steps is not None
        assert micro_step is not None
        old = self.leaves.take(state.accumulated)
        unscale = self.unscale
        total = [
            a + (g.astype(self.dtype) * unscale).astype(a.dtype)
            for a, g in zip(old, grads, strict=True)
        ]

        def real(total: list[jax.Array]) -> tuple[Any, AdamWState]:
            new_params, new_state = self.update_with(params, state, total, 1 / steps)
            zeros = [jnp.zeros_like(a) for a in old]
            return new_params, self._counted(new_state, zeros, jnp.zeros_like(micro_step))

        def between(total: list[jax.Array]) -> tuple[Any, AdamWState]:
            return self._unmoved(params), self._counted(state, total, micro_step + 1)

        def skipped(total: list[jax.Array]) -> tuple[Any, AdamWState]:
            del total
            count = increment(state.skipped)
            return self._unmoved(params), dataclasses.replace(state, skipped=count)

        last = jnp.asarray(micro_step + 1 >= steps)
        if not self.config.skip_nonfinite:
            return jax.lax.cond(last, real, between, total)
        finite = jnp.isfinite(self.backend.sum_of_squares(jnp.ones((), self.dtype), total))
        branch = jnp.where(finite, last.astype(jnp.int32), 2)
        return jax.lax.switch(branch, [between, real, skipped], total)

    def _results(self, params: Any, new: Sequence[jax.Array]) -> Any:
        """The new params; or their changes, where there are any, in the params' tree."""
        if not self.delta:
            return self.leaves.put(params, new)
        nothing = self.leaves.treedef.unflatten([None] * self.leaves.treedef.num_leaves)
        return self.leaves.put(nothing, new)

    def _unmoved(self, params: Any) -> Any:
        """What a call without an update returns in place of new params."""
        if not self.delta:
            return params
        live = self.leaves.take(params)
        return self._results(params, [jnp.zeros_like(p, compute_dtype(p.dtype)) for p in live])

    def _counted(
        self, state: AdamWState, accumulated: list[jax.Array], micro_step: jax.Array
    ) -> AdamWState:
        tree = self.leaves.put(state.accumulated, accumulated)
        return dataclasses.replace(state, accumulated=tree, micro_step=micro_step)


__all__ = ["adamw_finalize", "adamw_step", "run_step", "scale_loss"]
