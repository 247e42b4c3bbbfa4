"""Mistakes with a step: what is wrong, where, and what to do, in one sentence."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

PARAMS = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
W, B = "['layer']['w']", "['layer']['b']"
CONFIG = ax.AdamW()
# A state of which it would be a pity: its moments are not zero.
_, STATE = ax.adamw_step(PARAMS, PARAMS, ax.adamw_init(PARAMS, CONFIG), CONFIG)
ORDER = "adamw_step(params, grads, state, config)"
FROM_OPTAX = "from_optax_state(state, adamw_init(params, config))"
LOSS = jnp.float32(2.0)
ONE, PAIR = jnp.ones(3), (jnp.ones(3), jnp.ones(2))
SHAPES = jax.eval_shape(lambda: PARAMS)
STOCK = optax.adamw(0.1)
STOCK_STATE = axo.to_optax_state(STATE, STOCK.init(PARAMS))
DROP_IN_STATE = axo.AdamWOptState.of(STATE)


def layer(**leaves: Any) -> dict[str, Any]:
    return {"layer": PARAMS["layer"] | leaves}


def result() -> Any:
    return ax.adamw_step(PARAMS, PARAMS, STATE, CONFIG)


def fresh(params: Any) -> ax.AdamWState:
    return ax.adamw_init(params, CONFIG)


def masked(**leaves: Any) -> ax.AdamW:
    return ax.AdamW(weight_decay_mask={"layer": {"w": True, "b": False} | leaves})


# what a checkpoint gives for the state -> what the error says of it
RESTORED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    name: ({"state": value}, TypeError, f"state must be | {parts}")
    for name, (value, parts) in {
        "a dict": (vars(STATE), "got dict | : adamw_xla.AdamWState(**state) has"),
        "a list": ([STATE.count, STATE.m, STATE.v], "got list | adamw_xla.AdamWState(*state) has"),
        "a tuple": ((*vars(STATE).values(),), "got tuple | adamw_xla.AdamWState(*state) has"),
        "an older version's": (
            {"count": np.int64(1), "m": STATE.m, "v": STATE.v},
            "AdamWState(**state) has",
        ),
        "a later version's": (
            vars(STATE) | {"shampoo": LOSS},
            "with 'shampoo', which this version of adamw_xla does not know | version that saved it",
        ),
        "with its params": (
            {"params": PARAMS, "opt": [vars(STATE)]},
            "state['opt'][0] looks like one | adamw_xla.AdamWState(**state['opt'][0]) has",
        ),
        "beside its params": ((PARAMS, vars(STATE)), "adamw_xla.AdamWState(**state[1]) has"),
        "optax'": (
            [STOCK_STATE[0]._asdict(), None, None],
            "state[0] looks like one | from_optax_state(optax.ScaleByAdamState(**state[0]), ",
        ),
        "the drop-in's": (
            {"0": DROP_IN_STATE._asdict()},
            "from_optax_state(adamw_xla.optax.AdamWOptState(**state['0']), adamw_init(",
        ),
    }.items()
}

# what differs from a good step -> the error; what it was, where and what to do
STEPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "value and grads": (
        {"grads": (LOSS, PARAMS)},
        ValueError,
        "grads | got a tuple of 2, the first a scalar | jax.value_and_grad returns (value, grads)",
    ),
    "value, aux and grads": (
        {"grads": ((LOSS, {"accuracy": LOSS}), PARAMS)},
        ValueError,
        "grads | a tuple that begins with a scalar | jax.value_and_grad returns (value, grads)",
    ),
    "grads and aux": (
        {"grads": (PARAMS, {"accuracy": LOSS})},
        ValueError,
        "grads | the first built like the params | has_aux=True) returns (grads, aux)",
    ),
    "value and grads of a pair": (
        {"params": PAIR, "grads": (LOSS, PAIR), "state": fresh(PAIR)},
        ValueError,
        "grads | got a tuple of 2, the first a scalar | pass grads alone",
    ),
    "value and grads of an array": (
        {"params": ONE, "grads": (LOSS, ONE), "state": fresh(ONE)},
        ValueError,
        "grads | the first a scalar | pass grads alone",
    ),
    "the loss": ({"grads": LOSS}, ValueError, "grads | is a scalar | jax.grad(loss_function)"),
    "not called": (
        {"grads": jax.grad(lambda p: LOSS)},
        ValueError,
        "grads | is a function | jax.grad(loss_function)(params)",
    ),
    "shapes for grads": (
        {"grads": SHAPES},
        TypeError,
        "ShapeDtypeStruct | grads['layer']['b'] | jax.jit(...).lower",
    ),
    "shapes for params": (
        {"params": SHAPES},
        TypeError,
        "ShapeDtypeStruct | params['layer']['b'] | jax.eval_shape",
    ),
    "shapes for state": (
        {"state": jax.eval_shape(lambda: STATE)},
        TypeError,
        "ShapeDtypeStruct | state.m['layer']['b'] | pass arrays",
    ),
    "complex": (
        {"params": layer(b=jnp.ones(3, complex))},
        TypeError,
        "complex64 | params['layer']['b'] | optax.contrib.split_real_and_imaginary",
    ),
    "integers": (
        {"params": layer(b=jnp.ones(3, int))},
        TypeError,
        "int32 | ['layer']['b'] | Keep other leaves",
    ),
    "a number": (
        {"params": layer(b=1.0)},
        TypeError,
        "float | params['layer']['b'] | jax.numpy.asarray",
    ),
    "a word": ({"params": layer(b="x")}, TypeError, "got str | params['layer']['b'] | keep it out"),
    "a random key": (
        {"params": layer(b=jax.random.key(0))},
        TypeError,
        "key<fry> | params['layer']['b'] | Keep other leaves out",
    ),
    "an untrained leaf": (
        {"grads": {"layer": {"w": PARAMS["layer"]["w"]}}},
        ValueError,
        "lacks ['layer']['b'] | grads | the tree structure of params",
    ),
    "frozen containers": (
        {"grads": {"layer": MappingProxyType(PARAMS["layer"])}},
        ValueError,
        "lacks | grads | the tree structure of params",
    ),
    "transposed": (
        {"grads": layer(w=jnp.ones((3, 2)))},
        ValueError,
        "has shape (3, 2) | grads['layer']['w'] | must be (2, 3)",
    ),
    "params not unpacked": (
        {"params": result()},
        TypeError,
        "got a tuple of 2, the second an AdamWState | params | unpack it",
    ),
    "state not unpacked": (
        {"state": result()},
        TypeError,
        "got a tuple of 2, the second an AdamWState | state | adamw_step returns (params, state)",
    ),
    "grads not unpacked": ({"grads": result()}, TypeError, "tuple of 2 | grads | unpack it"),
    "params and state swapped": (
        {"params": STATE, "state": PARAMS},
        TypeError,
        "params: got an AdamWState | state must be an adamw_xla.AdamWState, got dict | " + ORDER,
    ),
    "grads and state swapped": (
        {"grads": STATE, "state": PARAMS},
        TypeError,
        "grads: got an AdamWState | state must be an adamw_xla.AdamWState, got dict | " + ORDER,
    ),
    "state and config swapped": (
        {"state": CONFIG, "config": STATE},
        TypeError,
        "got an AdamW | state | " + ORDER,
    ),
    "the state twice": ({"grads": STATE}, TypeError, "got an AdamWState | grads | " + ORDER),
    "no state": ({"state": None}, TypeError, "got NoneType | state | adamw_init(params, config)"),
    "a number for a state": ({"state": 0}, TypeError, "got int | state | " + ORDER),
    "optax' state": ({"state": STOCK_STATE}, TypeError, "got tuple | state | " + FROM_OPTAX),
    "the part of optax' state": (
        {"state": STOCK.init(PARAMS)[0]},
        TypeError,
        "ScaleByAdamState | state | " + FROM_OPTAX,
    ),
    "the state of optax' chain": (
        {"state": optax.chain(optax.clip(1.0), STOCK).init(PARAMS)},
        TypeError,
        "got tuple | state | " + FROM_OPTAX,
    ),
    "the drop-in's state": (
        {"state": DROP_IN_STATE},
        TypeError,
        "adamw_xla.optax.AdamWOptState | state.native() is one",
    ),
    "the state in a dict": (
        {"state": {"params": ONE, "state": STATE}},
        TypeError,
        "got dict | state['state'] is one",
    ),
    **{f"restored: {name}": case for name, case in RESTORED.items()},
    "a part of a restored state": (
        {"state": {name: x for name, x in vars(STATE).items() if name != "v"}},
        TypeError,
        "got dict | state must be | It looks like one | lacks 'v' | restore it from a checkpoint",
    ),
    "moments alone": (
        {"state": {"m": STATE.m, "v": STATE.v}},
        TypeError,
        "state must be | It looks like one | lacks 'count' | restore it from a checkpoint",
    ),
    "the class": ({"config": ax.AdamW}, TypeError, "the class AdamW | config | call it"),
    "no config": ({"config": None}, TypeError, "got NoneType | config | AdamW(...)"),
    "a dict of options": (
        {"config": {"learning_rate": 0.1}},
        TypeError,
        "got dict | config | AdamW(**config)",
    ),
    "a rate": ({"config": 0.1}, TypeError, "got float | config | AdamW(learning_rate=...)"),
    "a schedule": (
        {"config": optax.constant_schedule(0.1)},
        TypeError,
        "function | config | AdamW(learning_rate=...)",
    ),
    "a transformation": (
        {"config": STOCK},
        TypeError,
        "GradientTransformation | config | here options are AdamW(...)",
    ),
    "ones and zeros": (
        {"config": masked(b=0)},
        TypeError,
        "got 0 | weight_decay_mask['layer']['b'] | jax.tree.map(bool, weight_decay_mask)",
    ),
    "a mask of a leaf": (
        {"config": masked(b=np.ones(3, bool))},
        TypeError,
        "got array | weight_decay_mask['layer']['b'] | one bool for a whole leaf",
    ),
    "a path for a mask": (
        {"config": ax.AdamW(weight_decay_mask={"layer": {"w": True}})},
        ValueError,
        "lacks ['layer']['b'] | weight_decay_mask | the tree structure of params",
    ),
    "a Python float's count": (
        {"state": dataclasses.replace(STATE, count=1.0)},
        TypeError,
        "got 1.0 | state.count | jax.numpy.int32(...)",
    ),
    "int64 moments": (
        {"state": dataclasses.replace(STATE, v=layer(b=np.ones(3, int)))},
        TypeError,
        "int64 | state.v['layer']['b'] | float32",
    ),
    "a word for a rate": (
        {"learning_rate": "fast"},
        TypeError,
        "got 'fast' | learning_rate | the number itself",
    ),
    "another implementation": (
        {"implementation": "triton"},
        ValueError,
        'got \'triton\' | implementation | "xla" or "native"',
    ),
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_steps(refused: Any, case: Any) -> None:
    changed, error, parts = case
    call = {"params": PARAMS, "grads": PARAMS, "state": STATE, "config": CONFIG} | changed
    for step in (ax.adamw_step, ax.reference.adamw_step):
        if step is ax.adamw_step or "implementation" not in call:
            kept = (PARAMS, STATE)
            refused(lambda step=step: step(**call), error, *parts.split(" | "), kept=kept)


@pytest.mark.parametrize("name", ["value and grads", "optax' state", "state not unpacked"])
def test_nothing_is_donated(refused: Any, name: str) -> None:
    changed, error, parts = STEPS[name]
    call = {"params": PARAMS, "grads": PARAMS, "state": STATE} | changed
    call = jax.tree.map(lambda x: jnp.array(x, copy=True), call)
    donating = jax.jit(functools.partial(ax.adamw_step, config=CONFIG), donate_argnames=list(call))
    refused(lambda: donating(**call), error, *parts.split(" | "), kept=call)


FORGOTTEN = {
    "config": "lacks config, the options",
    "state": "lacks state, from adamw_init(params, config) or the step before",
    "grads": "lacks grads, the gradients",
}


@pytest.mark.parametrize(("name", "what"), FORGOTTEN.items())
def test_arguments_that_are_forgotten(refused: Any, name: str, what: str) -> None:
    call = {"params": PARAMS, "grads": PARAMS, "state": STATE, "config": CONFIG}
    del call[name]
    refused(lambda: ax.adamw_step(**call), TypeError, "adamw_step: " + what, ORDER)


ORDERS = [x for x in itertools.permutations(range(4)) if x[2:] != (2, 3)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_other_order(refused: Any, order: tuple[int, ...]) -> None:
    arguments = PARAMS, PARAMS, STATE, CONFIG
    given = [arguments[i] for i in order]
    refused(lambda: ax.adamw_step(*given), TypeError, "got a", "the order is " + ORDER)


def test_a_rate_by_position(refused: Any) -> None:
    call: Any = functools.partial(ax.adamw_step, PARAMS, PARAMS, STATE, CONFIG, 0.1)
    refused(call, TypeError, "got 5 arguments by position", "has 4", "learning_rate, weight")


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_errors_of_the_callers_own_functions_pass(error: type[Exception]) -> None:
    def schedule(count: Any) -> Any:
        raise error("mine")

    with pytest.raises(error, match=r"^mine$"):
        ax.adamw_step(PARAMS, PARAMS, STATE, ax.AdamW(schedule))


# ------------------------------------------------------------- advice that is followed

NEW: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "use_ema": {"use_ema": True},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "skip_nonfinite": {"skip_nonfinite": True},
    "skip_spikes": {"skip_spikes": ax.SpikeRule(window=4)},
}


def followed(text: str, pattern: str, **names: Any) -> Any:
    """What the code in an error's text makes."""
    found = re.search(pattern, text)
    assert found, text
    known = {"adamw_xla": ax, "adamw_init": ax.adamw_init, "optax": optax, "jax": jax}
    return eval(found[0], known | names)


