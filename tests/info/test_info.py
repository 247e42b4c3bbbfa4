"""What a step tells: where, of what, at what cost; ``test_oracle.py`` has the numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from comparing import same
from flax import serialization
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import run, tree

import adamw_xla as ax
from adamw_xla._check.words import NATIVE
import adamw_xla.optax as axo

EPS = float(np.finfo(np.float32).eps)


def norm(values: Any) -> float:
    return math.sqrt(sum(float(np.sum(np.square(np.float64(x)))) for x in jax.tree.leaves(values)))


def stepped(config: ax.AdamW, params: Any, grads: Any, told: Any = True, **how: Any) -> Any:
    state = ax.adamw_init(params, config)
    return jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config, return_info=told, **how))(
        params, grads, state
    )


@pytest.mark.parametrize("told", [True, "per_leaf"])
@pytest.mark.parametrize(
    "options",
    [{}, {"clipnorm": 0.5}, {"gradient_accumulation_steps": 2}, {"use_ema": True}],
    ids=str,
)
def test_it_changes_no_bit_of_the_step(options: dict[str, Any], told: Any) -> None:
    config = ax.AdamW(0.1, **options)
    params, state, _ = stepped(config, tree(), tree(1), told)
    same((params, state), run(config))


def test_without_it_nothing_is_computed() -> None:
    """Nor where it is asked for and not used."""
    config = ax.AdamW(0.1)
    params, state = tree(), ax.adamw_init(tree(), config)

    def compiled(step: Any) -> str:
        return str(jax.jit(step).lower(params, tree(1), state).compile().as_text())

    def unused(p: Any, g: Any, s: Any) -> Any:
        return ax.adamw_step(p, g, s, config, implementation="xla", return_info=True)[:2]

    def asked(p: Any, g: Any, s: Any) -> Any:
        return ax.adamw_step(p, g, s, config, implementation="xla", return_info=True)

    assert " reduce(" in compiled(asked)
    assert not re.search(r" reduce\(| sqrt\(f32\[\]", compiled(unused))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 1.0}, {"clipnorm": 1.0}], ids=str)
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e25])
def test_a_gradient_of_any_size(size: float, options: dict[str, Any], implementation: str) -> None:
    """Squares overflow in float32 from 1.8e19 on; peers' norms are infinite there."""
    grads = {"a": size * jnp.arange(1.0, 5.0), "b": size * jnp.ones((2, 3), jnp.bfloat16)}
    params, config = jax.tree.map(jnp.ones_like, grads), ax.AdamW(0.1, **options)
    state = ax.adamw_init(params, config)
    step = {"xla": ax.adamw_step, "reference": ax.reference.adamw_step}[implementation]
    info = step(params, grads, state, config, return_info="per_leaf")[2]
    np.testing.assert_allclose(info.grad_norm, norm(grads), rtol=8 * EPS)
    for name, x in grads.items():
        np.testing.assert_allclose(info.per_leaf.grad_norm[name], norm(x), rtol=8 * EPS)
    largest = max(norm(x) for x in grads.values()) if "clipnorm" in options else norm(grads)
    factor = min(1, 1 / largest) if options else 1.0
    np.testing.assert_allclose(info.clip_factor, factor, rtol=8 * EPS)


