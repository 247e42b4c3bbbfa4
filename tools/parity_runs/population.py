"""Many trainings of one task by one arm as a single program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from parity_runs.arms import Arm, Optimizer
from parity_runs.tasks import Params, Task

Losses = np.ndarray[Any, Any]
CHUNK = 50
"""Steps of one call: between calls the progress bar moves."""


def schedule(now: jax.Array, steps: int) -> jax.Array:
    """The rate's factor at a step: a warm-up of a twentieth, then half a cosine to a tenth."""
    warm = max(steps // 20, 1)
    falling = 0.55 + 0.45 * jnp.cos(math.pi * (now - warm) / max(steps - warm, 1))
    return jnp.minimum((now + 1) / warm, falling)


@functools.partial(jax.jit, static_argnames=("task", "optimizer", "steps"), donate_argnames="carry")
def advance(
    carry: Any,
    batches: Any,
    rates: jax.Array,
    betas: jax.Array,
    *,
    task: Task,
    optimizer: Optimizer,
    steps: int,
) -> tuple[Any, jax.Array]:
    """Some steps of all replicas: ``(now, params, state)`` and losses [steps, replicas].

    Replicas differ in params, batches [steps, replicas, ...], rates and betas [replicas].
    """

    def one(params: Params, state: Any, batch: Any, rate: jax.Array, beta_2: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        return *optimizer(beta_2)[1](params, grads, state, rate), loss

    def body(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        now, params, state = carry
        rate = rates * schedule(now, steps)
        params, state, loss = jax.vmap(one)(params, state, batch, rate, betas)
        return (now + 1, params, state), loss

    return lax.scan(body, carry, batches)


def begun(params: Params, betas: jax.Array, arm: Arm) -> Any:
    """Where replicas begin: at ``params`` [replicas, ...], with a state of zeros."""
    params = jax.tree.map(lambda p: jnp.asarray(p, arm.dtype), params)
    state = jax.jit(jax.vmap(lambda p, b: arm.optimizer(b)[0](p)))(params, betas)
    # A copy of its own for everything: the same array may not be donated twice.
    return jax.tree.map(jnp.copy, (jnp.zeros((), jnp.int32), params, state))


def trained(
    params: Params,
    batches: Sequence[Any],
    rates: Any,
    betas: Any,
    *,
    task: Task,
    arm: Arm,
    tick: Callable[[int], None],
) -> tuple[Params, Losses]:
    """Params, and losses [replicas, steps], of replicas that begin at ``params`` [replicas, ...].

    Args:
      params: float32, of which each arm's own dtype is made.
      batches: of each replica its own, first dimension the step.
      rates: each replica's learning rate at its highest.
      betas: each replica's beta_2.
      task: what is trained.
      arm: by what.
      tick: called with the number of steps that were made.
    """
    rates, betas = arm.stretch * jnp.asarray(rates, "float32"), jnp.asarray(betas, "float32")
    step = functools.partial(advance, task=task, optimizer=arm.optimizer)
    steps = len(jax.tree.leaves(batches[0])[0])
    carry, losses = begun(params, betas, arm), []
    for first in range(0, steps, CHUNK):
        part = slice(first, first + CHUNK)
        chunk = jax.tree.map(functools.partial(_side_by_side, part), *batches)
        carry, found = step(carry, chunk, rates, betas, steps=steps)
        losses.append(np.asarray(found))
        tick(len(losses[-1]))
    return carry[1], np.concatenate(losses).T


def _side_by_side(part: slice, *of_replicas: Any) -> Any:
    return np.stack([batches[part] for batches in of_replicas], 1)
