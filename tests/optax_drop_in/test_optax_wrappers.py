"""What optax' wrappers hold around AdamW moves over with a running training, or is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import BETAS, LR, STEPS, WD, close, problem
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

RATE = optax.warmup_cosine_decay_schedule(0.0, LR, 10, STEPS)
MOMENTS = {"b1": BETAS[0], "b2": BETAS[1], "weight_decay": WD}
MOVE: dict[Any, Any] = {axo.adamw: axo.from_optax_state, optax.adamw: axo.to_optax_state}
WAYS = {
    "to_ours": (optax.adamw, axo.adamw),
    "to_optax": (axo.adamw, optax.adamw),
    "ours_to_ours": (axo.adamw, axo.adamw),
}


def train(solver: Any, params: Any, state: Any, grads: Any) -> Any:
    @jax.jit
    def step(p: Any, g: Any, s: Any) -> Any:
        updates, s = solver.update(g, s, p)
        return optax.apply_updates(p, updates), s

    for g in grads:
        params, state = step(params, g, state)
    return params, state


def begin(solver: Any, steps: int = 9) -> Any:
    params, grads = problem(steps)
    leaves = [jnp.asarray(p) for p in params]
    return leaves, solver.init(leaves), grads


def middle(params: Any) -> Any:
    """A mask that leaves the last leaf out."""
    return [True] * (len(params) - 1) + [False]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "multi_steps": lambda a: optax.MultiSteps(a(LR, **MOMENTS), 3),
    "multi_steps_that_grow": lambda a: optax.MultiSteps(
        a(LR, **MOMENTS), lambda step: jnp.where(step < 1, 2, 4)
    ),
    "skipping_multi_steps": lambda a: optax.MultiSteps(
        a(LR, **MOMENTS), 3, should_skip_update_fn=optax.skip_not_finite
    ),
    "multi_steps_of_a_chain": lambda a: optax.MultiSteps(
        optax.chain(optax.clip(1.0), a(RATE, **MOMENTS)), 3
    ),
    "chain_of_multi_steps": lambda a: optax.chain(
        optax.trace(0.5),
        optax.MultiSteps(a(LR, **MOMENTS), 3).gradient_transformation(),
        optax.scale_by_schedule(lambda count: 1 / (1 + count)),
    ),
    "trace_in_front": lambda a: optax.chain(optax.trace(0.5), a(RATE, **MOMENTS)),
    "trace_behind": lambda a: optax.chain(a(LR, **MOMENTS), optax.trace(0.5)),
    "injected": lambda a: optax.inject_hyperparams(a)(RATE, **MOMENTS),
    "injected_schedules": lambda a: optax.inject_hyperparams(a)(
        RATE, b1=optax.linear_schedule(0.5, 0.9, 12), weight_decay=WD
    ),
    "partition": lambda a: optax.partition(
        {"adam": a(LR, **MOMENTS), "sgd": optax.sgd(LR, momentum=0.5)},
        lambda params: ["adam" if m else "sgd" for m in middle(params)],
    ),
    "masked": lambda a: optax.chain(
        optax.masked(a(RATE, **MOMENTS), middle), optax.ema(0.5, debias=True)
    ),
    "apply_if_finite": lambda a: optax.apply_if_finite(a(LR, **MOMENTS), 5),
    "noise": lambda a: optax.chain(optax.add_noise(0.1, 0.55, jax.random.key(0)), a(LR, **MOMENTS)),
}


CASES = [
    *((name, way, 4) for name in WRAPPERS for way in ("to_ours", "to_optax")),
    *(("multi_steps", way, at) for way in WAYS for at in (1, 6)),
    ("injected", "ours_to_ours", 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way", "at"), CASES)
def test_going_on_equals_never_having_moved(name: str, way: str, at: int) -> None:
    first, second = WAYS[way]
    one, other = WRAPPERS[name](first), WRAPPERS[name](second)
    params, state, grads = begin(one)
    whole, last = train(one, params, state, grads)
    params, state = train(one, params, state, grads[:at])
    moved = MOVE[second](state, other.init(params))
    params, state = train(other, params, moved, grads[at:])
    close(params, whole)
    wanted = optax.tree_utils.tree_get_all_with_path(last, "count")
    found = optax.tree_utils.tree_get_all_with_path(state, "count")
    assert {int(count) for _, count in found} == {int(count) for _, count in wanted}


def test_multi_steps_moves_in_mid_accumulation() -> None:
    one, other = (WRAPPERS["multi_steps"](adamw) for adamw in (optax.adamw, axo.adamw))
    params, state, grads = begin(one)
    params, state = train(one, params, state, grads[:4])
    moved = axo.from_optax_state(state, other.init(params))
    assert (int(moved.mini_step), int(moved.gradient_step)) == (1, 1)
    for x, y in zip(moved.acc_grads, state.acc_grads, strict=True):
        assert np.any(x)
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), WAYS.values(), ids=WAYS)
def test_hyperparameters_that_were_set_stay_set(first: Any, second: Any) -> None:
    one, other = (optax.inject_hyperparams(a)(0.01, **MOMENTS) for a in (first, second))
    params, state, grads = begin(one)
    state.hyperparams["learning_rate"] = 5.0
    whole, _ = train(one, params, state, grads)
    moved = MOVE[second](state, other.init(params))
    rate = moved.hyperparams["learning_rate"]
    assert (rate, rate.dtype) == (5.0, np.float32)
    close(train(other, params, moved, grads)[0], whole)


def test_what_injects_on_one_side_alone_is_that_of_like() -> None:
    injected = optax.inject_hyperparams(optax.adamw)(0.01, **MOMENTS)
    params, state, grads = begin(injected)
    _, state = train(injected, params, state, grads[:3])
    assert axo.from_optax_state(state, axo.adamw(0.02).init(params)).count == 3
    like = optax.inject_hyperparams(axo.adamw)(RATE).init(params)
    plain = axo.from_optax_state(state.inner_state, like)
    assert plain.count == plain.hyperparams_states["learning_rate"].count == 3
    assert plain.hyperparams["learning_rate"] == RATE(0)


def test_a_wrapper_that_like_alone_has_stays_new() -> None:
    like = optax.MultiSteps(axo.adamw(LR), 3)
    params, state, grads = begin(stock := optax.adamw(LR))
    _, state = train(stock, params, state, grads[:2])
    moved = axo.from_optax_state(state, like.init(params))
    assert (int(moved.inner_opt_state.count), int(moved.gradient_step)) == (2, 0)


PARAMS = {"a": jnp.ones(3), "b": {"c": jnp.ones(())}}
LOST: dict[str, tuple[Any, Any, str]] = {
    "accumulated": (
        optax.MultiSteps(optax.adamw(LR), 3),
        axo.adamw(LR),
        r"opt_state\.mini_step: .*same wrapper.*pass opt_state\.inner_opt_state alone",
    ),
    "trace": (
        optax.chain(optax.trace(0.5), optax.adamw(LR)),
        optax.chain(optax.clip(1.0), axo.adamw(LR)),
        r"opt_state\[0\]: .*pass opt_state\[1\] alone",
    ),
    "order": (
        optax.chain(optax.adamw(LR), optax.trace(0.5)),
        optax.chain(optax.trace(0.5), axo.adamw(LR)),
        r"opt_state\[1\]: .*pass opt_state\[0\] alone",
    ),
    "deep": (
        optax.MultiSteps(optax.chain(optax.trace(0.5), optax.adamw(LR)), 3),
        optax.MultiSteps(axo.adamw(LR), 3),
        r"opt_state\.inner_opt_state\[0\]: .*pass opt_state\.inner_opt_state\[1\] alone",
    ),
}


@pytest.mark.parametrize(("source", "like", "text"), LOST.values(), ids=LOST)
def test_what_would_be_lost_is_named(source: Any, like: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        axo.from_optax_state(source.init(PARAMS), like.init(PARAMS))


def test_what_may_be_lost_is_left_out() -> None:
    state = optax.MultiSteps(optax.adamw(LR), 3).init(PARAMS)
    native = ax.adamw_init(PARAMS, ax.AdamW())
    assert axo.from_optax_state(state.inner_opt_state, native).count == 0


def test_shapes_around_it_are_compared_too() -> None:
    first, second = (optax.inject_hyperparams(a)(LR) for a in (optax.adamw, axo.adamw))
    state = first.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.ones(3)
    text = r"opt_state\.hyperparams\['learning_rate'\]: has shape \(3,\); must be \(\)"
    with pytest.raises(ValueError, match=text):
        axo.from_optax_state(state, second.init(PARAMS))


def test_traced_states_move() -> None:
    one, other = (WRAPPERS["multi_steps"](adamw) for adamw in (optax.adamw, axo.adamw))
    params, state, grads = begin(one)
    _, state = train(one, params, state, grads[:4])
    like = other.init(params)
    moved = jax.jit(lambda s: axo.from_optax_state(s, like))(state)
    eager = axo.from_optax_state(state, like)
    assert jax.tree.structure(moved) == jax.tree.structure(eager)
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(eager), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["to_ours", "to_optax"])
@pytest.mark.parametrize("name", ["trace_in_front", "injected", "multi_steps"])
def test_the_state_of_an_optimizer_of_flax(name: str, way: str) -> None:
    """Flax keeps each array, also a count, in a box of its own."""
    nnx = pytest.importorskip("flax.nnx")

    def loss(model: Any) -> Any:
        return jnp.sum(model(jnp.ones((1, 3))) ** 2)

    def step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(loss)(model))

    def make(adamw: Any) -> tuple[Any, Any]:
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, WRAPPERS[name](adamw), wrt=nnx.Param)

    first, second = WAYS[way]
    (model, one), (_, other) = make(first), make(second)
    for _ in range(4):
        step(model, one)
    moved = MOVE[second](one.opt_state, other.opt_state)
    assert jax.tree.structure(moved) == jax.tree.structure(other.opt_state)
    other.opt_state = moved
    twin = nnx.clone(model)
    for _ in range(2):
        step(model, one)
        step(twin, other)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, twin)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("form", ["variables", "what they hold"])
def test_nnx_with_state_shardings(form: str) -> None:
    """``nnx.Optimizer`` takes the variables off between init and update."""
    nnx = pytest.importorskip("flax.nnx")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    given = params if form == "variables" else nnx.to_pure_dict(params)
    cut = ax.sharding.zero1(mesh, "data", given, min_size=0)
    optimizer = nnx.Optimizer(model, axo.adamw(LR, state_shardings=cut), wrt=nnx.Param)
    for _ in range(2):
        moment = optimizer.opt_state.mu["kernel"][...]
        assert moment.sharding.spec == jax.sharding.PartitionSpec("data")
        optimizer.update(model, params)
    assert np.any(moment)


def test_a_mask_with_state_shardings() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"kept": jnp.ones((4, 3)), "left": jnp.ones((4, 3))}
    cut = ax.sharding.zero1(mesh, "data", params, min_size=0)
    masked = optax.masked(axo.adamw(LR, state_shardings=cut), {"kept": True, "left": False})
    updates, state = masked.update(params, masked.init(params), params)
    assert state.inner_state.mu["kept"].sharding == cut["kept"]
    assert updates["left"] is params["left"]
