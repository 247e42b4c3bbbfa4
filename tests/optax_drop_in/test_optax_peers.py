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
import oracle
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
}
OPTIONS = {"learning_rate": LR, "weight_decay": WD, "b1": BETAS[0], "b2": BETAS[1]}


BEHIND_A_CLIP = pytest.param(True, id="behind_a_clip", marks=pytest.mark.slow)


@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("clip", [pytest.param(False, id="alone"), BEHIND_A_CLIP])
def test_options_that_optax_has(options: dict[str, Any], clip: bool) -> None:
    params, grads = problem()
    transforms = [factory(**OPTIONS | options) for factory in (axo.adamw, optax.adamw)]
    if clip:
        transforms = [optax.chain(optax.clip_by_global_norm(1.0), t) for t in transforms]
    (ours, state), (theirs, _) = (run(t, params, grads) for t in transforms)
    close(ours, theirs)
    assert optax.tree_utils.tree_get(state, "count") == STEPS


def far(ours: Any, theirs: Any) -> float:
    """The largest difference in a leaf, relative to its largest element."""
    wide = ([np.asarray(x, np.float64) for x in leaves] for leaves in (ours, theirs))
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in zip(*wide, strict=True))


def test_with_default_betas_float64_is_nearer_to_ours() -> None:
    """optax takes powers of the float32 next to 0.999, and 1 - b2**t is off by 1e-5 of itself."""
    params, grads = problem()
    options = {"learning_rate": LR, "weight_decay": WD}
    ours, theirs = (run(f(**options), params, grads)[0] for f in (axo.adamw, optax.adamw))
    exact = [p.astype(np.float64) for p in params]
    state = oracle.init(exact)
    config = oracle.Options(LR, WD, 0.9, 0.999, epsilon=1e-8, epsilon_hat=False)
    for g in grads:
        exact, state, _ = oracle.step(exact, [x.astype(np.float64) for x in g], state, config)
    assert far(ours, exact) <= 1e-6 < far(theirs, exact) <= 1e-5
    assert far(ours, theirs) <= 1e-5


BF16 = {"mu_dtype": jnp.bfloat16}
UNIT = 2.0**-8  # what rounding to bfloat16 may move a number, relatively


@pytest.mark.parametrize("more", [{}, {"nesterov": True}], ids=["plain", "nesterov"])
def test_bfloat16_moments_with_a_beta_that_bfloat16_has(more: dict[str, Any]) -> None:
    """The same roundings, but where the unrounded moments lie on both sides of a midpoint.

    One such moment is 2 UNIT off, and is forgotten in 1 / (1 - b1) steps: room for one.
    """
    params, grads = problem()
    (ours, state), (theirs, stock_state) = (
        run(f(**OPTIONS, **BF16, **more), params, grads) for f in (axo.adamw, optax.adamw)
    )
    one = LR * 2 * UNIT / (1 - BETAS[0])
    close(ours, theirs, 1e-6 + one / min(np.max(np.abs(x)) for x in theirs))
    assert {x.dtype.name for x in [*state.mu, *stock_state[0].mu]} == {"bfloat16"}


@pytest.mark.parametrize("more", [{}, {"nesterov": True}], ids=["plain", "nesterov"])
def test_bfloat16_moments_with_the_default_betas(more: dict[str, Any]) -> None:
    """Here b1 stays float32: m is off by one rounding a step, each forgotten at rate 1 - b1.

    optax multiplies by the bfloat16 next to 0.9, too, which makes m 1.5% smaller.
    """
    params, grads = problem()
    options = {"learning_rate": LR, "weight_decay": WD, **more}
    exact = run(axo.adamw(**options), params, grads)[0]
    ours, theirs = (run(f(**options, **BF16), params, grads)[0] for f in (axo.adamw, optax.adamw))
    roundings = UNIT / (1 - 0.9)
    beta = (0.9 - float(jnp.bfloat16(0.9))) / (1 - 0.9)
    assert far(ours, exact) <= roundings
    assert far(ours, theirs) <= beta + 2 * roundings
    assert far(ours, exact) < far(theirs, exact) / 2


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


@pytest.mark.slow
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
