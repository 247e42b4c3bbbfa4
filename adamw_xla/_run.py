"""One step inside: flatten, make the step's scalars, update, put the trees together."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adamw_xla import _clipping
from adamw_xla._check import options, trees
from adamw_xla._check.words import NATIVE, Words, misplaced
from adamw_xla._config import AdamW, ScalarOrSchedule, check_config
from adamw_xla._hyper import Scalar, as_scalar, evaluate, increment
from adamw_xla._state import AdamWState, check_state
from adamw_xla._update import Backend, Rates, groups_of, hyper_dtype, scaled_like, update_leaves
from adamw_xla_lowering import compute_dtype


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
    words: Words = NATIVE,
) -> tuple[Any, AdamWState]:
    """``adamw_step`` on any backend; ``reference`` brings its own.

    With ``delta``, the first result is what to add to the params, in the dtype of the
    arithmetic, and None where the gradient is. Errors are in the ``words`` of the caller's API.
    """
    misplaced(words, params=params, grads=grads, state=state, config=config)
    check_config(config, words.call)
    leaves, treedef = jax.tree.flatten(params)
    trees.params(params, leaves)
    check_state(params, treedef, leaves, state, config, words)
    flat = trees.grads(params, treedef, leaves, grads)
    decays = trees.mask(params, treedef, config.weight_decay_mask, words.mask)
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
        if value is not None:
            options.scalar_or_schedule(name, value)
    if not leaves:
        return params, state

    live = tuple(i for i, g in enumerate(flat) if g is not None)
    groups, kinds = groups_of([decays[i] for i in live])
    chosen = _Leaves(treedef, live, groups)
    dtype = hyper_dtype([leaves[i].dtype for i in live])

    calls = _calls(state, config)
    rate = config.learning_rate if learning_rate is None else learning_rate
    decay = config.weight_decay if weight_decay is None else weight_decay
    lr = evaluate("learning_rate", rate, calls, dtype)
    wd = evaluate("weight_decay", decay, calls, dtype)
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
        self,
        params: Any,
        state: AdamWState,
        grads: list[jax.Array],
        scale: Scalar,
        clear: bool = False,
    ) -> tuple[Any, AdamWState]:
        """A real update with ``scale`` times ``grads``; with ``clear`` they begin anew."""
        c, take = self.config, self.leaves.take
        trees = {"params": params, "m": state.m, "v": state.v, "v_max": state.v_max}
        new, apply, zeros = update_leaves(
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
            clear=clear,
        )
        if zeros is not None:
            assert state.micro_step is not None
            state = self._counted(state, zeros, jnp.zeros_like(state.micro_step))
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

        The calls between do no more than the addition: the update stands in a body of its own.
        """
        steps, micro_step = self.config.gradient_accumulation_steps, state.micro_step
        assert steps is not None
        assert micro_step is not None
        old = self.leaves.take(state.accumulated)
        scaled = scaled_like(old, grads, self.unscale, self.dtype)
        good = jnp.asarray(True)
        if self.config.skip_nonfinite:
            total = [a + g for a, g in zip(old, scaled, strict=True)]
            squares = self.backend.sum_of_squares(jnp.ones((), self.dtype), total)
            good = _clipping.is_good(self.config, squares)
            scaled = [jnp.where(good, g, 0) for g in scaled]
            state = dataclasses.replace(state, skipped=increment(state.skipped, ~good))
        total = [a + g for a, g in zip(old, scaled, strict=True)]
        done = micro_step + good.astype(micro_step.dtype)

        def update(results: tuple[Any, AdamWState]) -> tuple[Any, AdamWState]:
            moved, state = results
            mean = self.leaves.take(state.accumulated)
            weights = params if self.delta else moved
            return self.update_with(weights, state, mean, 1 / steps, clear=True)

        between = self._unmoved(params), self._counted(state, total, done)
        return self.backend.do_if(done >= steps, update, between)

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
