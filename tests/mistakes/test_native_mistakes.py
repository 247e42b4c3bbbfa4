"""Mistakes with the native API: what is wrong, where, and what to do, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import adamw_xla as ax

PARAMS = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
W, B = "['layer']['w']", "['layer']['b']"
CONFIG = ax.AdamW()
# A state of which it would be a pity: its moments are not zero.
_, STATE = ax.adamw_step(PARAMS, PARAMS, ax.adamw_init(PARAMS, CONFIG), CONFIG)
ORDER = "adamw_step(params, grads, state, config)"
FROM_OPTAX = "from_optax_state(state, adamw_init(params, config))"
LOSS = jnp.float32(2.0)
SHAPES = jax.eval_shape(lambda: PARAMS)
STOCK = optax.adamw(0.1)


def layer(**leaves: Any) -> dict[str, Any]:
    return {"layer": PARAMS["layer"] | leaves}


def result() -> Any:
    return ax.adamw_step(PARAMS, PARAMS, STATE, CONFIG)


def masked(**leaves: Any) -> ax.AdamW:
    return ax.AdamW(weight_decay_mask={"layer": {"w": True, "b": False} | leaves})


# the keyword -> what it is called here
KEYWORDS: dict[str, str] = {
    **dict.fromkeys(("lr", "alpha", "step_size", "schedule"), "here it is learning_rate."),
    **dict.fromkeys(("b1", "beta1"), "here it is beta_1."),
    **dict.fromkeys(("b2", "beta2"), "here it is beta_2."),
    "betas": "here it is beta_1 and beta_2.",
    "eps": "here it is epsilon.",
    "eps_root": "here it is epsilon_root.",
    **dict.fromkeys(("wd", "decay"), "here it is weight_decay."),
    **dict.fromkeys(("mask", "exclude_from_weight_decay"), "here it is weight_decay_mask."),
    "mu_dtype": "here it is state_dtype.",
    **dict.fromkeys(("max_norm", "max_grad_norm", "grad_clip"), "here it is global_clipnorm."),
    "clip_norm": "here it is clipnorm.",
    "ema_decay": "here it is ema_momentum.",
    **dict.fromkeys(
        ("every_k_schedule", "accumulation_steps"), "here it is gradient_accumulation_steps."
    ),
    "loss_scale": "here it is loss_scale_factor.",
    "return_info": "adamw_step(..., return_info=True) asks for it.",
    "state_shardings": "adamw_step(..., state_shardings=...) has it.",
    "learning_rte": "did you mean learning_rate?",
    "epsilom": "did you mean epsilon?",
    "weight_decays": "did you mean weight_decay?",
    "fused": "it has learning_rate, weight_decay, beta_1",
    "differentiable": "it has learning_rate, weight_decay, beta_1",
}


@pytest.mark.parametrize(("keyword", "advice"), KEYWORDS.items())
def test_options(refused: Any, keyword: str, advice: str) -> None:
    refused(
        lambda: ax.AdamW(**{keyword: 1}), TypeError, f"AdamW: has no argument {keyword}", advice
    )
    refused(lambda: dataclasses.replace(CONFIG, **{keyword: 1}), TypeError, keyword, advice)


STEP_KEYWORDS = {
    "lr": "here it is learning_rate.",
    "wd": "here it is weight_decay.",
    "b1": "an option of the config: AdamW(beta_1=...)",
    "betas": "an option of the config: AdamW(beta_1=..., beta_2=...)",
    "eps": "an option of the config: AdamW(epsilon=...)",
    "weight_decay_mask": "an option of the config: AdamW(weight_decay_mask=...)",
    "state_format": "an option of the config: AdamW(state_format=...)",
    "backend": "here it is implementation.",
    "implmentation": "did you mean implementation?",
    "donate": "it has params, grads, state, config, learning_rate, weight_decay",
}


@pytest.mark.parametrize("step", [ax.adamw_step, ax.reference.adamw_step])
@pytest.mark.parametrize(("keyword", "advice"), STEP_KEYWORDS.items())
def test_keywords_of_a_step(refused: Any, step: Any, keyword: str, advice: str) -> None:
    call = functools.partial(step, PARAMS, PARAMS, STATE, CONFIG, **{keyword: 1})
    if step is ax.adamw_step or "impl" not in advice:
        refused(call, TypeError, f"adamw_step: has no argument {keyword}", advice)


Call = Callable[[], Any]
# the mistake -> the error; what it was, where and what to do, as the message says it
OPTIONS: dict[str, tuple[Call, type[Exception], str]] = {
    "no rate": (lambda: ax.AdamW(None), TypeError, "learning_rate | got None | 0 is for none"),
    "no decay": (
        lambda: ax.AdamW(weight_decay=None),
        TypeError,
        "weight_decay | got None | 0 is for none",
    ),
    "no beta": (lambda: ax.AdamW(beta_1=None), TypeError, "beta_1 | got None | leave it out"),
    "no epsilon": (lambda: ax.AdamW(epsilon=None), TypeError, "epsilon | got None | 0 is for"),
    "beta is scheduled": (
        lambda: ax.AdamW(beta_1=lambda count: 0.9),
        TypeError,
        "beta_1 | real number | learning_rate and weight_decay alone",
    ),
    "a string": (
        lambda: ax.AdamW("1e-3"),
        TypeError,
        "learning_rate | got '1e-3' | give the number itself",
    ),
    "what makes schedules": (
        lambda: ax.AdamW(optax.linear_schedule),
        TypeError,
        "learning_rate | with the step count alone | call it, and pass what it returns",
    ),
    "two arguments": (
        lambda: ax.AdamW(weight_decay=lambda count, params: 0.1),
        TypeError,
        "weight_decay | cannot be called with the step count alone | from the count to one",
    ),
    "a pair of rates": (lambda: ax.AdamW((1e-3, 1e-2)), TypeError, "learning_rate | (0.001"),
    "rates for replicas": (
        lambda: ax.AdamW(jnp.ones(3)),
        ValueError,
        "learning_rate | shape (3,) | inside of the function that is given to jax.vmap",
    ),
    "a mask of names": (
        lambda: ax.AdamW(weight_decay_mask={"layer": {"w": True, "b": "no"}}),
        TypeError,
        "got 'no' | weight_decay_mask['layer']['b'] | a tree of bools",
    ),
    "by position": (
        lambda: ax.AdamW(*[0.1] * 17),
        TypeError,
        "AdamW | got 17 arguments by position | epsilon_hat, weight_decay_mask",
    ),
    "twice": (
        lambda: ax.AdamW(0.1, learning_rate=0.1),
        TypeError,
        "AdamW | 'learning_rate' | call AdamW(...)",
    ),
    "two clips": (
        lambda: ax.AdamW(clipnorm=1.0, global_clipnorm=1.0),
        ValueError,
        "at most one | clipnorm, global_clipnorm",
    ),
    "a traced number in a static config": (
        lambda: jax.jit(lambda x: hash(ax.AdamW(x)))(0.1),
        TypeError,
        "has no hash | AdamW | not static",
    ),
    "a config for init": (
        lambda: ax.adamw_init(CONFIG, PARAMS),
        TypeError,
        "params: got an AdamW | params | adamw_init(params, config)",
    ),
    "init without config": (
        lambda: ax.adamw_init(PARAMS),
        TypeError,
        "lacks config | adamw_init | adamw_init(params, config)",
    ),
    "init of a state": (
        lambda: ax.adamw_init(STATE, CONFIG),
        TypeError,
        "got an AdamWState | params | adamw_init(params, config)",
    ),
    "init of a result": (
        lambda: ax.adamw_init(result(), CONFIG),
        TypeError,
        "got a tuple of 2 | params | unpack it",
    ),
    "an average of shapes": (
        lambda: ax.adamw_init(SHAPES, ax.AdamW(use_ema=True)),
        TypeError,
        "ShapeDtypeStruct | params['layer']['b'] | jax.eval_shape",
    ),
    "no average": (
        lambda: ax.adamw_finalize(PARAMS, STATE, CONFIG),
        ValueError,
        "no average | adamw_finalize | AdamW(use_ema=True)",
    ),
    "an average of what": (
        lambda: ax.adamw_finalize(STATE, PARAMS, CONFIG),
        TypeError,
        "params: got an AdamWState | state | adamw_finalize(params, state, config)",
    ),
    "an average without config": (
        lambda: ax.adamw_finalize(PARAMS, STATE),
        TypeError,
        "lacks config | adamw_finalize | adamw_finalize(params, state, config)",
    ),
    "a state for params, to be adapted": (
        lambda: ax.adapt_state(PARAMS, STATE, CONFIG),
        TypeError,
        "params: got an AdamWState | state must be an adamw_xla.AdamWState, got dict | "
        "adapt_state(state, params, config)",
    ),
    "a state adapted to nothing": (
        lambda: ax.adapt_state(STATE, PARAMS),
        TypeError,
        "lacks config, the options to go on with | adapt_state(state, params, config)",
    ),
    "a state adapted to a rate": (
        lambda: ax.adapt_state(STATE, PARAMS, 0.1),
        TypeError,
        "config | got float | adapt_state(state, params, config)",
    ),
    "groups of a config": (
        lambda: ax.describe_groups(CONFIG, PARAMS),
        TypeError,
        "params: got an AdamW | describe_groups(params, config)",
    ),
    "a state of optax, adapted": (
        lambda: ax.adapt_state(STOCK.init(PARAMS), PARAMS, CONFIG),
        TypeError,
        f"got tuple | {FROM_OPTAX}",
    ),
    "a state of other params, adapted": (
        lambda: ax.adapt_state(STATE, {"layer": {"w": PARAMS["layer"]["w"]}}, CONFIG),
        ValueError,
        "state.m | has ['layer']['b'], which params lacks",
    ),
    "a state of other shapes, adapted": (
        lambda: ax.adapt_state(STATE, layer(w=jnp.ones((3, 3))), CONFIG),
        ValueError,
        f"state.m{W} | has shape (2, 3); must be (3, 3)",
    ),
    "a later version's state, adapted": (
        lambda: ax.adapt_state(vars(STATE) | {"shampoo": LOSS}, PARAMS, CONFIG),
        TypeError,
        "state must be | with 'shampoo', which this version of adamw_xla does not know",
    ),
    "a state inside of another, adapted": (
        lambda: ax.adapt_state({"opt": vars(STATE)}, PARAMS, CONFIG),
        TypeError,
        "state['opt'] looks like one | AdamWState(**state['opt']) has the same moments",
    ),
    "no v, adapted": (
        lambda: ax.adapt_state(dataclasses.replace(STATE, v=layer(b=None)), PARAMS, CONFIG),
        ValueError,
        f"state.v{B} | is None | all of its state, or none",
    ),
    "a float's count, adapted": (
        lambda: ax.adapt_state(dataclasses.replace(STATE, count=1.0), PARAMS, CONFIG),
        TypeError,
        "state.count | got 1.0 | jax.numpy.int32(...)",
    ),
    "a config for all processes": (
        lambda: ax.sharding.check_same_config(0.1),
        TypeError,
        "config | got float | check_same_config(config)",
    ),
    "a traced config for all processes": (
        lambda: jax.jit(ax.sharding.check_same_config)(CONFIG),
        TypeError,
        "a traced number | config | call it outside of jax.jit",
    ),
    "a scale for a loss": (
        lambda: ax.scale_loss(LOSS, 1024.0),
        TypeError,
        "config | got float | scale_loss(loss, config)",
    ),
    "a lowered program": (
        lambda: ax.hlo.report(jax.jit(lambda x: x).lower(LOSS)),
        TypeError,
        "lowered, and not compiled | hlo | add .compile()",
    ),
    "a function for a report": (
        lambda: ax.hlo.report(lambda x: x),
        TypeError,
        "must be a compiled program | hlo | jax.jit(...).lower(...).compile()",
    ),
}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_other_calls(refused: Any, case: Any) -> None:
    call, error, parts = case
    refused(call, error, *parts.split(" | "), kept=(PARAMS, STATE))
