"""What a caller of the front end meets: config, state, kinds of trees, the mask.

What the options do is in ``test_options.py``, refused calls in ``test_refusals.py``.
"""

from __future__ import annotations

import dataclasses
import doctest
import functools
import importlib
import inspect
import typing
from typing import Any

from comparing import close, same
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from runs import run, tree

import adamw_xla as ax

FULL = ax.AdamW(
    amsgrad=True,
    use_ema=True,
    ema_overwrite_frequency=2,
    gradient_accumulation_steps=2,
    skip_nonfinite=True,
    loss_scale_factor=8.0,
)


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
    ours_alone = {"epsilon_hat", "weight_decay_mask", "skip_nonfinite", "state_dtype"}
    ours_alone |= {"epsilon_root", "nesterov", "axis_names", "groups", "maximize"}
    ours_alone |= {"state_format", "params_rounding", "master", "skip_spikes", "stacked"}
    assert keyword_only == ours_alone | {"decay_times_lr", "cautious_decay"}


def test_the_reference_is_typed_as_the_step() -> None:
    def forms(step: Any) -> list[tuple[Any, Any]]:
        hints = map(typing.get_type_hints, typing.get_overloads(step))
        return [(x["return_info"], x["return"]) for x in hints]

    step, reference = ax.adamw_step, ax.reference.adamw_step
    assert len(forms(step)) == 2
    assert forms(reference) == forms(step)
    keywords = typing.get_type_hints(reference)
    for overload in typing.get_overloads(reference):
        own = typing.get_type_hints(overload)
        (rates,) = typing.get_args(own.pop("rates"))
        own |= typing.get_type_hints(rates)
        assert own.keys() == keywords.keys()
        assert all(own[x] == keywords[x] for x in own.keys() - {"return_info", "return"})


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


PASSED = ax.AdamW(
    learning_rate=0.01,
    weight_decay=0.5,  # its product with the rate is exact in float32
    beta_1=0.9,
    beta_2=0.999,
    use_ema=True,
    amsgrad=True,
    nesterov=True,
)


@pytest.mark.parametrize(
    "changes", [{}, {"epsilon_hat": False}, {"beta_1": 0.0}, {"beta_1": 0.3, "beta_2": 1 - 1e-9}]
)
@pytest.mark.parametrize("x64", [False, True])
def test_a_config_that_is_passed_makes_the_bits_of_one_closed_over(
    changes: dict[str, float], x64: bool
) -> None:
    """The float32 nearest to 0.999 is 1.3e-8 off: one less that is 1.3e-5 off."""
    with jax.enable_x64(x64):
        config = dataclasses.replace(PASSED, **changes)
        again = jax.tree.unflatten(jax.tree.structure(config), jax.tree.leaves(config))
        closed, passed = (
            jax.jit(functools.partial(ax.adamw_step, config=config)),
            jax.jit(ax.adamw_step),
        )
        want = tree(), ax.adamw_init(tree(), config)
        for k in range(3):
            params, state = want
            want = closed(params, tree(k), state)
            for argument in (config, again, jax.tree.map(jnp.asarray, config)):
                same(passed(params, tree(k), state, argument), want)


def test_decays_that_were_changed_are_those_that_count() -> None:
    """People map functions over a config; what else it knows of a decay follows the decay."""
    state = ax.adamw_init(tree(), ax.AdamW())
    betas = {"beta_1": 0.5, "beta_2": 0.75}

    def change(path: Any, x: Any) -> Any:
        return betas.get(path[0].name, x)

    changed = jax.tree_util.tree_map_with_path(change, ax.AdamW())
    halved = jax.tree.map(lambda x: x / 2, ax.AdamW())
    for config, numbers in (
        (changed, betas),
        (halved, {f.name: getattr(halved, f.name) for f in dataclasses.fields(halved)}),
    ):
        want = ax.adamw_step(tree(), tree(1), state, ax.AdamW(**numbers))
        close(ax.adamw_step(tree(), tree(1), state, config), want)
        close(jax.jit(ax.adamw_step)(tree(), tree(1), state, config), want)


