"""``adamw_step`` and its kin, which a training calls; ``_run`` does the work."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from adamw_xla._check import calls
from adamw_xla._check.words import NATIVE, misplaced
from adamw_xla._config import AdamW, check_config
from adamw_xla._info.step_info import ReturnInfo, StepInfo
from adamw_xla._inside.run import run_step
from adamw_xla._inside.update import Backend
from adamw_xla._rules.groups import ScalarOrSchedule
from adamw_xla._state import AdamWState, check_kind, check_state
from adamw_xla_lowering import Implementation, adamw_sum_of_squares, adamw_update

LACKING = {
    "grads": "the gradients, as of jax.grad(loss_function)(params)",
    "state": "from adamw_init(params, config) or the step before",
    "config": "the options, an adamw_xla.AdamW",
}
OPTIONS = {
    alias: f"it is an option of the config: AdamW({name.replace(' and ', '=..., ')}=...)"
    for alias, name in {
        **{field.name: field.name for field in dataclasses.fields(AdamW)},
        **calls.ALIASES,
        **{name: name for name in calls.ALIASES.values()},
    }.items()
}
ALIASES = {
    **OPTIONS,
    "lr": "learning_rate",
    "wd": "weight_decay",
    "opt_state": "state",
    "optimizer": "config",
    "updates": "grads",
    "gradients": "grads",
    "model": "params",
    "backend": "implementation",
    "has_aux": "return_info",
    "return_metrics": "return_info",
}
_FINALIZE = dataclasses.replace(NATIVE, call="adamw_finalize(params, state, config)")


@overload
def adamw_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    config: AdamW,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    implementation: Implementation | None = None,
    state_shardings: AdamWState | None = None,
    offload: bool = False,
    return_info: Literal[False] = False,
) -> tuple[Any, AdamWState]: ...


@overload
def adamw_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    config: AdamW,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    implementation: Implementation | None = None,
    state_shardings: AdamWState | None = None,
    offload: bool = False,
    return_info: Literal[True, "per_leaf"],
) -> tuple[Any, AdamWState, StepInfo]: ...


@calls.explained("adamw_step", aliases=ALIASES, lacking=LACKING)
def adamw_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    config: AdamW,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    implementation: Implementation | None = None,
    state_shardings: AdamWState | None = None,
    offload: bool = False,
    return_info: ReturnInfo = False,
) -> tuple[Any, ...]:
    """Makes one step of AdamW: the whole tree in one operation.

    Call it inside of ``jax.jit`` with params and state donated; then the update is made
    in place. ``AdamW`` has the equations.

    Args:
      params: a pytree of arrays, bfloat16, float16, float32 or float64. Where grads and state
        are None it may hold anything: a function, a key, integers.
      grads: the gradients, built and shaped like params, of any of those dtypes. A leaf
        that is None is frozen: its param and state stay as they are. So is one that is
        ``float0``, as ``jax.grad(..., allow_int=True)`` makes them. What a group of the config
        freezes needs none, and its gradient is not looked at.
      state: from ``adamw_init(params, config)`` or the last step. Of a model that holds other
        things than arrays, init takes the part that is trained, with None for the rest.
      config: the hyperparameters.
      learning_rate: takes the place of the config's for this step: a number or scalar array,
        traced or not, or a schedule. A group with a rate of its own keeps that; one with a
        ``scale`` alone scales this.
      weight_decay: likewise.
      implementation: "xla" (StableHLO on every platform; what ``jax.export`` writes),
        "native" (this platform's own kernel, or an error that says why not), or None: what
        ``ADAMW_XLA_IMPLEMENTATION`` says, else on CPUs the kernel where it was built and XLA
        does not partition the program, and StableHLO elsewhere. The kernel is the faster for
        large leaves; of a thousand leaves of a thousand elements each "xla" is.
      state_shardings: where the state lies, if not beside its params: from
        ``adamw_xla.sharding.state_shardings``, say of ``zero1(mesh, "data", params)``. Each
        device then updates its part of the state; gradients are reduced to it, and new params are
        gathered to where the params were. A state in host memory is fetched whole, and put back,
        but for ``offload``.
      offload: the state lies in host memory, where ``jax.device_put`` moves it with
        ``adamw_xla.sharding.state_shardings(params, config, memory_kind="pinned_host")``. It
        comes to the device a few leaves at a time, and goes back. Donate params and state
        together: JAX may take the state's memory for new params otherwise.
      return_info: True: return a ``StepInfo`` too: norms of gradient, params and update, which
        the update sums while it passes, the rates, and whether it was applied. "per_leaf": with
        the norms of each leaf. False: nothing of it is computed.

    Returns:
      New params and new state, of the structures, shapes and dtypes of the old; and the info,
      where it is asked for.

    Raises:
      TypeError: a leaf's dtype or kind does not fit; the message names its path. Or a rate, or
        what its schedule returns, is no real number.
      ValueError: a tree or shape does not fit, or the state is another config's, or
        ``state_shardings`` are, or are in the device's memory beside ``offload``, or are given
        inside of ``jax.shard_map``; there ``config.axis_names`` does not say whose norm it is, or
        says what types contradict; a rate is no scalar, or negative; ``implementation``, or when
        the program is lowered ``ADAMW_XLA_IMPLEMENTATION``, is neither "xla" nor "native".
      adamw_xla.lowering.NativeUnavailableError: when the program is lowered, "native" was asked
        for and there is no kernel; says why.
      adamw_xla.lowering.UpdateNotDifferentiableError: a derivative through the step was asked
        for; ``adamw_xla.reference.adamw_step`` has it.

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
    made = run_step(
        params,
        grads,
        state,
        config,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        backend=Backend(
            functools.partial(adamw_update, implementation=implementation, offload=offload),
            functools.partial(adamw_sum_of_squares, implementation=implementation),
            offload=offload,
        ),
        state_shardings=state_shardings,
        return_info=return_info,
    )
    return made[: 2 + bool(return_info)]


@calls.explained("adamw_finalize", aliases=ALIASES, lacking=LACKING)
def adamw_finalize(params: Any, state: AdamWState, config: AdamW) -> Any:
    """Returns the moving average as params, at the end of a training with ``use_ema``.

    Args:
      params: the params of the last step.
      state: the state of the last step.
      config: the hyperparameters.

    Returns:
      ``state.ema`` in the dtypes of ``params``: of bfloat16 params rounded to nearest, whatever
      ``master`` is (``state.ema`` itself is float32). A leaf that has no average, since the state
      has None there, is that of ``params``.

    Raises:
      TypeError: ``config``, ``state`` or a leaf of ``params`` is of the wrong kind or dtype.
      ValueError: the state does not fit the params, or is another config's; or the config does
        not set ``use_ema``, so that there is no average.
    """
    misplaced(_FINALIZE, params=params, state=state, config=config)
    check_config(config, _FINALIZE.call)
    check_kind(state, _FINALIZE)
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    columns = check_state(params, treedef, leaves, state, config, words=_FINALIZE)
    if not config.use_ema:
        raise ValueError(
            "adamw_finalize: the config does not set use_ema, so there is no average of the "
            "params; they are what the training made, or train with AdamW(use_ema=True)."
        )
    pairs = zip(leaves, columns["ema"], strict=True)
    return treedef.unflatten(p if e is None else _as_param(e, p) for p, e in pairs)


def _as_param(average: Any, param: Any) -> jax.Array:
    return jnp.asarray(average, jax.dtypes.canonicalize_dtype(param.dtype))


@calls.explained("scale_loss", aliases={}, lacking=LACKING)
def scale_loss(loss: jax.Array, config: AdamW) -> jax.Array:
    """Multiplies a loss by ``config.loss_scale_factor``, where there is one.

    Differentiate the scaled loss; ``adamw_step`` divides its gradients again. It keeps
    small float16 gradients from becoming zero.

    Args:
      loss: an array of any shape, of a real floating dtype.
      config: the hyperparameters.

    Returns:
      The scaled loss, of the shape and dtype of ``loss``.

    Raises:
      TypeError: ``config`` is no ``AdamW``.
    """
    check_config(config, "scale_loss(loss, config)")
    factor = config.loss_scale_factor
    if factor is None:
        return loss
    loss = jnp.asarray(loss)
    return loss * jnp.asarray(factor, loss.dtype)
