"""What the options do: schedules, overrides, skipping, accumulation, average, loss scale."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from comparing import close, same
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from runs import run, tree

import adamw_xla as ax
from adamw_xla._inside import clipping
from adamw_xla._inside.run import run_step
from adamw_xla._inside.update import Backend, do_if
import adamw_xla.optax as axo
from adamw_xla_lowering import Squares, adamw_sum_of_squares, adamw_update

# ----------------------------------------------------------------- schedules, overrides

SCHEDULES = {
    "optax": optax.exponential_decay(0.1, 2, 0.5),
    "keras": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5),
    "callable": lambda count: 0.1 * 0.5 ** (count / 2),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(schedule: Any) -> None:
    scheduled, _ = run(ax.AdamW(learning_rate=schedule, weight_decay=0.5), 4)
    params = tree()
    state = ax.adamw_init(params, ax.AdamW())
    for k in range(4):
        config = ax.AdamW(learning_rate=0.1 * 0.5 ** (k / 2), weight_decay=0.5)
        params, state = ax.adamw_step(params, tree(k + 1), state, config)
    close(scheduled, params)


def test_a_schedule_counts_calls_under_accumulation() -> None:
    seen = []

    def schedule(count: Any) -> Any:
        jax.debug.callback(lambda c: seen.append(int(c)), count)
        return 0.1

    run(ax.AdamW(learning_rate=schedule, gradient_accumulation_steps=2), 5)
    jax.effects_barrier()
    assert sorted(set(seen)) == [0, 1, 2, 3, 4]


def test_a_decay_schedule() -> None:
    scheduled, _ = run(ax.AdamW(weight_decay=lambda count: jnp.where(count < 1, 0.5, 0.0)))
    close(scheduled, run(ax.AdamW(weight_decay=0.5))[0])


@pytest.mark.parametrize("value", [0.25, np.float32(0.25), jnp.float32(0.25), lambda count: 0.25])
def test_overrides(value: Any) -> None:
    close(run(ax.AdamW(), learning_rate=value)[0], run(ax.AdamW(learning_rate=0.25))[0])
    close(run(ax.AdamW(), weight_decay=value)[0], run(ax.AdamW(weight_decay=0.25))[0])


@pytest.mark.parametrize("rate", [1, np.float32(1), np.int64(1), jnp.float32(1), jnp.bfloat16(1)])
def test_any_real_scalar_is_a_rate(rate: Any) -> None:
    close(run(ax.AdamW(learning_rate=rate))[0], run(ax.AdamW(learning_rate=1.0))[0])


def test_a_rate_without_arguments_is_called_as_in_keras() -> None:
    called: list[None] = []

    def rate() -> float:
        called.append(None)
        return 0.25

    plain = run(ax.AdamW(learning_rate=0.25, weight_decay=0.25))[0]
    same(run(ax.AdamW(learning_rate=rate, weight_decay=rate))[0], plain)
    same(run(ax.AdamW(), learning_rate=rate, weight_decay=rate)[0], plain)
    grads = tree(1)
    ours, wanted = (axo.adamw(r) for r in (rate, 0.25))
    same(*(a.update(grads, a.init(grads), grads)[0] for a in (ours, wanted)))
    assert called


# --------------------------------------------------------------------------------- clipping


@pytest.mark.slow
@pytest.mark.parametrize("bound", [1.7, 0.3, 3.0, 1e-3, 1e4])
@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
def test_below_the_bound_a_clip_changes_no_bit(clip: str, bound: float, traced: bool) -> None:
    config, unclipped = ax.AdamW(**{clip: bound}), ax.AdamW()
    grads = jax.tree.map(lambda g: g * (bound / 16), tree(1))

    def step(config: ax.AdamW, params: Any, state: Any) -> Any:
        return ax.adamw_step(params, grads, state, config)

    state = ax.adamw_init(tree(), config)
    if traced:
        results = [jax.jit(step)(c, tree(), state) for c in (config, unclipped)]
    else:
        results = [jax.jit(functools.partial(step, c))(tree(), state) for c in (config, unclipped)]
    same(*results)


def test_below_any_bound_the_factors_are_one() -> None:
    bounds = jnp.asarray(np.random.default_rng(0).uniform(0.01, 10.0, 500), jnp.float32)
    for fraction in (0.0, 0.5, 1.0):
        squares = Squares(jnp.square(fraction * bounds), jnp.ones_like(bounds))
        # The square is rounded, and its root with it: half a unit above is above.
        bounded = jnp.maximum(bounds, jnp.sqrt(squares.sum))
        for factors in (clipping.global_factors, clipping.factors):
            np.testing.assert_array_equal(factors(squares, bounded), 1.0)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_a_gradient_whose_squares_overflow_is_clipped(clip: str) -> None:
    params = {"w": jnp.ones(3)}
    grads = {"w": jnp.full(3, 1e20)}
    for skip in (False, True):
        config = ax.AdamW(**{clip: 1.0}, skip_nonfinite=skip)  # type: ignore[arg-type]
        _, state = ax.adamw_step(params, grads, ax.adamw_init(params, config), config)
        np.testing.assert_allclose(state.m["w"], 0.1 / np.sqrt(3), rtol=1e-6)
        np.testing.assert_allclose(state.v["w"], 0.001 / 3, rtol=1e-6)
        assert (state.count, state.skipped) == (1, 0 if skip else None)


# --------------------------------------------- skipping, accumulation, average, loss scale


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "extra", [{}, {"global_clipnorm": 1.0}, {"clipnorm": 1.0}, {"clipvalue": 1.0}]
)
def test_skip_leaves_every_bit(bad: float, extra: dict[str, Any]) -> None:
    config = ax.AdamW(skip_nonfinite=True, amsgrad=True, use_ema=True, **extra)
    params, state = run(config, 2)
    grads = tree(9)
    grads["b"][0] = grads["b"][0].at[1].set(bad)
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config))
    new, new_state = step(params, grads, state)
    same(new, params)
    same(dataclasses.replace(new_state, skipped=state.skipped), state)
    assert int(new_state.skipped) == 1
    after, after_state = step(new, tree(9), new_state)
    same(after, step(params, tree(9), state)[0])
    assert (int(after_state.count), int(after_state.skipped)) == (3, 1)
    text = step.lower(params, grads, state).compile().as_text()
    assert not any(word in text for word in ("callback", "outfeed", "infeed", "send("))


def test_skip_under_accumulation() -> None:
    config = ax.AdamW(skip_nonfinite=True, gradient_accumulation_steps=2, use_ema=True)
    params, state = run(config, 3)
    bad = jax.tree.map(lambda g: g * jnp.nan, tree(9))
    new, new_state = ax.adamw_step(params, bad, state, config)
    same(new, params)
    same(dataclasses.replace(new_state, skipped=state.skipped), state)
    assert int(new_state.skipped) == 1


def test_without_skip_a_bad_gradient_goes_through() -> None:
    params, grads = tree(), jax.tree.map(lambda g: g * jnp.nan, tree())
    config = ax.AdamW()
    new, _ = ax.adamw_step(params, grads, ax.adamw_init(params, config), config)
    assert bool(jnp.all(jnp.isnan(new["w"])))


def test_accumulation_is_one_step_with_the_mean() -> None:
    config = ax.AdamW(gradient_accumulation_steps=4, clipvalue=0.1)
    between, state = run(config, 3)
    same(between, tree())
    assert (int(state.count), int(state.micro_step)) == (0, 3)
    params, state = run(config, 4)
    mean = jax.tree.map(lambda *g: sum(g) / 4, *(tree(k) for k in (1, 2, 3, 4)))
    one = ax.AdamW(clipvalue=0.1)
    close(params, ax.adamw_step(tree(), mean, ax.adamw_init(tree(), one), one)[0])
    assert (int(state.count), int(state.micro_step)) == (1, 0)
    assert all(not np.any(x) for x in jax.tree.leaves(state.accumulated))


@pytest.mark.parametrize(
    ("before", "calls", "after"), [(4, 3, 2), (4, 2, 2), (3, 2, 2), (2, 1, 4), (4, 1, 2)]
)
def test_other_accumulation_steps_in_mid_accumulation(before: int, calls: int, after: int) -> None:
    """The mean is of what was summed; fewer steps than that are done at the next call."""
    params, state = run(ax.AdamW(gradient_accumulation_steps=before), calls)
    config = ax.AdamW(gradient_accumulation_steps=after)
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config))
    total = max(after, calls + 1)
    for k in range(calls, total):
        same(params, tree())
        params, state = step(params, tree(k + 1), state)
    mean = jax.tree.map(lambda *g: sum(g) / total, *(tree(k + 1) for k in range(total)))
    want, of_mean = ax.adamw_step(tree(), mean, ax.adamw_init(tree(), ax.AdamW()), ax.AdamW())
    close((params, state.m, state.v), (want, of_mean.m, of_mean.v))
    assert (int(state.count), int(state.micro_step)) == (1, 0)


def test_finalize() -> None:
    config = ax.AdamW(use_ema=True, ema_momentum=0.5, learning_rate=0.1)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree())
    params, state = run(config, 3, params)
    final = ax.adamw_finalize(params, state, config)
    for p, e in zip(jax.tree.leaves(final), jax.tree.leaves(state.ema), strict=True):
        assert p.dtype == jnp.bfloat16
        np.testing.assert_array_equal(p, e.astype(jnp.bfloat16))
    assert not np.array_equal(final["w"], params["w"])


def test_loss_scale() -> None:
    scaled, plain = ax.AdamW(loss_scale_factor=1024.0), ax.AdamW()
    loss = jnp.float16(0.5)
    assert ax.scale_loss(loss, scaled) == 512
    assert ax.scale_loss(loss, scaled).dtype == jnp.float16
    assert ax.scale_loss(loss, plain) is loss
    params = tree()
    grads = jax.tree.map(lambda g: 1024 * g, tree(1))
    new, _ = ax.adamw_step(params, grads, ax.adamw_init(params, scaled), scaled)
    close(new, run(plain)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True, "epsilon_root": 1e-4},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        {"skip_nonfinite": True},
        {"gradient_accumulation_steps": 2, "skip_nonfinite": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["primitive", "reference"])
def test_changes_add_up_to_the_step(options: dict[str, Any], backend: str) -> None:
    """Added in float32 and rounded last, the changes are the step; a frozen leaf has none."""
    config = ax.AdamW(learning_rate=0.1, **options)
    params: Any = {
        "a": jnp.linspace(-1, 1, 7),
        "b": jnp.linspace(1, 2, 5).astype(jnp.bfloat16),
        "frozen": jnp.ones(2),
    }
    backends = {
        "primitive": Backend(adamw_update, adamw_sum_of_squares, do_if),
        "reference": Backend(ax.reference.adamw_update, ax.reference.sum_of_squares, do_if),
    }
    step = functools.partial(
        run_step, learning_rate=None, weight_decay=None, backend=backends[backend]
    )
    state = ax.adamw_init(params, config)
    for k in range(5):
        bad = jnp.nan if k == 3 and config.skip_nonfinite else 0.5 * (k - 1)
        grads = {"a": jnp.sin(params["a"]) + bad, "b": params["b"] * 0.5, "frozen": None}
        want, new_state = ax.adamw_step(params, grads, state, config)
        updates, delta_state, _ = step(params, grads, state, config, delta=True)
        assert updates["frozen"] is None
        assert {k: updates[k].dtype.name for k in "ab"} == {"a": "float32", "b": "float32"}
        for name in "ab":
            p = params[name]
            got = (p.astype(jnp.float32) + updates[name]).astype(p.dtype)
            np.testing.assert_allclose(
                np.asarray(got, np.float64), np.asarray(want[name], np.float64), rtol=2e-6
            )
        assert_states_agree(new_state, delta_state)
        params, state = want, new_state


def assert_states_agree(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6, atol=1e-7)