@pytest.mark.slow
def test_the_derivative_by_a_decay_is_whole() -> None:
    """What was known of a passed config's decays is a number, and no way around them."""
    params, grads = tree(), tree(1)

    def after(config: ax.AdamW) -> Any:
        state = ax.adamw_init(params, config)
        for _ in range(2):
            new, state = ax.reference.adamw_step(params, grads, state, config)
        return sum(jnp.sum(x) for x in jax.tree.leaves((new, state.v, state.ema)))

    with jax.enable_x64(True):
        params, grads = jax.tree.map(lambda x: jnp.asarray(x, float), (params, grads))
        slope = jax.jit(jax.grad(after))(PASSED)
        for name in ("beta_1", "beta_2", "ema_momentum"):
            number, h = getattr(PASSED, name), 1e-6
            ends = [after(dataclasses.replace(PASSED, **{name: number + x})) for x in (h, -h)]
            got = getattr(slope, name)
            np.testing.assert_allclose(got, (ends[0] - ends[1]) / (2 * h), rtol=1e-5)
            assert got != 0


def test_configs_may_be_stacked_and_mapped_over() -> None:
    state = ax.adamw_init(tree(), ax.AdamW())
    configs = [ax.AdamW(beta_2=beta, weight_decay=0.0) for beta in (0.999, 0.99)]
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.float32(y) for y in x]), *configs)
    mapped = jax.vmap(ax.adamw_step, in_axes=(None, None, None, jax.tree.map(lambda _: 0, stacked)))
    population = mapped(tree(), tree(1), state, stacked)
    for i, config in enumerate(configs):
        close(
            jax.tree.map(lambda x, i=i: x[i], population)[1].v,
            ax.adamw_step(tree(), tree(1), state, config)[1].v,
        )


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


@pytest.mark.parametrize("make", [ax.adamw_step, ax.reference.adamw_step])
def test_leaves_without_gradient_and_state_are_not_looked_at(make: Any) -> None:
    """Neither JAX' nor Equinox' mark of a leaf without gradient; ``test_any_tree.py`` has more."""
    model = {"w": jnp.ones(2), "n": jnp.arange(3), "key": jax.random.key(0)}
    trained = dict.fromkeys(model) | {"w": model["w"]}
    config = ax.AdamW(use_ema=True, gradient_accumulation_steps=2)
    grads = jax.grad(lambda p: jnp.sum(p["w"] * p["n"][1]), allow_int=True)(model)
    step = jax.jit(lambda *args: make(*args, config))
    new, state = step(model, grads, ax.adamw_init(trained, config))
    new, state = step(new, trained, state)
    same(new["n"], model["n"])
    assert new["key"] == model["key"]
    assert state.v["n"] is state.ema["key"] is None
    plain = ax.AdamW()
    close(new["w"], make(model["w"], model["w"], ax.adamw_init(model["w"], plain), plain)[0])
    assert ax.adamw_finalize(new, state, config)["n"] is new["n"]


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
    "arrays": {"w": jnp.array(True), "b": [np.array(False), jnp.array(False)]},
    "array_prefix": {"w": jnp.array(True), "b": jnp.array(False)},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_weight_decay_mask(mask: Any) -> None:
    masked, _ = run(ax.AdamW(weight_decay=0.5, weight_decay_mask=mask))
    decayed, _ = run(ax.AdamW(weight_decay=0.5))
    undecayed, _ = run(ax.AdamW(weight_decay=0.0))
    close(masked, {"w": decayed["w"], "b": undecayed["b"]})
    assert not np.allclose(decayed["b"][0], undecayed["b"][0], rtol=1e-5)


def test_a_config_with_a_mask_of_arrays_may_be_an_argument() -> None:
    params, grads = tree(), tree(1)
    configs = [ax.AdamW(weight_decay_mask=MASKS[name]) for name in ("arrays", "full")]
    step = jax.jit(lambda c: ax.adamw_step(params, grads, ax.adamw_init(params, c), c))
    same(*(step(config) for config in configs))
    assert step._cache_size() == 1


@pytest.mark.parametrize("value", [True, False])
def test_one_bool_for_all(value: bool) -> None:
    masked, _ = run(ax.AdamW(weight_decay=0.5, weight_decay_mask=value))
    close(masked, run(ax.AdamW(weight_decay=0.5 * value))[0])


@pytest.mark.parametrize(
    "module",
    [
        *("_adapt", "_config", "_step", "_state", "_inside.hyper", "_inside.clipping"),
        *(
            "_rules.groups",
            "_rules.spikes",
            "_inside.grouped",
            "_check.trees",
            "reference",
            "lowering",
            "sharding",
        ),
        "hlo._report",
    ],
)
def test_examples_in_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"adamw_xla.{module}")).failed == 0


def test_some_docstrings_have_examples() -> None:
    for module in ("_config", "_step", "reference", "sharding"):
        assert doctest.testmod(importlib.import_module(f"adamw_xla.{module}")).attempted > 0
