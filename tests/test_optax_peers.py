"""100 steps of ``adamw_xla.optax`` beside optax itself, every option in turn.

``peers`` has the problem, and says what agreement is. ``amsgrad`` and the average of the
params have no like in optax; they are compared with the native step, which others judge.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import BETAS, LR, SHAPES, STEPS, WD, Arrays, close, problem
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

Transform = optax.GradientTransformation

RATE = optax.warmup_cosine_decay_schedule(0.0, LR, 10, STEPS)
DECAY = optax.linear_schedule(WD, 0.0, STEPS)
MASK = [False, True, True, False]


def run(transform: Any, params: Arrays, grads: list[Any]) -> tuple[Any, Any]:
    """The params and the state after a step with each of the gradients."""

    @jax.jit
    def step(p: Any, g: Any, s: Any) -> Any:
        updates, s = transform.update(g, s, p)
        return optax.apply_updates(p, updates), s

    new: Any = [jnp.asarray(p) for p in params]
    state = transform.init(new)
    for g in grads:
        new, state = step(new, g, state)
    return new, state


def clip_each(norm: float) -> Transform:
    """Stock optax that clips each leaf by its own norm."""
    clips = {str(i): optax.clip_by_global_norm(norm) for i in range(len(SHAPES))}
    return optax.partition(clips, list(clips))


# Options for both, by optax's own names.
SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "schedule": {"learning_rate": RATE},
    "decay_schedule": {"weight_decay": DECAY},
    "no_decay": {"weight_decay": 0.0},
    "no_momentum": {"b1": 0.0},
    "eps": {"eps": 2.0**-4},
    "eps_root": {"eps_root": 2.0**-6},
    "nesterov": {"nesterov": True},
    "nesterov_and_eps_root": {"nesterov": True, "eps_root": 2.0**-6},
    "nesterov_and_schedules": {"nesterov": True, "learning_rate": RATE, "weight_decay": DECAY},
    "mask": {"mask": MASK},
    "mask_of_arrays": {"mask": [jnp.array(x) for x in MASK]},
    "mask_function": {"mask": lambda params: [p.ndim > 1 for p in params]},
    "mu_dtype": {"mu_dtype": jnp.float32},
}
OPTIONS = {"learning_rate": LR, "weight_decay": WD, "b1": BETAS[0], "b2": BETAS[1]}


@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("clip", [False, True], ids=["alone", "behind_a_clip"])
def test_options_that_optax_has(options: dict[str, Any], clip: bool) -> None:
    params, grads = problem()
    transforms = [factory(**OPTIONS | options) for factory in (axo.adamw, optax.adamw)]
    if clip:
        transforms = [optax.chain(optax.clip_by_global_norm(1.0), t) for t in transforms]
    (ours, state), (theirs, _) = (run(t, params, grads) for t in transforms)
    close(ours, theirs)
    assert optax.tree_utils.tree_get(state, "count") == STEPS


def test_nadamw() -> None:
    params, grads = problem()
    ours, _ = run(axo.adamw(**OPTIONS, nesterov=True), params, grads)
    theirs, _ = run(optax.nadamw(**OPTIONS), params, grads)
    close(ours, theirs)


stock = functools.partial(optax.adamw, **OPTIONS)
# Our option -> how stock optax says it.
OURS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "clipnorm": ({"clipnorm": 0.5}, lambda: optax.chain(clip_each(0.5), stock())),
    "clipvalue": ({"clipvalue": 0.25}, lambda: optax.chain(optax.clip(0.25), stock())),
    "global_clipnorm": (
        {"global_clipnorm": 1.0},
        lambda: optax.chain(optax.clip_by_global_norm(1.0), stock()),
    ),
    "loss_scale": (
        {"loss_scale_factor": 128.0},
        lambda: optax.chain(optax.scale(1 / 128), stock()),
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 4},
        lambda: optax.MultiSteps(stock(), 4).gradient_transformation(),
    ),
    "skip_nonfinite": ({"skip_nonfinite": True}, lambda: optax.apply_if_finite(stock(), STEPS)),
}


@pytest.mark.parametrize(("options", "theirs"), OURS.values(), ids=OURS)
def test_options_that_optax_has_wrappers_for(
    options: dict[str, Any], theirs: Callable[[], Any]
) -> None:
    params, grads = problem()
    if "skip_nonfinite" in options:
        grads[10][2][0, 1] = np.nan
        grads[11][1][3] = np.inf
    ours, _ = run(axo.adamw(**OPTIONS, **options), params, grads)
    close(ours, run(theirs(), params, grads)[0])


def test_our_clip_in_the_place_of_optax() -> None:
    params, grads = problem()
    ours, theirs = (
        run(optax.chain(clip(1.0), stock()), params, grads)[0]
        for clip in (axo.clip_by_global_norm, optax.clip_by_global_norm)
    )
    close(ours, theirs)


NATIVE: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "ema": {"use_ema": True, "ema_momentum": 0.875},
    "ema_overwrite": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 7},
    "amsgrad_and_ema": {"amsgrad": True, "use_ema": True},
}


@pytest.mark.parametrize("options", NATIVE.values(), ids=NATIVE)
def test_options_that_only_we_have(options: dict[str, Any]) -> None:
    params, grads = problem()
    ours, state = run(axo.adamw(**OPTIONS, **options), params, grads)
    config = ax.AdamW(LR, WD, *BETAS, epsilon=1e-8, epsilon_hat=False, **options)
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config))
    native: Any = [jnp.asarray(p) for p in params]
    native_state = ax.adamw_init(native, config)
    for g in grads:
        native, native_state = step(native, g, native_state)
    close(ours, native)
    for field in ("m", "v", "v_max", "ema"):
        kept, native_kept = (getattr(s, field) for s in (state.native(), native_state))
        assert (kept is None) == (native_kept is None)
        close(kept or [], native_kept or [])


def test_amsgrad_has_the_convention_of_torch_and_keras_and_not_that_of_optax() -> None:
    """Large gradients first: then the maximum matters, and what it is taken of does."""
    params, grads = problem(20)
    grads = [[x / (1 + k) for x in g] for k, g in enumerate(grads)]
    options = {"learning_rate": LR, "b1": BETAS[0], "b2": BETAS[1]}
    ours, _ = run(axo.adamw(**options, weight_decay=0.0, amsgrad=True), params, grads)
    theirs, _ = run(optax.amsgrad(**options), params, grads)
    with pytest.raises(AssertionError, match="relative"):
        close(ours, theirs, 1e-3)
