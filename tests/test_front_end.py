"""What a caller of the front end meets: options, trees, schedules, overrides, state.

Refused calls are in ``test_refusals.py``.
"""

from __future__ import annotations

import dataclasses
import doctest
import functools
import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import adamw_xla as ax

FULL = ax.AdamW(
    amsgrad=True,
    use_ema=True,
    ema_overwrite_frequency=2,
    gradient_accumulation_steps=2,
    skip_nonfinite=True,
    loss_scale_factor=8.0,
)


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32),
        "b": [jnp.asarray(rng.standard_normal(2), jnp.float32), jnp.float32(0.5)],
    }


def run(config: ax.AdamW, calls: int = 1, params: Any = None, **overrides: Any) -> Any:
    params = tree() if params is None else params
    state = ax.adamw_init(params, config)
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config, **overrides))
    for k in range(calls):
        params, state = step(params, tree(k + 1), state)
    return params, state


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------- config and state


def test_names_and_defaults_are_those_of_keras() -> None:
    stock = inspect.signature(keras.optimizers.AdamW).parameters
    ours = inspect.signature(ax.AdamW).parameters
    keras_only = {name for name in stock if stock[name].kind is inspect.Parameter.VAR_KEYWORD}
    names = [name for name in stock if name not in keras_only]
    assert list(ours)[: len(names)] == names
    names.remove("name")  # None there: Keras makes one up
    assert {n: ours[n].default for n in names} == {n: stock[n].default for n in names}
    keyword_only = {f.name for f in dataclasses.fields(ax.AdamW) if f.kw_only}
    assert keyword_only == {"epsilon_hat", "weight_decay_mask", "skip_nonfinite", "state_dtype"}


@pytest.mark.parametrize(
    "config",
    [
        ax.AdamW(),
        FULL,
        ax.AdamW(learning_rate=abs, weight_decay_mask={"w": True, "b": [False] * 2}),
    ],
)
def test_config_round_trip(config: ax.AdamW) -> None:
    leaves, treedef = jax.tree.flatten(config)
    again = treedef.unflatten(leaves)
    assert again == config
    assert hash(treedef) == hash(jax.tree.structure(again))
    assert all(isinstance(x, float | int) for x in leaves)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.learning_rate = 1.0  # type: ignore[misc]


def test_state_round_trip_and_shape() -> None:
    params = tree()
    state = ax.adamw_init(params, FULL)
    leaves, treedef = jax.tree.flatten(state)
    same(treedef.unflatten(leaves), state)
    for field in ("m", "v", "v_max", "ema", "accumulated"):
        assert jax.tree.structure(getattr(state, field)) == jax.tree.structure(params)
    same(state.ema, params)
    plain = ax.adamw_init(params, ax.AdamW())
    unused = (plain.v_max, plain.ema, plain.accumulated, plain.micro_step, plain.skipped)
    assert unused == (None,) * 5


def test_eval_shape_and_jit_of_init() -> None:
    params = tree()
    init = functools.partial(ax.adamw_init, config=FULL)
    shapes, real = jax.eval_shape(init, params), jax.jit(init)(params)
    assert jax.tree.structure(shapes) == jax.tree.structure(real)
    for s, x in zip(jax.tree.leaves(shapes), jax.tree.leaves(real), strict=True):
        assert (s.shape, s.dtype) == (x.shape, x.dtype)
    abstract = jax.eval_shape(lambda p: ax.adamw_step(p, p, init(p), FULL), params)
    assert jax.tree.structure(abstract[1]) == jax.tree.structure(real)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_state_is_float32_and_params_keep_their_dtype(dtype: str) -> None:
    params = {"x": jnp.ones(3, dtype)}
    state = ax.adamw_init(params, FULL)
    new, state = ax.adamw_step(params, params, state, FULL)
    assert new["x"].dtype == dtype
    floats = [state.m, state.v, state.v_max, state.ema, state.accumulated]
    assert {leaf.dtype for leaf in jax.tree.leaves(floats)} == {np.dtype("float32")}


def test_a_16_bit_state_is_for_m_alone() -> None:
    config = ax.AdamW(state_dtype=jnp.bfloat16, amsgrad=True)
    params, state = run(config, 3)
    assert {x.dtype for x in jax.tree.leaves(state.m)} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((state.v, state.v_max))} == {np.dtype("float32")}
    exact, _ = run(ax.AdamW(amsgrad=True), 3)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, atol=3 * 0.001 * 2**-7)


# ------------------------------------------------------------------------ kinds of trees