@pytest.mark.parametrize("name", NEW)
def test_a_state_of_other_options_keeps_its_moments(refused: Any, name: str) -> None:
    options = ax.AdamW(**NEW[name])
    _, full = ax.adamw_step(PARAMS, PARAMS, ax.adamw_init(PARAMS, options), options)
    for state, config, does in ((STATE, options, "sets"), (full, CONFIG, "does not set")):
        text = refused(
            functools.partial(ax.adamw_step, PARAMS, PARAMS, state, config),
            ValueError,
            f"the config {does} {name}",
            "built for another config",
            "keeps the moments",
        )
        names = {"params": PARAMS, "config": config, "state": state}
        new = followed(text, r"adamw_xla\.adapt_state\(.*?\)(?= (adds|drops))", **names)
        assert (new.m, new.v, new.count) == (state.m, state.v, state.count)
        ax.adamw_step(PARAMS, PARAMS, new, config)


HELD = {"optax' state", "the drop-in's state", "the state in a dict"}


@pytest.mark.parametrize("name", [*(f"restored: {x}" for x in RESTORED), *sorted(HELD)])
def test_a_state_without_its_class_keeps_its_moments(refused: Any, name: str) -> None:
    changed, error, _ = STEPS[name]
    call = {"params": PARAMS, "grads": PARAMS, "config": CONFIG} | changed
    text = refused(lambda: ax.adamw_step(**call), error)
    new = followed(text, r"(adamw_xla\.\S*\(.*\)(?= (has|makes)))|state(\[|\.)\S+(?= is)", **call)
    assert jax.tree.structure(new) == jax.tree.structure(STATE)
    jax.tree.map(np.testing.assert_array_equal, new, STATE)
    ax.adamw_step(**call | {"state": new})


def test_a_mask_of_numbers_becomes_one_of_bools(refused: Any) -> None:
    numbers = masked(b=0).weight_decay_mask
    with pytest.raises(TypeError) as caught:
        ax.adamw_step(PARAMS, PARAMS, STATE, masked(b=0))
    bools = followed(str(caught.value), r"jax\.tree\.map\(.*?\)", weight_decay_mask=numbers)
    ax.adamw_step(PARAMS, PARAMS, STATE, ax.AdamW(weight_decay_mask=bools))
