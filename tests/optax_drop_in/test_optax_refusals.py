"""What ``adamw_xla.optax`` refuses, in optax's words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
SOLVER = axo.adamw(0.1)
STATE = SOLVER.init(PARAMS)
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)

ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"learning_rate": -0.1}, ValueError, "learning_rate must be .*at least 0, got -0.1"),
    ({"learning_rate": jnp.full(1, 0.1)}, ValueError, r"learning_rate must be a scalar.*\(1,\)"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be .*at least 0, got -0.1"),
    ({"learning_rate": None}, TypeError, "learning_rate must be .*got None"),
    ({"b1": 1.0}, ValueError, r"b1 must be .*in \[0, 1\), got 1.0"),
    ({"b2": lambda count: 0.9}, TypeError, "b2 must be a real number"),
    ({"b2": np.float32(1.5)}, ValueError, r"b2 must be .*in \[0, 1\), got 1.5"),
    ({"eps": -1e-8}, ValueError, "eps must be .*at least 0"),
    ({"eps_root": -1.0}, ValueError, "eps_root must be .*at least 0"),
    ({"eps_root": None}, TypeError, "eps_root must be a real number"),
    ({"mu_dtype": "int8"}, ValueError, "mu_dtype must be bfloat16.*got int8"),
    ({"mu_dtype": "wide"}, TypeError, "mu_dtype must be a dtype, got 'wide'"),
    ({"weight_decay": "much"}, TypeError, "weight_decay must be .*got 'much'"),
    ({"nesterov": 1}, TypeError, "nesterov must be True or False"),
    ({"amsgrad": None}, TypeError, "amsgrad must be True or False"),
    ({"updates_like_grads": "yes"}, TypeError, "updates_like_grads must be True or False"),
    ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "at most one clip option"),
    ({"epsilon": 1e-8}, TypeError, "epsilon"),
    ({"implementation": "fast"}, ValueError, "implementation must be .*\"native\", got 'fast'"),
    ({"gradient_accumulation_steps": 2.5}, TypeError, r"integer or None, got 2\.5\.$"),
]


@pytest.mark.parametrize(("options", "error", "message"), ARGUMENTS, ids=lambda x: str(x)[:40])
def test_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        axo.adamw(**{"learning_rate": 0.1} | options)


CHOICES: dict[str, dict[str, Any]] = {
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
    "ema_overwrite_frequency": {"use_ema": True, "ema_overwrite_frequency": 2},
}


@pytest.mark.parametrize("name", CHOICES)
def test_injected_choices_point_to_static_args(name: str) -> None:
    injected = optax.inject_hyperparams(axo.adamw)(0.1, **CHOICES[name])
    with pytest.raises(TypeError, match=rf"{name} must be .*static_args=\('{name}',\)"):
        injected.init(PARAMS)
    static = optax.inject_hyperparams(axo.adamw, static_args=(name,))(0.1, **CHOICES[name])
    static.update(PARAMS, static.init(PARAMS), PARAMS)


def test_an_injected_flag_points_to_static_args() -> None:
    injected = optax.inject_hyperparams(axo.adamw)(0.1, nesterov=jnp.array(True))
    with pytest.raises(TypeError, match=r"nesterov must be .*static_args=\('nesterov',\)"):
        injected.init(PARAMS)


MASKS: dict[str, Any] = {
    "by rank": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    "by name": lambda params: jax.tree_util.tree_map_with_path(lambda k, p: "w" in str(k), params),
    "by value": lambda params: jax.tree.map(lambda p: jnp.any(p != 0), params),
    "a tree of arrays": lambda params: {"w": jnp.array(True), "b": jnp.array(False)},
}


@pytest.mark.parametrize("static", [(), ("b1", "b2", "eps", "eps_root", "weight_decay")], ids=len)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_an_injected_mask_function_points_to_static_args(mask: Any, static: Any) -> None:
    """The wrapper calls it with its count, and passes on the one bool that comes back."""
    hint = r"mask: must be a tree of bools.*static_args=\('mask',\)"
    injected = optax.inject_hyperparams(axo.adamw, static_args=static)(0.1, mask=mask)
    with pytest.raises(TypeError, match=hint):
        jax.jit(injected.init)(PARAMS)
    named = optax.inject_hyperparams(axo.adamw, static_args=("mask", *static))(0.1, mask=mask)
    updates, _ = named.update(ZEROS, named.init(PARAMS), PARAMS)
    assert {k: np.any(x) for k, x in updates.items()} == mask(PARAMS)


def test_one_bool_for_all_that_was_not_injected_is_a_mask() -> None:
    for mask in (True, False, np.True_):
        solver = axo.adamw(0.1, mask=mask)
        updates, _ = solver.update(ZEROS, solver.init(PARAMS), PARAMS)
        assert np.any(updates["w"]) == mask


@pytest.mark.parametrize("norm", [0.0, -1.0, "x", None])
def test_a_clip_needs_a_norm(norm: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"max_norm must be .*above 0"):
        axo.clip_by_global_norm(norm)


INTEGER_B = {"w": jnp.ones((2, 3)), "b": np.ones(3, np.int32)}
STOCK = optax.adamw(0.1).init(PARAMS)
CALLS: dict[str, tuple[tuple[Any, Any, Any], type[Exception], str]] = {
    "no params": (
        (PARAMS, STATE, None),
        ValueError,
        r"params: is None.*e\(grads, opt_state, p",
    ),
    "state of optax": ((PARAMS, STOCK, PARAMS), TypeError, "state must be .*from_optax_state"),
    "native state": (
        (PARAMS, ax.adamw_init(PARAMS, ax.AdamW()), PARAMS),
        TypeError,
        "state must be what init",
    ),
    "order": ((PARAMS, PARAMS, STATE), TypeError, "state must be what init"),
    "integer params": ((PARAMS, STATE, INTEGER_B), TypeError, r"params\['b'\]: has dtype int32"),
    "Python number": ((PARAMS, STATE, {**PARAMS, "b": 1.0}), TypeError, r"\['b'\]: must be an a"),
    "missing gradient": (({"w": PARAMS["w"]}, STATE, PARAMS), ValueError, r"grads: lacks \['b'\]"),
    "other shape": (
        ({**PARAMS, "b": jnp.ones(2)}, STATE, PARAMS),
        ValueError,
        r"grads\['b'\]: has shape \(2,\)",
    ),
    "other options": (
        (PARAMS, axo.adamw(0.1, use_ema=True).init(PARAMS), PARAMS),
        ValueError,
        r"opt_state.ema: .*built for other options of adamw.*opt_state._replace\(ema=None\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS)
def test_calls(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SOLVER.update(*call)


def test_init_and_clip_name_the_leaf() -> None:
    with pytest.raises(TypeError, match=r"params\['b'\]: has dtype int32"):
        SOLVER.init(INTEGER_B)
    clip = axo.clip_by_global_norm(1.0)
    with pytest.raises(TypeError, match=r"updates\['b'\]: has dtype int32"):
        clip.update(INTEGER_B, clip.init(PARAMS))


def test_a_norm_that_is_not_finite_leaves_nothing_that_is() -> None:
    grads = {**PARAMS, "b": jnp.array([1.0, np.inf, 1.0])}
    clip = axo.clip_by_global_norm(1.0)
    updates, _ = clip.update(grads, clip.init(PARAMS))
    assert np.all(np.isnan(updates["w"]))