@pytest.mark.parametrize(("skip", "implementation"), [(False, "xla"), (True, None)])
def test_of_scaled_gradients_that_are_maximized(skip: bool, implementation: Any) -> None:
    """Of the tree and of each leaf; and a step that is skipped is not applied."""
    config = ax.AdamW(0.1, loss_scale_factor=4.0, maximize=True, skip_nonfinite=skip)
    new, _, info = stepped(config, tree(), tree(1), "per_leaf", implementation=implementation)
    wanted = {
        "grad_norm": jax.tree.map(lambda g: g / 4, tree(1)),
        "param_norm": new,
        "update_norm": jax.tree.map(jnp.subtract, new, tree()),
    }
    for name, values in wanted.items():
        rtol = (64 if name == "update_norm" else 8) * EPS  # the new param is rounded
        np.testing.assert_allclose(getattr(info, name), norm(values), rtol=rtol)
        own = jax.tree.leaves(getattr(info.per_leaf, name))
        for got, leaf in zip(own, jax.tree.leaves(values), strict=True):
            np.testing.assert_allclose(got, norm(leaf), rtol=rtol)
    assert info.applied
    whole = stepped(config, tree(), tree(1), implementation=implementation)[2]
    np.testing.assert_allclose(whole.update_norm, info.update_norm, rtol=8 * EPS)
    bad = tree(1) | {"w": jnp.full_like(tree(1)["w"], np.nan)}
    assert stepped(config, tree(), bad)[2].applied != skip


@pytest.mark.parametrize("shape", [(1 << 20,), (3, 700, 500)], ids=str)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_norms_of_many_elements(shape: tuple[int, ...], implementation: Any) -> None:
    """A sum of positive terms in blocks: off by their number's logarithm, not by the number."""
    rng = np.random.default_rng(0)
    params, grads = ({"w": rng.standard_normal(shape).astype(np.float32)} for _ in range(2))
    config = ax.AdamW(1e-3)
    new, _, info = stepped(config, params, grads, implementation=implementation)
    np.testing.assert_allclose(info.grad_norm, norm(grads), rtol=32 * EPS)
    np.testing.assert_allclose(info.param_norm, norm(new), rtol=32 * EPS)
    # At the first step m / sqrt(v) is the gradient's sign, but for epsilon.
    g, p = (np.float64(x["w"]) for x in (grads, params))
    root = math.sqrt(1 - 0.999)
    step = 1e-3 * g / (np.abs(g) + 1e-7 / root) + 1e-3 * 0.004 * p
    np.testing.assert_allclose(info.update_norm, norm(step), rtol=32 * EPS)


def test_what_is_frozen_is_in_no_norm() -> None:
    params = {"a": jnp.ones(4), "b": jnp.full(3, 9.0), "c": jnp.full(2, 7.0), "d": None}
    grads = {"a": jnp.ones(4), "b": None, "c": jnp.ones(2), "d": None}
    config = ax.AdamW(0.1, groups=(ax.Group("c", frozen=True),))
    new, _, info = stepped(config, params, grads, "per_leaf")
    np.testing.assert_allclose(info.grad_norm, 2.0, rtol=4 * EPS)
    np.testing.assert_allclose(info.param_norm, norm(new["a"]), rtol=4 * EPS)
    for norms in vars(info.per_leaf).values():
        assert {k for k, x in norms.items() if x is not None} == {"a"}


def test_rates_are_those_of_this_step() -> None:
    config = ax.AdamW(
        lambda count: 0.1 * (count + 1), lambda count: 0.5, groups=(ax.Group("w", scale=2.0),)
    )
    params, state = tree(), ax.adamw_init(tree(), config)
    for k in range(3):
        params, state, info = ax.adamw_step(params, tree(k), state, config, return_info=True)
        assert (info.learning_rate, info.weight_decay) == (np.float32(0.1 * (k + 1)), 0.5)
    override = {"learning_rate": 0.25, "weight_decay": lambda count: count}
    info = ax.adamw_step(params, tree(), state, config, **override, return_info=True)[2]
    assert (info.learning_rate, info.weight_decay) == (0.25, 3.0)


@pytest.mark.parametrize("told", [False, True])
def test_a_schedule_is_called_once(told: bool) -> None:
    """What it tells is what the step is made with."""
    called = []

    def rate(count: Any) -> float:
        called.append("rate")
        return 0.1

    def decay(count: Any) -> float:
        called.append("decay")
        return 0.5

    config = ax.AdamW(rate, decay)
    ax.adamw_step(tree(), tree(1), ax.adamw_init(tree(), config), config, return_info=told)
    assert sorted(called) == ["decay", "rate"]


