"""16-bit params through optax: what is rounded once, what twice, and what needs which."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

RATE = 0.003
CONFIG = ax.AdamW(RATE, 1e-4, epsilon=1e-8, epsilon_hat=False)
STEPS = 20


def random(dtype: Any, seed: int, size: int = 4096) -> Any:
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=size), dtype)}


def train(solver: Any, dtype: Any, jit: Any = jax.jit, steps: int = STEPS) -> Any:
    def step(p: Any, g: Any, s: Any) -> Any:
        updates, s = solver.update(g, s, p)
        return optax.apply_updates(p, updates), s

    params = random(dtype, 0)
    state = solver.init(params)
    for k in range(steps):
        params, state = jit(step)(params, random(dtype, k + 1), state)
    return params["w"], state


def train_natively(dtype: Any) -> Any:
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, CONFIG, implementation="xla"))
    params = random(dtype, 0)
    state = ax.adamw_init(params, CONFIG)
    for k in range(STEPS):
        params, state = step(params, random(dtype, k + 1), state)
    return params["w"], state


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_params_are_rounded_once_as_natively(dtype: str, jit: Any) -> None:
    """Bit for bit, with the sum compiled together with the update or by itself."""
    params, state = train(axo.adamw(RATE), dtype, jit)
    native, native_state = train_natively(dtype)
    np.testing.assert_array_equal(np.asarray(params), np.asarray(native))
    np.testing.assert_array_equal(np.asarray(state.nu["w"]), np.asarray(native_state.v["w"]))


def test_updates_like_gradients_are_rounded_twice() -> None:
    """The sum of a rounded update, outside of the program that rounds it, is another."""
    ours, _ = train(axo.adamw(RATE, updates_like_grads=True), "bfloat16", lambda f: f)
    native, _ = train_natively("bfloat16")
    share = np.mean(np.asarray(ours) != np.asarray(native))
    assert 0 < share < 0.2


COND = {
    "apply_if_finite": lambda t: optax.apply_if_finite(t, 2),
    "conditionally_transform": lambda t: optax.conditionally_transform(t, lambda k: k >= 0),
    "conditionally_mask": lambda t: optax.conditionally_mask(t, lambda k: k >= 0),
}


@pytest.mark.parametrize("wrap", COND.values(), ids=COND)
def test_wrappers_that_need_updates_like_gradients(wrap: Any) -> None:
    solver = axo.adamw(RATE, updates_like_grads=True)
    wrapped, _ = train(wrap(solver), "bfloat16", steps=4)
    np.testing.assert_array_equal(wrapped, train(solver, "bfloat16", steps=4)[0])
    with pytest.raises(TypeError, match=r"float32.*bfloat16"):
        train(wrap(axo.adamw(RATE)), "bfloat16")


@pytest.mark.parametrize("skip", [None, optax.skip_not_finite])
def test_multi_steps_needs_nothing(skip: Any) -> None:
    solver = optax.MultiSteps(axo.adamw(RATE), 4, should_skip_update_fn=skip)
    params, state = train(solver, "bfloat16", steps=8)
    assert params.dtype == jnp.bfloat16
    assert state.inner_opt_state.count == 2


def test_the_second_moment_decays_here_and_not_in_optax() -> None:
    """In bfloat16, 0.999 of a number is that number."""
    params, grads = random("bfloat16", 0), random("bfloat16", 1)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    kept = {}
    for adamw in (axo.adamw, optax.adamw):
        solver = adamw(RATE)
        _, state = solver.update(grads, solver.init(params), params)
        before = optax.tree_utils.tree_get(state, "nu")["w"]
        for _ in range(100):
            _, state = solver.update(zeros, state, params)
        after = optax.tree_utils.tree_get(state, "nu")["w"]
        kept[adamw] = float(jnp.sum(after) / jnp.sum(before))
    assert kept[axo.adamw] == pytest.approx(0.999**100, rel=1e-3)
    assert kept[optax.adamw] == 1


def test_injected_betas_need_float32() -> None:
    """``inject_hyperparams`` makes them of the params' dtype, and 0.999 becomes 1."""
    inject = optax.inject_hyperparams
    plain, _ = train(axo.adamw(RATE), "bfloat16", steps=2)
    good, _ = train(inject(axo.adamw, hyperparam_dtype=jnp.float32)(RATE), "bfloat16", steps=2)
    np.testing.assert_array_equal(plain, good)
    bad, _ = train(inject(optax.adamw)(RATE), "bfloat16", steps=2)
    assert np.all(np.isnan(np.asarray(bad, np.float32)))
    with pytest.raises(ValueError, match=r"b2 .* got 1.0.*hyperparam_dtype"):
        train(inject(axo.adamw)(RATE), "bfloat16")
