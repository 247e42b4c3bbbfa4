"""100 steps beside keras.optimizers.AdamW (JAX backend), optax.adamw and torch's AdamW.

All see the same gradients. ``peers`` has the problem, and says what agreement is.
optax with amsgrad has another convention (the maximum of the bias-corrected v), and is
compared without.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import oracle
from peers import B1, B2, BETAS, CLOSE, LR, SHAPES, STEPS, WD, Arrays, close, problem
import pytest

import adamw_xla as ax

KERAS_BETAS = {"beta_1": B1, "beta_2": B2}


def run_ours(params: Arrays, grads: list[Arrays], config: ax.AdamW) -> tuple[Any, ax.AdamWState]:
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config))
    ours = [jnp.asarray(p) for p in params]
    state = ax.adamw_init(ours, config)
    for g in grads:
        ours, state = step(
            ours, [jnp.asarray(x, p.dtype) for x, p in zip(g, ours, strict=True)], state
        )
    return ours, state


def run_keras(params: Arrays, grads: list[Arrays], dtype: str = "float32", **options: Any) -> Any:
    """Final params, and the moving averages where there are some."""
    exclude = options.pop("exclude", None)
    variables = [keras.Variable(p, dtype=dtype, name=f"leaf{i}") for i, p in enumerate(params)]
    optimizer = keras.optimizers.AdamW(**options)
    if exclude:
        optimizer.exclude_from_weight_decay(var_names=exclude)
    optimizer.build(variables)
    values, state = [v.value for v in variables], [v.value for v in optimizer.variables]
    step = jax.jit(lambda s, g, p: optimizer.stateless_apply(s, g, p))
    for g in grads:
        values, state = step(state, [jnp.asarray(x, dtype) for x in g], values)
    found = dict(zip((v.path for v in optimizer.variables), state, strict=True))
    return values, [x for path, x in found.items() if "average" in path]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.25},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "ema": {"use_ema": True, "ema_momentum": 0.875},
    "ema_overwrite": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 7},
    "loss_scale": {"loss_scale_factor": 128.0},
    "accumulation": {"gradient_accumulation_steps": 4},
    "accumulation_and_clip": {"gradient_accumulation_steps": 4, "global_clipnorm": 0.5},
    "amsgrad_and_ema": {"amsgrad": True, "use_ema": True, "ema_momentum": 0.875},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_keras(options: dict[str, Any]) -> None:
    options = {"learning_rate": LR, "weight_decay": WD, **KERAS_BETAS} | options
    params, grads = problem()
    theirs, averages = run_keras(params, grads, **options)
    ours, state = run_ours(params, grads, ax.AdamW(**options))
    close(ours, theirs)
    if options.get("use_ema"):
        close(state.ema, averages)


def test_keras_schedule_and_excluded_leaves() -> None:
    schedule = keras.optimizers.schedules.CosineDecay(LR, 80, warmup_target=4 * LR, warmup_steps=9)
    params, grads = problem()
    options = {"learning_rate": schedule, "weight_decay": WD, **KERAS_BETAS}
    theirs, _ = run_keras(params, grads, **options, exclude=["leaf1"])
    mask = [True, False, True, True]
    ours, _ = run_ours(params, grads, ax.AdamW(schedule, WD, *BETAS, weight_decay_mask=mask))
    close(ours, theirs)


@pytest.mark.parametrize("schedule", [False, True])
def test_optax(schedule: bool) -> None:
    rate = optax.warmup_cosine_decay_schedule(0.0, LR, 10, STEPS) if schedule else LR
    params, grads = problem()
    transform = optax.adamw(rate, *BETAS, weight_decay=WD, eps=1e-8)
    theirs: Any = [jnp.asarray(p) for p in params]
    their_state = transform.init(theirs)

    @jax.jit
    def their_step(p: Any, g: Any, s: Any) -> Any:
        updates, s = transform.update(g, s, p)
        return optax.apply_updates(p, updates), s

    for g in grads:
        theirs, their_state = their_step(theirs, g, their_state)
    config = ax.AdamW(rate, WD, *BETAS, epsilon=1e-8, epsilon_hat=False)
    close(run_ours(params, grads, config)[0], theirs)


def test_optax_clip_and_mask() -> None:
    mask = [False, True, True, False]
    params, grads = problem()
    transform = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(LR, *BETAS, weight_decay=WD, eps=1e-8, mask=mask),
    )
    theirs: Any = [jnp.asarray(p) for p in params]
    their_state = transform.init(theirs)
    for g in grads:
        updates, their_state = jax.jit(transform.update)(g, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    config = ax.AdamW(
        LR, WD, *BETAS, epsilon=1e-8, epsilon_hat=False, global_clipnorm=1.0, weight_decay_mask=mask
    )
    close(run_ours(params, grads, config)[0], theirs)


def run_torch(params: Arrays, grads: list[Arrays], **options: Any) -> Arrays:
    torch = pytest.importorskip("torch", reason="pip finds no CPU build of it for this Python")
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=LR, betas=BETAS, weight_decay=WD, eps=1e-8, **options)
    for g in grads:
        for p, x in zip(theirs, g, strict=True):
            p.grad = torch.tensor(x)
        optimizer.step()
    return [p.detach().numpy() for p in theirs]


@pytest.mark.slow
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_torch(amsgrad: bool, foreach: bool) -> None:
    params, grads = problem()
    theirs = run_torch(params, grads, amsgrad=amsgrad, foreach=foreach)
    config = ax.AdamW(LR, WD, *BETAS, epsilon=1e-8, epsilon_hat=False, amsgrad=amsgrad)
    close(run_ours(params, grads, config)[0], theirs)


def wide(leaves: Arrays) -> Arrays:
    return [x.astype(np.float64) for x in leaves]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_torch_in_float64(amsgrad: bool) -> None:
    params, grads = problem()
    theirs = run_torch(wide(params), [wide(g) for g in grads], amsgrad=amsgrad)
    config = ax.AdamW(LR, WD, *BETAS, epsilon=1e-8, epsilon_hat=False, amsgrad=amsgrad)
    close(run_ours(params, grads, config)[0], theirs)
    with jax.enable_x64(True):
        ours, _ = run_ours(wide(params), [wide(g) for g in grads], config)
    assert all(p.dtype == np.float64 for p in ours)
    close(ours, theirs, 1e-13)


def test_the_oracle_with_default_rates() -> None:
    params, grads = problem()
    exact: Any = [p.astype(np.float64) for p in params]
    state = oracle.init(exact)
    for g in grads:
        exact, state, _ = oracle.step(exact, list(g), state, oracle.Options())
    ours, ours_state = run_ours(params, grads, ax.AdamW())
    close(ours, exact)
    close(ours_state.m, state.m)
    # float32(0.999) is 1.3e-8 too large, and each step multiplies v by it.
    too_large = float(np.float32(0.999)) / 0.999 - 1
    close(ours_state.v, state.v, CLOSE + STEPS * too_large)


@pytest.mark.slow
def test_bfloat16_trains_here_and_not_in_stock_keras() -> None:
    params, _ = problem()
    start = [np.asarray(jnp.asarray(p, jnp.bfloat16)) for p in params]
    grads = [[np.ones(shape, np.float32) for shape in SHAPES]] * 50
    theirs, _ = run_keras(start, grads, dtype="bfloat16", learning_rate=0.01)
    ours, state = run_ours(start, grads, ax.AdamW(learning_rate=0.01))
    for before, stock, after, m in zip(start, theirs, ours, state.m, strict=True):
        np.testing.assert_array_equal(np.asarray(stock), before)
        assert after.dtype == jnp.bfloat16
        assert m.dtype == jnp.float32
        moved = np.asarray(before, np.float32) - np.asarray(after, np.float32)
        assert np.all(moved > 0.25)


@pytest.mark.slow
def test_the_average_rests_between_updates_here_and_not_in_stock_keras() -> None:
    """With 4 micro-steps an update, stock Keras on JAX averages at each of them."""
    options = {"learning_rate": 0.1, "use_ema": True, "ema_momentum": 0.5, **KERAS_BETAS}
    params, grads = problem(steps=11)  # two updates and three more calls
    config = ax.AdamW(**options, gradient_accumulation_steps=4)
    _, after_update = run_ours(params, grads[:8], config)
    ours, state = run_ours(params, grads, config)
    close(state.ema, after_update.ema)
    theirs, stock = run_keras(params, grads, **options, gradient_accumulation_steps=4)
    close(ours, theirs)
    _, before = run_keras(params, grads[:8], **options, gradient_accumulation_steps=4)
    assert any(np.max(np.abs(a - b)) > 1e-3 for a, b in zip(stock, before, strict=True))


def test_a_float16_norm_above_255_clips_here_and_vanishes_in_stock_keras() -> None:
    start = [np.zeros(4, np.float16)]
    grads = [[np.full(4, 1000.0, np.float16)]]
    options = {"learning_rate": 0.125, "weight_decay": 0.0, "clipnorm": 1.0, "epsilon": 1e-3}
    theirs, _ = run_keras(start, grads, dtype="float16", **options)
    _, state = run_ours(start, grads, ax.AdamW(**options))
    np.testing.assert_allclose(np.asarray(state.m[0]), 0.1 * 0.5, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(theirs[0]), start[0])