def test_words_and_remainders() -> None:
    """Of bfloat16 params: the stored ones; and what is added, before it is rounded."""
    rng = np.random.default_rng(0)
    params, grads = (
        {"w": jnp.asarray(rng.standard_normal((64, 33)), jnp.bfloat16)} for _ in range(2)
    )
    exact = stepped(ax.AdamW(1e-3, weight_decay=0.0), params, grads)[2]
    for options in ({"params_rounding": "stochastic"}, {"master": "split"}):
        config = ax.AdamW(1e-3, 0.0, state_format="word16", **options)  # type: ignore[arg-type]
        new, _, info = stepped(config, params, grads)
        np.testing.assert_allclose(info.param_norm, norm(new), rtol=16 * EPS)
        # v = (1 - beta_2) g^2 is not rounded before the step.
        np.testing.assert_allclose(info.update_norm, exact.update_norm, rtol=0.05)


def test_a_population() -> None:
    config = ax.AdamW(0.1, global_clipnorm=1.0)

    def one(p: Any, g: Any) -> Any:
        return ax.adamw_step(p, g, ax.adamw_init(p, config), config, return_info="per_leaf")[2]

    members = [(tree(k), tree(k + 5)) for k in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    together = jax.vmap(one)(*stacked)
    for k, member in enumerate(members):
        alone = one(*member)
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[k], y, rtol=8 * EPS)


def test_the_reference_is_differentiable() -> None:
    params, grads = tree(), tree(1)

    def moved(rate: Any) -> Any:
        config = ax.AdamW(rate, weight_decay=0.0)
        state = ax.adamw_init(params, config)
        return ax.reference.adamw_step(params, grads, state, config, return_info=True)[
            2
        ].update_norm

    np.testing.assert_allclose(jax.grad(moved)(0.1), moved(1.0), rtol=8 * EPS)


def test_an_exported_function_returns_it() -> None:
    config = ax.AdamW(0.1, skip_nonfinite=True)
    args = tree(), tree(1), ax.adamw_init(tree(), config)
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config, return_info="per_leaf"))
    written = export.export(step)(*args).serialize()
    info = export.deserialize(written).call(*args)[2]
    assert isinstance(info, ax.StepInfo)
    np.testing.assert_allclose(info.grad_norm, norm(args[1]), rtol=8 * EPS)


@pytest.mark.parametrize("value", ["leaves", 1, None, jnp.array(True)], ids=str)
def test_what_it_may_be(value: Any) -> None:
    config = ax.AdamW()
    with pytest.raises(ValueError, match=r'^return_info: must be False, True or "per_leaf"'):
        ax.adamw_step(tree(), tree(), ax.adamw_init(tree(), config), config, return_info=value)
    with pytest.raises(ValueError, match=r'^keep_info: must be False, True or "per_leaf"'):
        axo.adamw(0.1, keep_info=value)


def test_a_bool_of_numpy_is_one() -> None:
    state = ax.adamw_init(tree(), ax.AdamW())
    asked: Any = np.bool_(1)
    assert len(ax.adamw_step(tree(), tree(), state, ax.AdamW(), return_info=asked)) == 3


def test_a_result_that_is_not_unpacked_is_named() -> None:
    config = ax.AdamW()
    made = ax.adamw_step(tree(), tree(), ax.adamw_init(tree(), config), config, return_info=True)
    with pytest.raises(TypeError, match=rf"params: got a tuple of 3.*{re.escape(NATIVE.step)}"):
        ax.adamw_step(made, tree(), made[1], config)


# ------------------------------------------------------------------- the drop-in for optax


