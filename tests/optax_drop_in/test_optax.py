"""``adamw_xla.optax.adamw`` among what speaks optax: signature, state, wrappers, errors."""

from __future__ import annotations

import inspect
from typing import Any

from comparing import HALF_A_UNIT, close, same
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

PARAMS = {"w": jnp.full((4, 3), 0.5), "b": jnp.array([0.25, -1.0, 2.0])}
RATE = 2.0**-6
STEPS = 8

# What optax may be off by: it inverts 1 - 0.999**t of float32, where 0.999 is 1.3e-8 off and
# its power the last unit of a number below 1, beside 0.001*t. The root halves that, and a
# step is about RATE long. Each step also rounds the param once, in either program.
OPTAX_ATOL = RATE / 2 * sum((1.3e-8 * t + HALF_A_UNIT) / (0.001 * t) for t in range(1, STEPS + 1))
OPTAX_RTOL = 2 * STEPS * HALF_A_UNIT


def grads_at(step: int, params: Any = PARAMS) -> Any:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def train(transform: Any, params: Any = PARAMS, steps: int = STEPS, grads: Any = grads_at) -> Any:
    """Params and state after some jitted steps."""

    @jax.jit
    def step(p: Any, g: Any, s: Any) -> Any:
        updates, s = transform.update(g, s, p)
        return optax.apply_updates(p, updates), s

    state = transform.init(params)
    for k in range(steps):
        params, state = step(params, grads(k, params), state)
    return params, state


# ------------------------------------------------------------------------ what it looks like


def test_signature_begins_as_that_of_optax() -> None:
    stock = [*inspect.signature(optax.adamw).parameters.values()]
    ours = [*inspect.signature(axo.adamw).parameters.values()]
    for theirs, mine in zip(stock, ours, strict=False):
        assert (mine.name, mine.kind, mine.default) == (theirs.name, theirs.kind, theirs.default)
    assert {p.kind for p in ours[len(stock) :]} == {inspect.Parameter.KEYWORD_ONLY}
    clips = (axo.clip_by_global_norm, optax.clip_by_global_norm)
    ours, stock = ([*inspect.signature(clip).parameters.values()] for clip in clips)
    assert [p.name for p in ours] == [*(p.name for p in stock), "axis_names"]
    assert ours[-1].kind is inspect.Parameter.KEYWORD_ONLY


def test_other_options_are_those_of_the_native_api() -> None:
    native = inspect.signature(ax.AdamW).parameters
    here = inspect.signature(axo.adamw).parameters
    shared = native.keys() & here.keys() - {"learning_rate", "weight_decay"}
    assert {name: here[name].default for name in shared} == {
        name: native[name].default for name in shared
    }
    renamed = {"beta_1", "beta_2", "epsilon", "epsilon_root", "weight_decay_mask", "state_dtype"}
    assert native.keys() - here.keys() == {*renamed, "epsilon_hat", "name"}


def test_state_is_found_and_mapped_by_optax() -> None:
    options: dict[str, Any] = {"amsgrad": True, "use_ema": True, "skip_nonfinite": True}
    solver = optax.chain(optax.clip(1.0), axo.adamw(RATE, **options))
    _, state = train(solver)
    get = optax.tree_utils.tree_get
    assert get(state, "count") == 8
    for name in ("mu", "nu", "nu_max", "ema"):
        assert jax.tree.structure(get(state, name)) == jax.tree.structure(PARAMS)
    assert get(state, "accumulated") is None
    changed = optax.tree_utils.tree_set(state, count=jnp.int32(3))
    assert get(changed, "count") == 3
    specs = {"w": "rows", "b": "none"}
    mapped = optax.tree_utils.tree_map_params(
        solver, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "count"
    )
    inner = get(mapped, "AdamWOptState")
    assert inner == axo.AdamWOptState("count", specs, specs, specs, specs, None, None, "count")
    same(optax.tree.map_params(solver, lambda x: x, state), state)


