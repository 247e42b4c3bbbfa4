"""Every mistake gets one error that names what is wrong, and costs the caller nothing."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamw_xla as ax
from adamw_xla.lowering import NativeUnavailableError

CONSTRUCTOR: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"learning_rate": -0.1}, ValueError, ["learning_rate", "-0.1"]),
    ({"learning_rate": "fast"}, TypeError, ["learning_rate", "fast"]),
    ({"learning_rate": None}, TypeError, ["learning_rate", "None"]),
    ({"learning_rate": True}, TypeError, ["learning_rate", "True"]),
    ({"learning_rate": 1j}, TypeError, ["learning_rate"]),
    ({"learning_rate": float("nan")}, ValueError, ["learning_rate", "finite"]),
    ({"learning_rate": float("inf")}, ValueError, ["learning_rate", "finite"]),
    ({"learning_rate": np.array([0.1, 0.2])}, ValueError, ["learning_rate", "(2,)", "vmap"]),
    ({"weight_decay": None}, TypeError, ["weight_decay", "None"]),
    ({"weight_decay": -1.0}, ValueError, ["weight_decay", "at least 0"]),
    ({"beta_1": 1.0}, ValueError, ["beta_1", "[0, 1)", "1.0"]),
    ({"beta_1": -0.1}, ValueError, ["beta_1", "[0, 1)"]),
    ({"beta_2": 1.5}, ValueError, ["beta_2", "[0, 1)"]),
    ({"beta_2": jnp.float32(1.5)}, ValueError, ["beta_2", "[0, 1)"]),
    ({"beta_2": lambda count: 0.9}, TypeError, ["beta_2"]),
    ({"epsilon": -1e-8}, ValueError, ["epsilon", "at least 0"]),
    ({"amsgrad": 1}, TypeError, ["amsgrad", "True or False"]),
    ({"use_ema": "yes"}, TypeError, ["use_ema"]),
    ({"epsilon_hat": None}, TypeError, ["epsilon_hat"]),
    ({"skip_nonfinite": 0}, TypeError, ["skip_nonfinite"]),
    ({"clipnorm": 0.0}, ValueError, ["clipnorm", "above 0"]),
    ({"clipvalue": -1.0}, ValueError, ["clipvalue", "above 0"]),
    ({"global_clipnorm": "x"}, TypeError, ["global_clipnorm"]),
    ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, ["at most one", "clipnorm", "clipvalue"]),
    (
        {"clipnorm": 1.0, "global_clipnorm": 1.0},
        ValueError,
        ["at most one", "clipnorm", "global_clipnorm"],
    ),
    ({"use_ema": True, "ema_momentum": 1.1}, ValueError, ["ema_momentum", "[0, 1]"]),
    ({"use_ema": True, "ema_overwrite_frequency": 0}, ValueError, ["ema_overwrite_frequency"]),
    ({"use_ema": True, "ema_overwrite_frequency": 1.5}, TypeError, ["ema_overwrite_frequency"]),
    ({"ema_overwrite_frequency": 5}, ValueError, ["ema_overwrite_frequency", "use_ema=True"]),
    ({"loss_scale_factor": 0.0}, ValueError, ["loss_scale_factor", "above 0"]),
    ({"gradient_accumulation_steps": 1}, ValueError, ["gradient_accumulation_steps", "2"]),
    ({"gradient_accumulation_steps": 2.0}, TypeError, ["gradient_accumulation_steps"]),
    ({"gradient_accumulation_steps": True}, TypeError, ["gradient_accumulation_steps"]),
    ({"name": 3}, TypeError, ["name", "3"]),
    ({"state_dtype": "int32"}, ValueError, ["state_dtype", "int32"]),
    ({"state_dtype": "wide"}, TypeError, ["state_dtype", "wide"]),
    ({"weight_decay_mask": "bias"}, TypeError, ["weight_decay_mask", "'bias'", "bools"]),
    ({"weight_decay_mask": ["bias", "norm"]}, TypeError, ["weight_decay_mask[0]", "'bias'"]),
    ({"weight_decay_mask": {"bias"}}, TypeError, ["weight_decay_mask", "{'bias'}"]),
    ({"learning_rte": 0.1}, TypeError, ["learning_rte"]),
]


@pytest.mark.parametrize(("options", "error", "fragments"), CONSTRUCTOR, ids=lambda x: str(x)[:60])
def test_constructor(options: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    with pytest.raises(error) as caught:
        ax.AdamW(**options)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


PARAMS = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
W, B = "['layer']['w']", "['layer']['b']"
PLAIN = ax.AdamW()


def layer(**leaves: Any) -> dict[str, Any]:
    return {"layer": PARAMS["layer"] | leaves}


def without(name: str) -> dict[str, Any]:
    return {"layer": {k: v for k, v in PARAMS["layer"].items() if k != name}}


def other(**options: Any) -> ax.AdamWState:
    return ax.adamw_init(PARAMS, ax.AdamW(**options))


STATE = other()
# what differs from a good call -> the error and what it must say
CALLS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "missing key": ({"grads": without("b")}, ValueError, ["grads", B, "lacks"]),
    "extra key": ({"grads": layer(c=jnp.ones(1))}, ValueError, ["grads", "['layer']['c']"]),
    "leaf for a tree": ({"grads": jnp.ones(3)}, ValueError, ["grads", B]),
    "tree for a leaf": ({"grads": layer(b=[jnp.ones(3)])}, ValueError, ["grads", B]),
    "other containers": ({"grads": {"layer": (1.0, 2.0)}}, ValueError, ["grads"]),
    "shape": ({"grads": layer(w=jnp.ones((3, 2)))}, ValueError, ["grads" + W, "(3, 2)", "(2, 3)"]),
    "broadcastable": ({"grads": layer(b=jnp.ones(()))}, ValueError, ["grads" + B, "()", "(3,)"]),
    "integer grads": ({"grads": layer(b=jnp.ones(3, int))}, TypeError, ["grads" + B, "int32"]),
    "integer params": ({"params": layer(b=jnp.ones(3, int))}, TypeError, ["params" + B, "int32"]),
    "complex params": (
        {"params": layer(b=jnp.ones(3, complex))},
        TypeError,
        ["params" + B, "compl"],
    ),
    "bool params": ({"params": layer(b=jnp.ones(3, bool))}, TypeError, ["params" + B, "bool"]),
    "float8 params": (
        {"params": layer(b=jnp.ones(3, jnp.float8_e4m3fn))},
        TypeError,
        ["params" + B, "float8"],
    ),
    "python scalar": ({"params": layer(b=1.0)}, TypeError, ["params" + B, "float", "asarray"]),
    "scalar gradient": ({"grads": layer(b=1.0)}, TypeError, ["grads" + B, "float"]),
    "string": ({"params": layer(b="x")}, TypeError, ["params" + B, "str"]),
    "all None": ({"grads": layer(w=None, b=None)}, ValueError, ["grads", "every leaf is None"]),
    "None for all": ({"grads": None}, ValueError, ["grads"]),
    "state is params": ({"state": PARAMS}, TypeError, ["state", "dict", "adamw_init"]),
    "order": ({"grads": STATE, "state": PARAMS}, TypeError, ["params, grads, state, config"]),
    "config is a dict": ({"config": {}}, TypeError, ["config", "dict"]),
    "config and state": ({"state": PLAIN, "config": STATE}, TypeError, ["config"]),
    "no amsgrad": ({"config": ax.AdamW(amsgrad=True)}, ValueError, ["v_max", "amsgrad", "another"]),
    "with amsgrad": ({"state": other(amsgrad=True)}, ValueError, ["v_max", "amsgrad"]),
    "no average": ({"config": ax.AdamW(use_ema=True)}, ValueError, ["ema", "use_ema"]),
    "average": ({"state": other(use_ema=True)}, ValueError, ["ema", "use_ema"]),
    "no accumulation": (
        {"config": ax.AdamW(gradient_accumulation_steps=2)},
        ValueError,
        ["gradient_accumulation_steps"],
    ),
    "no skipping": ({"config": ax.AdamW(skip_nonfinite=True)}, ValueError, ["skip_nonfinite"]),
    "state of others": (
        {"state": ax.adamw_init({"x": jnp.ones(3)}, PLAIN)},
        ValueError,
        ["state.m", B],
    ),
    "state of other shapes": (
        {"state": ax.adamw_init(layer(b=jnp.ones(4)), PLAIN)},
        ValueError,
        ["state.m" + B, "(4,)", "(3,)"],
    ),
    "no count": ({"state": dataclasses.replace(STATE, count=None)}, TypeError, ["state.count"]),
    "no m": ({"state": dataclasses.replace(STATE, m=None)}, ValueError, ["state.m", "lacks", B]),
    "no v": ({"state": dataclasses.replace(STATE, v=None)}, ValueError, ["state.v", "lacks", B]),
    "integer state": (
        {"state": dataclasses.replace(STATE, v=layer(b=jnp.ones(3, int)))},
        TypeError,
        ["state.v" + B, "int32"],
    ),
    "bfloat16 v": (
        {"state": dataclasses.replace(STATE, v=jax.tree.map(jnp.bfloat16, STATE.v))},
        TypeError,
        ["state.v" + B, "bfloat16", "must be float32", "astype('float32')"],
    ),
    "float32 m": (
        {"config": ax.AdamW(state_dtype="bfloat16")},
        TypeError,
        ["state.m" + B, "float32", "must be bfloat16", "astype('bfloat16')"],
    ),
    "bfloat16 m": (
        {"state": other(state_dtype="bfloat16")},
        TypeError,
        ["state.m" + B, "bfloat16", "must be float32", "astype('float32')"],
    ),
    "state without a leaf": (
        {"state": dataclasses.replace(STATE, v=layer(b=None))},
        ValueError,
        ["state.v" + B, "lacks", "grads", "None there"],
    ),
    "mask of numbers": (
        {"config": ax.AdamW(weight_decay_mask=layer(w=True, b=1.0))},
        TypeError,
        ["weight_decay_mask" + B, "True or False"],
    ),
    "mask of arrays": (
        {"config": ax.AdamW(weight_decay_mask=layer(w=True, b=jnp.ones(3, bool)))},
        TypeError,
        ["weight_decay_mask" + B, "True or False"],
    ),
    "mask of another tree": (
        {"config": ax.AdamW(weight_decay_mask={"other": True})},
        ValueError,
        ["weight_decay_mask"],
    ),
    "mask callable": (
        {"config": ax.AdamW(weight_decay_mask=lambda p: {"other": True})},
        ValueError,
        ["weight_decay_mask"],
    ),
    "negative rate": ({"learning_rate": -1.0}, ValueError, ["learning_rate", "at least 0"]),
    "vector rate": ({"learning_rate": jnp.ones(2)}, ValueError, ["learning_rate", "(2,)"]),
    "string decay": ({"weight_decay": "much"}, TypeError, ["weight_decay", "much"]),
    "implementation": ({"implementation": "cuda"}, ValueError, ["implementation", "cuda"]),
}


@pytest.mark.parametrize(("changed", "error", "fragments"), CALLS.values(), ids=CALLS)
def test_step(changed: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    call = {"params": PARAMS, "grads": PARAMS, "state": STATE, "config": PLAIN} | changed
    with pytest.raises(error) as caught:
        ax.adamw_step(**call)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


COUNTERS: dict[str, tuple[Any, type[Exception], str]] = {
    "vector": (jnp.zeros(1, jnp.int32), ValueError, r"got shape \(1,\)\..*jax.vmap"),
    "float": (jnp.zeros(()), TypeError, "got one of dtype float32"),
    "Python float": (0.0, TypeError, "got 0.0"),
    "int16": (np.int16(0), TypeError, "got one of dtype int16"),
    "flag": (False, TypeError, "got False"),
    "tree": ({"a": jnp.zeros((), jnp.int32)}, TypeError, "got {'a'"),
}
EVERY_COUNTER = ax.AdamW(gradient_accumulation_steps=2, skip_nonfinite=True)


@pytest.mark.parametrize("field", ["count", "micro_step", "skipped"])
@pytest.mark.parametrize(("value", "error", "text"), COUNTERS.values(), ids=COUNTERS)
def test_counters(value: Any, error: type[Exception], text: str, field: str) -> None:
    state = dataclasses.replace(ax.adamw_init(PARAMS, EVERY_COUNTER), **{field: value})
    with pytest.raises(error, match=rf"state.{field}: must be an int32 scalar, {text}"):
        ax.adamw_step(PARAMS, PARAMS, state, EVERY_COUNTER)


@pytest.mark.parametrize("count", [0, np.int32(0), np.zeros((), np.int32)], ids=repr)
def test_counters_that_a_checkpoint_may_bring(count: Any) -> None:
    _, new = ax.adamw_step(PARAMS, PARAMS, dataclasses.replace(STATE, count=count), PLAIN)
    assert new.count == 1


def test_a_python_number_is_no_micro_step() -> None:
    state = dataclasses.replace(ax.adamw_init(PARAMS, EVERY_COUNTER), micro_step=0)
    with pytest.raises(TypeError, match=r"state.micro_step: must be an int32 scalar, got 0"):
        ax.adamw_step(PARAMS, PARAMS, state, EVERY_COUNTER)


def test_a_stacked_state_outside_of_vmap() -> None:
    params = {"w": jnp.ones((3, 2))}
    stacked = jax.vmap(functools.partial(ax.adamw_init, config=PLAIN))(params)
    stacked = dataclasses.replace(stacked, count=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"state.count: .*got shape \(3,\).*jax.vmap"):
        ax.adamw_step(params, params, stacked, PLAIN)


RESULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "vector": (jnp.ones(3), ValueError, r"must be a scalar, got shape \(3,\)"),
    "vector of one": (jnp.ones(1), ValueError, r"must be a scalar, got shape \(1,\)"),
    "numpy vector": (np.ones(1), ValueError, r"must be a scalar, got shape \(1,\)"),
    "nothing": (None, TypeError, "must be a real number .*got None"),
    "string": ("0.1", TypeError, "must be a real number .*got '0.1'"),
    "list": ([0.1], TypeError, r"must be a real number .*got \[0.1\]"),
    "flag": (jnp.array(True), TypeError, "must be a real number"),
    "complex": (jnp.array(1j), TypeError, "must be a real number"),
    "negative": (-0.1, ValueError, "must be finite and at least 0, got -0.1"),
}


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(("result", "error", "text"), RESULTS.values(), ids=RESULTS)
def test_results_of_schedules(
    result: Any, error: type[Exception], text: str, name: str, traced: bool
) -> None:
    config = ax.AdamW(**{name: lambda count: result})  # type: ignore[arg-type]
    step = functools.partial(ax.adamw_step, config=config)
    with pytest.raises(error, match=rf"AdamW: {name} \(or what its schedule returns\) {text}"):
        (jax.jit(step) if traced else step)(PARAMS, PARAMS, STATE)


def test_a_config_that_was_rebuilt_with_vectors() -> None:
    stacked = jax.tree.map(lambda x: jnp.full(3, x), PLAIN)
    with pytest.raises(ValueError, match=r"learning_rate .*scalar, got shape \(3,\).*vmap"):
        ax.adamw_step(PARAMS, PARAMS, STATE, stacked)


@pytest.mark.parametrize(
    "name", ["missing key", "shape", "state of others", "no amsgrad", "all None"]
)
def test_nothing_is_lost_by_a_refused_call(name: str) -> None:
    changed, error, _ = CALLS[name]
    copy = functools.partial(jax.tree.map, lambda x: jnp.array(x, copy=True))
    call = copy({"params": PARAMS, "grads": PARAMS, "state": STATE}) | {"config": PLAIN} | changed
    config = call.pop("config")
    donating = jax.jit(
        lambda params, grads, state: ax.adamw_step(params, grads, state, config),
        donate_argnames=("params", "grads", "state"),
    )
    with pytest.raises(error):
        donating(**call)
    assert not any(x.is_deleted() for x in jax.tree.leaves(call))


def test_init_refuses_what_step_would() -> None:
    with pytest.raises(TypeError, match=re.escape("params" + B)):
        ax.adamw_init(layer(b=jnp.ones(3, int)), PLAIN)
    with pytest.raises(TypeError, match="config"):
        ax.adamw_init(PARAMS, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another config"):
        ax.adamw_finalize(PARAMS, STATE, ax.AdamW(use_ema=True))
    with pytest.raises(TypeError, match="config"):
        ax.scale_loss(jnp.ones(()), None)  # type: ignore[arg-type]


def test_native_where_no_kernel_runs_says_why() -> None:
    lowered = jax.jit(lambda p, s: ax.adamw_step(p, p, s, PLAIN, implementation="native"))
    with pytest.raises(NativeUnavailableError, match="tpu"):
        lowered.trace(PARAMS, STATE).lower(lowering_platforms=("tpu",))