@pytest.mark.parametrize("keep", [True, "per_leaf"])
def test_the_drop_in_keeps_it(keep: Any) -> None:
    """In one structure from ``init`` on, so that a loop may carry it."""
    grads = tree(1) | {"b": [None, None]}
    tx = axo.adamw(0.1, keep_info=keep, global_clipnorm=0.5)
    params, state = tree(), tx.init(tree())
    *numbers, applied = jax.tree.leaves(dataclasses.replace(state.info, per_leaf=None))
    assert np.isnan(numbers + jax.tree.leaves(state.info.per_leaf)).all()
    assert not applied

    def body(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        zeros = jax.tree.map(jnp.zeros_like, params) | {"w": updates["w"]}
        return (optax.apply_updates(params, zeros), state), (state.info, updates)

    (last, state), (infos, updates) = jax.lax.scan(body, (params, state), None, 3)
    np.testing.assert_allclose(infos.grad_norm, [norm(tree(1)["w"])] * 3, rtol=8 * EPS)
    for k in range(3):
        moved = norm(updates["w"][k])
        np.testing.assert_allclose(infos.update_norm[k], moved, rtol=8 * EPS)
    np.testing.assert_allclose(state.info.param_norm, norm(last["w"]), rtol=8 * EPS)
    if keep == "per_leaf":
        assert np.isnan(state.info.per_leaf.grad_norm["b"][0])


def test_what_is_kept_stays_behind_where_a_state_moves() -> None:
    tx, stock = axo.adamw(0.1, keep_info=True), optax.adamw(0.1)
    _, state = tx.update(tree(1), tx.init(tree()), tree())
    there = axo.to_optax_state(state, stock.init(tree()))
    back = axo.from_optax_state(there, tx.init(tree()))
    assert np.isnan(back.info.grad_norm)
    same(back._replace(info=None), state._replace(info=None))


def test_each_number_has_an_array_of_its_own() -> None:
    """A state with one array twice cannot be donated, as ``optax.MultiSteps`` shows."""
    config = ax.AdamW(gradient_accumulation_steps=2)
    state = ax.adamw_init(tree(), config)
    *_, between = ax.adamw_step(tree(), tree(1), state, config, return_info="per_leaf")
    for info in (between, axo.adamw(0.1, keep_info="per_leaf").init(tree()).info):
        places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(info)]
        assert len({*places}) == len(places)


def test_a_state_that_lost_its_class_goes_on() -> None:
    tx = axo.adamw(0.1, keep_info="per_leaf")
    _, state = tx.update(tree(1), tx.init(tree()), tree())
    plain = state._replace(info=dataclasses.asdict(state.info))
    for opt_state in (plain._asdict(), (*plain,)):
        with pytest.raises(TypeError) as error:
            tx.update(tree(1), opt_state, tree())
        call = re.search(r"adamw_xla\.optax(\.AdamWOptState\(.*?\)) has the", str(error.value))
        assert call is not None
        assert "does not know" not in str(error.value)
        found = eval(f"axo{call[1]}", {"axo": axo, "opt_state": opt_state})
        same(tx.update(tree(1), found, tree()), tx.update(tree(1), state, tree()))


@pytest.mark.parametrize("saved", [True, "per_leaf", False])
def test_what_is_kept_never_keeps_flax_from_a_state(saved: Any) -> None:
    tx, template = axo.adamw(0.1, keep_info=saved), axo.adamw(0.1, keep_info="per_leaf")
    _, state = tx.update(tree(1), tx.init(tree()), tree())
    begun = template.init(tree())
    found = serialization.from_bytes(begun, serialization.to_bytes(state))
    same(found.info, state.info if saved == "per_leaf" else begun.info)
    same(found._replace(info=None), state._replace(info=None))


def test_the_drop_in_has_no_place_where_it_is_not_asked() -> None:
    assert axo.adamw(0.1).init(tree()).info is None


def test_norms_of_layers_are_kept_in_one_structure() -> None:
    tx = axo.adamw(0.1, stacked="^b", keep_info="per_leaf")
    params = {"a": jnp.ones(3), "b": jnp.ones((4, 3))}
    before = tx.init(params)
    _, after = tx.update(params, before, params)
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), state.info) for state in (before, after)]
    assert kinds[0] == kinds[1]
    assert after.info.per_leaf.grad_norm["b"].shape == (4,)