def test_init_is_abstract_too_and_update_keeps_its_types() -> None:
    solver = axo.adamw(RATE, use_ema=True)
    shapes = jax.eval_shape(solver.init, PARAMS)
    params, state = train(solver)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda x: x.shape, shapes)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, shapes)
    (last, _), _ = jax.lax.scan(
        lambda carry, g: (_step(solver, *carry, g), None),
        (PARAMS, solver.init(PARAMS)),
        jax.tree.map(lambda *x: jnp.stack(x), *[grads_at(k) for k in range(8)]),
    )
    close(last, params)


def _step(solver: Any, params: Any, state: Any, grads: Any) -> Any:
    updates, state = solver.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    ("dtype", "mu_dtype", "mu", "nu"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),
        ("float16", None, "float32", "float32"),
        ("float32", "bfloat16", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
        ("float64", None, "float64", "float64"),
        ("float64", "float32", "float32", "float64"),
    ],
)
def test_dtypes(dtype: str, mu_dtype: str | None, mu: str, nu: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
        solver = axo.adamw(RATE, mu_dtype=mu_dtype)
        updates, state = solver.update(params, solver.init(params), params)
        new, state = _step(solver, params, state, params)
        assert {x.dtype.name for x in jax.tree.leaves(new)} == {dtype}
        assert {x.dtype.name for x in jax.tree.leaves(state.mu)} == {mu}
        assert {x.dtype.name for x in jax.tree.leaves(state.nu)} == {nu}
        unrounded = {"float64" if dtype == "float64" else "float32"}
        assert {x.dtype.name for x in jax.tree.leaves(updates)} == unrounded


def test_exported_and_read_back() -> None:
    solver = axo.adamw(RATE, use_ema=True)
    state = solver.init(PARAMS)
    exported = jax.export.export(jax.jit(solver.update))(PARAMS, state, PARAMS)
    again = jax.export.deserialize(exported.serialize())
    close(again.call(PARAMS, state, PARAMS), solver.update(PARAMS, state, PARAMS))


def test_extra_arguments_are_ignored() -> None:
    solver = axo.adamw(RATE)
    state = solver.init(PARAMS)
    plain = solver.update(PARAMS, state, PARAMS)
    same(solver.update(PARAMS, state, PARAMS, value=1.0, config=None, params_of="x"), plain)


# -------------------------------------------------------------------------------- wrappers


def both(wrap: Any, **options: Any) -> None:
    """The same training with ours and with optax's under a wrapper."""
    ours, theirs = (train(wrap(adamw(RATE, **options)))[0] for adamw in (axo.adamw, optax.adamw))
    close(ours, theirs, OPTAX_RTOL, OPTAX_ATOL)


WRAPPERS = {
    "chain": lambda t: optax.chain(optax.clip_by_global_norm(1.0), t, optax.scale(0.5)),
    "masked": lambda t: optax.masked(t, {"w": True, "b": False}),
    "partition": lambda t: optax.partition(
        {"adam": t, "sgd": optax.sgd(0.1), "rest": optax.set_to_zero()}, {"w": "adam", "b": "sgd"}
    ),
    "two_groups": lambda t: optax.partition({"x": t, "y": t}, {"w": "x", "b": "y"}),
    "multi_steps": lambda t: optax.MultiSteps(t, 3).gradient_transformation(),
    "skipping_multi_steps": lambda t: optax.MultiSteps(
        t, 3, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "apply_if_finite": lambda t: optax.apply_if_finite(t, 2),
    "conditionally_transform": lambda t: optax.conditionally_transform(t, lambda k: k % 2 == 0),
    "conditionally_mask": lambda t: optax.conditionally_mask(t, lambda k: k % 2 == 0),
    "flatten": optax.flatten,
    "with_extra_args": optax.with_extra_args_support,
    "freeze": lambda t: optax.selective_transform(t, freeze_mask={"w": False, "b": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_under_wrappers_of_optax(wrap: Any) -> None:
    both(wrap)


def test_partition_with_a_mask_of_the_whole_tree() -> None:
    both(WRAPPERS["partition"], mask={"w": True, "b": False}, weight_decay=0.5)


def test_masked_with_a_mask_function() -> None:
    """It sees params with masked nodes in them."""
    both(WRAPPERS["masked"], mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p), weight_decay=0.5)


def test_a_population_of_rates() -> None:
    def train_one(rate: Any) -> Any:
        return train(axo.adamw(rate), steps=3)[0]

    rates = jnp.array([0.5, 1.0, 2.0]) * RATE
    population = jax.vmap(train_one)(rates)
    for i, rate in enumerate(rates):
        close(jax.tree.map(lambda x, i=i: x[i], population), train_one(rate))


@pytest.mark.parametrize(
    "rate", [RATE, optax.linear_schedule(RATE, 0.0, 8)], ids=["number", "schedule"]
)
def test_inject_hyperparams(rate: Any) -> None:
    results = [
        train(
            optax.inject_hyperparams(adamw)(
                rate, b1=optax.linear_schedule(0.5, 0.9, 8), b2=0.99, eps=1e-6, weight_decay=0.5
            )
        )
        for adamw in (axo.adamw, optax.adamw)
    ]
    close(results[0][0], results[1][0], OPTAX_RTOL, OPTAX_ATOL)
    state = results[0][1]
    assert set(state.hyperparams) >= {"learning_rate", "b1", "b2", "eps", "weight_decay"}
    assert state.inner_state.count == 8


def test_an_injected_rate_can_be_set_without_compiling_again() -> None:
    solver = optax.inject_hyperparams(axo.adamw)(learning_rate=RATE)
    state = solver.init(PARAMS)
    step = jax.jit(lambda s: solver.update(PARAMS, s, PARAMS))
    before, _ = step(state)
    state.hyperparams["learning_rate"] = jnp.float32(2 * RATE)
    after, _ = step(state)
    close(after, jax.tree.map(lambda x: 2 * x, before))
    assert step._cache_size() == 1


def test_schedules_see_the_count_that_they_see_in_optax() -> None:
    def record(counts: list[int]) -> Any:
        def schedule(count: Any) -> Any:
            jax.debug.callback(lambda c: counts.append(int(c)), count)
            return RATE

        return schedule

    seen: dict[Any, list[int]] = {axo.adamw: [], optax.adamw: []}
    for adamw, counts in seen.items():
        train(adamw(record(counts)), steps=3)
        jax.effects_barrier()
    assert seen[axo.adamw] == seen[optax.adamw] == [0, 1, 2]


# ------------------------------------------------------------------------- leaves left out


def test_none_in_params_and_gradients_is_no_leaf() -> None:
    params, grads = {**PARAMS, "f": None}, {**grads_at(0), "f": None}
    solver = axo.adamw(RATE)
    updates, state = solver.update(grads, solver.init(params), params)
    assert updates["f"] is None
    assert state.mu["f"] is None
    assert optax.apply_updates(params, updates)["f"] is None


def test_none_in_gradients_freezes() -> None:
    grads = {**grads_at(0), "b": None}
    solver = axo.adamw(RATE)
    updates, state = solver.update(grads, solver.init(PARAMS), PARAMS)
    assert updates["b"] is None
    same(state.mu["b"], jnp.zeros(3))
    assert np.all(np.asarray(updates["w"]) != 0)


def test_a_mask_may_be_a_tree_whose_class_is_callable() -> None:
    class Tree(dict[str, Any]):
        def __call__(self, x: Any) -> Any:
            raise AssertionError

    jax.tree_util.register_pytree_node(
        Tree, lambda t: ([*t.values()], [*t]), lambda keys, x: Tree(zip(keys, x, strict=True))
    )
    params, mask = Tree(PARAMS), Tree(w=True, b=False)
    solver = axo.adamw(1.0, weight_decay=0.5, mask=mask)
    updates, _ = solver.update(jax.tree.map(jnp.zeros_like, params), solver.init(params), params)
    same(updates["b"], jnp.zeros(3))
    same(updates["w"], -0.5 * PARAMS["w"])
    hash(jax.tree.structure(ax.AdamW(weight_decay_mask=mask)))  # as jax.jit does