@pytest.mark.parametrize("config", [ax.AdamW(learning_rate=0.1, amsgrad=True, use_ema=True), FULL])
def test_frozen_leaves_stay_with_their_state(config: ax.AdamW) -> None:
    params = tree()
    state = ax.adamw_init(params, config)
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config))
    for k in range(4):
        full = tree(k)
        params_before, state_before = params, state
        frozen = k % 2 == 0
        grads = {"w": None, "b": full["b"]} if frozen else full
        params, state = step(params, grads, state)
        for field in ("m", "v", "v_max", "ema", "accumulated"):
            now, before = getattr(state, field), getattr(state_before, field)
            if now is not None and frozen:
                same(now["w"], before["w"])
        if frozen:
            same(params["w"], params_before["w"])
    assert not np.array_equal(params["b"][0], tree()["b"][0])


def test_freezing_one_leaf_leaves_the_others_alone() -> None:
    config = ax.AdamW(weight_decay_mask={"w": True, "b": False})
    params, grads = tree(), tree(1)
    state = ax.adamw_init(params, config)
    full, _ = ax.adamw_step(params, grads, state, config)
    part, _ = ax.adamw_step(params, {**grads, "w": None}, state, config)
    close(part["b"], full["b"])
    same(part["w"], params["w"])


def test_none_in_params_is_no_leaf() -> None:
    params = {"w": jnp.ones(2), "activation": None}
    config = ax.AdamW(use_ema=True)
    state = ax.adamw_init(params, config)
    new, state = ax.adamw_step(params, {"w": jnp.ones(2), "activation": None}, state, config)
    assert new["activation"] is None
    assert state.m["activation"] is None
    assert float(new["w"][0]) < 1


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3)])
def test_scalars_and_empty_leaves(shape: tuple[int, ...]) -> None:
    params = jnp.ones(shape)
    for config in (FULL, ax.AdamW(clipnorm=1.0), ax.AdamW(global_clipnorm=1.0)):
        new, state = ax.adamw_step(params, params, ax.adamw_init(params, config), config)
        assert new.shape == state.m.shape == shape
        assert bool(jnp.all(jnp.isfinite(new)))


@pytest.mark.parametrize("empty", [{}, [], None, {"a": {}}])
def test_an_empty_tree(empty: Any) -> None:
    config = ax.AdamW()
    assert ax.adamw_step(empty, empty, ax.adamw_init(empty, config), config)[0] == empty


def test_numpy_leaves() -> None:
    params = jax.tree.map(np.asarray, tree())
    config = ax.AdamW()
    new, _ = ax.adamw_step(params, params, ax.adamw_init(params, config), config)
    close(
        new,
        jax.jit(lambda p, s: ax.adamw_step(p, p, s, config))(params, ax.adamw_init(params, config))[
            0
        ],
    )


# ---------------------------------------------------------------------------- the mask

MASKS = {
    "full": {"w": True, "b": [False, False]},
    "prefix": {"w": True, "b": False},
    "callable": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    "numpy_bool": {"w": np.True_, "b": [np.False_, False]},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_weight_decay_mask(mask: Any) -> None:
    masked, _ = run(ax.AdamW(weight_decay=0.5, weight_decay_mask=mask))
    decayed, _ = run(ax.AdamW(weight_decay=0.5))
    undecayed, _ = run(ax.AdamW(weight_decay=0.0))
    close(masked, {"w": decayed["w"], "b": undecayed["b"]})
    assert not np.allclose(decayed["b"][0], undecayed["b"][0], rtol=1e-5)


@pytest.mark.parametrize("value", [True, False])
def test_one_bool_for_all(value: bool) -> None:
    masked, _ = run(ax.AdamW(weight_decay=0.5, weight_decay_mask=value))
    close(masked, run(ax.AdamW(weight_decay=0.5 * value))[0])


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


# --------------------------------------------- skipping, accumulation, average, loss scale


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


def test_finalize() -> None:
    config = ax.AdamW(use_ema=True, ema_momentum=0.5, learning_rate=0.1)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree())
    params, state = run(config, 3, params)
    final = ax.adamw_finalize(params, state, config)
    for p, e in zip(jax.tree.leaves(final), jax.tree.leaves(state.ema), strict=True):
        assert p.dtype == jnp.bfloat16
        np.testing.assert_array_equal(p, e.astype(jnp.bfloat16))
    assert not np.array_equal(final["w"], params["w"])
    plain = ax.AdamW()
    same(ax.adamw_finalize(tree(), ax.adamw_init(tree(), plain), plain), tree())


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


@pytest.mark.parametrize(
    "module",
    ["_config", "_step", "_state", "_hyper", "_clipping", "_check", "reference", "lowering"],
)
def test_examples_in_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"adamw_xla.{module}")).failed == 0


def test_some_docstrings_have_examples() -> None:
    for module in ("_config", "_step", "reference"):
        assert doctest.testmod(importlib.import_module(f"adamw_xla.{module}")).attempted > 0
