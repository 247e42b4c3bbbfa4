"""Mistakes with the drop-in for optax, answered in optax' words."""

from __future__ import annotations

from collections.abc import Callable
import functools
import importlib
import importlib.util
import re
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
LOSS = jnp.float32(2.0)
OURS, STOCK = axo.adamw(0.1), optax.adamw(0.1)
_, STATE = OURS.update(PARAMS, OURS.init(PARAMS), PARAMS)
_, STOCK_STATE = STOCK.update(PARAMS, STOCK.init(PARAMS), PARAMS)
NATIVE_STATE = ax.adamw_init(PARAMS, ax.AdamW())
ORDER = "update(grads, opt_state, params)"
FROM_OPTAX = "from_optax_state(opt_state, init(params))"

KEYWORDS = {
    "lr": "here it is learning_rate.",
    "beta_1": "here it is b1.",
    "beta1": "here it is b1.",
    "beta_2": "here it is b2.",
    "betas": "here it is b1 and b2.",
    "epsilon": "here it is eps.",
    "epsilon_root": "here it is eps_root.",
    "wd": "here it is weight_decay.",
    "weight_decay_mask": "here it is mask.",
    "state_dtype": "here it is mu_dtype.",
    "max_norm": "here it is global_clipnorm.",
    "every_k_schedule": "here it is gradient_accumulation_steps.",
    "return_info": "here it is keep_info.",
    "has_aux": "here it is keep_info.",
    "weight_deca": "did you mean weight_decay?",
    "fused": "it has learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask",
}


@pytest.mark.parametrize(("keyword", "advice"), KEYWORDS.items())
def test_keywords(refused: Any, keyword: str, advice: str) -> None:
    call: Any = functools.partial(axo.adamw, 0.1, **{keyword: 0.5})
    refused(call, TypeError, f"adamw: has no argument {keyword}", advice)


def update(grads: Any = PARAMS, state: Any = STATE, params: Any = PARAMS, ours: Any = OURS) -> Any:
    return lambda: ours.update(grads, state, params)


Call = Callable[[], Any]
WIDE = {"w": jnp.ones((2, 4)), "b": jnp.ones(3)}
MASK = axo.adamw(0.1, mask={"w": 1, "b": 0})
# the mistake -> the error; what it was, where and what to do, as the message says it
CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    "no rate": (lambda: axo.adamw(), TypeError, "lacks learning_rate | adamw(learning_rate)"),  # type: ignore[call-arg]
    "the rate is None": (lambda: axo.adamw(None), TypeError, "learning_rate | None | 0 is for"),
    "no decay": (
        lambda: axo.adamw(0.1, weight_decay=None),
        TypeError,
        "weight_decay | got None | 0 is for none",
    ),
    "no eps": (lambda: axo.adamw(0.1, eps=None), TypeError, "eps | got None | 0 is for none"),  # type: ignore[arg-type]
    "no b1": (lambda: axo.adamw(0.1, b1=None), TypeError, "b1 | got None | leave it out"),  # type: ignore[arg-type]
    "a scheduled b2": (
        lambda: axo.adamw(0.1, b2=lambda count: 0.9),  # type: ignore[arg-type]
        TypeError,
        "b2 | real number | learning_rate and weight_decay alone",
    ),
    "what makes schedules": (
        lambda: axo.adamw(optax.cosine_decay_schedule),
        TypeError,
        "learning_rate | with the step count alone | call it, and pass what it returns",
    ),
    "grads alone": (lambda: OURS.update(PARAMS), TypeError, f"update | lacks state | {ORDER}"),
    "no params": (update(params=None), ValueError, f"params | is None | {ORDER}"),
    "params for the state": (
        update(state=PARAMS, params=None),
        TypeError,
        f"opt_state | got dict | {ORDER}",
    ),
    "state and params swapped": (
        update(state=PARAMS, params=STATE),
        TypeError,
        f"opt_state must be | params: got an AdamWOptState | {ORDER}",
    ),
    "grads and state swapped": (
        update(STATE, PARAMS),
        TypeError,
        f"opt_state must be | grads: got an AdamWOptState | {ORDER}",
    ),
    "not unpacked": (
        update(state=OURS.update(PARAMS, STATE, PARAMS)),
        TypeError,
        "opt_state | got a tuple of 2, the second an AdamWOptState | returns (updates, opt_state)",
    ),
    "value and grads": (
        update((LOSS, PARAMS)),
        ValueError,
        "grads | got a tuple of 2, the first a scalar | jax.value_and_grad returns (value, grads)",
    ),
    "the loss": (update(LOSS), ValueError, "grads | is a scalar | jax.grad(loss_function)"),
    "init of a state": (
        lambda: OURS.init(STATE),
        TypeError,
        "params | AdamWOptState | init(params)",
    ),
    "optax' state": (update(state=STOCK_STATE), TypeError, f"opt_state | tuple | {FROM_OPTAX}"),
    "the part of optax' state": (
        update(state=STOCK_STATE[0]),
        TypeError,
        f"opt_state | ScaleByAdamState | {FROM_OPTAX}",
    ),
    "the native state": (
        update(state=NATIVE_STATE),
        TypeError,
        f"opt_state | adamw_xla.AdamWState | {FROM_OPTAX}",
    ),
    "a restored dict": (
        update(state=STATE._asdict()),
        TypeError,
        "opt_state | got dict | AdamWOptState(**opt_state)",
    ),
    "a restored list": (
        update(state=[*STATE]),
        TypeError,
        "opt_state | got list | AdamWOptState(*opt_state)",
    ),
    "a restored chain": (
        update(state={"0": None, "1": STATE._asdict()}),
        TypeError,
        "opt_state['1'] looks like one | AdamWOptState(**opt_state['1']) has the same moments",
    ),
    "a restored native state": (
        update(state=vars(NATIVE_STATE)),
        TypeError,
        "opt_state must be | from_optax_state(adamw_xla.AdamWState(**opt_state), init(params)) ma",
    ),
    "a later version's": (
        update(state=STATE._asdict() | {"shampoo": LOSS}),
        TypeError,
        "opt_state must be | with 'shampoo', which this version of adamw_xla does not know",
    ),
    "a part of a restored state": (
        update(state={"count": STATE.count, "nu": STATE.nu, "ema": None}),
        TypeError,
        "opt_state must be | lacks 'mu', which each state has",
    ),
    "other shapes": (
        update(state=OURS.init(WIDE)),
        ValueError,
        "has shape (2, 4) | opt_state.mu['w'] | must be (2, 3), the shape of params['w']",
    ),
    "other params": (
        update(state=OURS.init({"w": PARAMS["w"]})),
        ValueError,
        "lacks ['b'] | opt_state.mu | the tree structure of params",
    ),
    "integer moments": (
        update(state=STATE._replace(nu=jax.tree.map(lambda x: x.astype(int), PARAMS))),
        TypeError,
        "int32 | opt_state.nu['b'] | must be bfloat16",
    ),
    "a float's count": (
        update(state=STATE._replace(count=1.0)),
        TypeError,
        "opt_state.count | got 1.0 | jax.numpy.int32(...)",
    ),
    "complex params": (
        lambda: OURS.init({"b": jnp.ones(3, complex)}),
        TypeError,
        "params['b'] | complex64 | optax.contrib.split_real_and_imaginary",
    ),
    "shapes for grads": (
        update(jax.eval_shape(lambda: PARAMS)),
        TypeError,
        "grads['b'] | ShapeDtypeStruct | pass arrays",
    ),
    "like and state swapped": (
        lambda: axo.from_optax_state(STATE, STOCK_STATE),
        TypeError,
        "like | has 0 states of AdamW | It is a new state, to be filled: init(params)",
    ),
    "params for like": (
        lambda: axo.to_optax_state(STATE, PARAMS),
        TypeError,
        "like | has 0 states of AdamW | It is a new state, to be filled: init(params)",
    ),
    "nothing to fill": (
        lambda: axo.from_optax_state(STOCK_STATE),
        TypeError,
        "from_optax_state | lacks like, a new state to be filled | init(params)",
    ),
    "nothing to fill there": (
        lambda: axo.to_optax_state(STATE),
        TypeError,
        "to_optax_state | lacks like, a new state to be filled | init(params)",
    ),
    "no optimizer of ours": (
        lambda: axo.from_optax_state(optax.sgd(0.1).init(PARAMS), STATE),
        TypeError,
        "opt_state | has 0 states of AdamW | It must be a state of optax.adamw",
    ),
    "ones and zeros": (
        update(ours=MASK),
        TypeError,
        "mask['b'] | got 0 | jax.tree.map(bool, mask)",
    ),
    "a mask of other params": (
        update(ours=axo.adamw(0.1, mask={"w": True})),
        ValueError,
        "mask | lacks ['b'] | the tree structure of params",
    ),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_calls(refused: Any, case: Any) -> None:
    call, error, parts = case
    text = refused(call, error, *parts.split(" | "), kept=(PARAMS, STATE, STOCK_STATE))
    native = (
        r"adamw_init|adamw_step|weight_decay_mask|\bconfig\b|state\.(m|v|v_max)\b|beta_|epsilon"
    )
    assert not re.search(native, text), text


OPTIONS: dict[str, dict[str, Any]] = {
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
    return eval(found[0], {"adamw_xla": ax, "optax": optax, **names})


@pytest.mark.parametrize("name", OPTIONS)
def test_a_state_of_other_options_keeps_its_moments(refused: Any, name: str) -> None:
    other = axo.adamw(0.1, **OPTIONS[name])
    _, full = other.update(PARAMS, other.init(PARAMS), PARAMS)
    for state, ours, does in ((STATE, other, "sets"), (full, OURS, "does not set")):
        text = refused(update(state=state, ours=ours), ValueError, f"but adamw {does} {name}")
        pattern = r"opt_state\._replace\(.*\)(?= (adds|drops))"
        new = followed(text, pattern, opt_state=state, init=ours.init, params=PARAMS)
        assert (new.mu, new.nu, new.count) == (state.mu, state.nu, state.count)
        ours.update(PARAMS, new, PARAMS)


# ------------------------------------------------------------------- from_optax_state

ADAM = STOCK_STATE[0]
RESTORED: dict[str, Any] = {
    "lists and dicts": [ADAM._asdict(), None, None],  # Orbax
    "dicts": flax.serialization.to_state_dict(STOCK_STATE),  # msgpack
    "tuples": (tuple(ADAM), (), ()),
    "in a chain": ((), [tuple(ADAM)]),
    "Python counts": [{**ADAM._asdict(), "count": 1}],
    "ours": {"opt": {**STATE._asdict()}},
    "native": [vars(NATIVE_STATE)],
}


@pytest.mark.parametrize("name", RESTORED)
def test_what_a_checkpoint_returned_without_its_class(refused: Any, name: str) -> None:
    opt_state = RESTORED[name]
    text = refused(
        lambda: axo.from_optax_state(opt_state, OURS.init(PARAMS)),
        TypeError,
        "opt_state: has 0 states of AdamW",
        "looks like one that a checkpoint returned without its class",
        "Restore it with a template",
        "the same moments",
    )
    part = followed(text, r"(optax|adamw_xla)\.\S+State\(\*.*\)(?=, which)", opt_state=opt_state)
    moved = axo.from_optax_state(part, OURS.init(PARAMS))
    wanted = {"ours": STATE, "native": axo.AdamWOptState.of(NATIVE_STATE)}.get(name, ADAM)
    for x, y in zip(moved, wanted, strict=False):
        jax.tree.map(np.testing.assert_array_equal, x, y)
    jax.tree.map(np.testing.assert_array_equal, moved.mu, wanted.mu)


@pytest.mark.parametrize("ours", [OURS, axo.adamw(0.1, use_ema=True)], ids=["adamw", "use_ema"])
def test_leaves_in_other_containers(refused: Any, ours: Any) -> None:
    """Of a tuple of twelve, Flax makes a dict, in which "10" stands before "2"."""
    params = tuple(jnp.full(3, float(i)) for i in range(12))
    _, state = ours.update(params, ours.init(params), params)
    restored = axo.AdamWOptState(**flax.serialization.to_state_dict(state))
    call = update(params, restored, params, ours)
    text = refused(call, ValueError, "opt_state.mu", "in other containers", "puts them into")
    pattern, init = r"adamw_xla\.optax\.\S+\(.*\)(?= puts)", ours.init
    moved = followed(text, pattern, opt_state=restored, init=init, params=params)
    jax.tree.map(np.testing.assert_array_equal, moved, state)
    ours.update(params, moved, params)


@pytest.mark.parametrize("count", [1, np.int64(1), np.ones((), np.int32)], ids=repr)
def test_counts_that_a_checkpoint_may_bring(count: Any) -> None:
    for move, target in ((axo.from_optax_state, OURS), (axo.to_optax_state, STOCK)):
        like = target.init(PARAMS)
        moved = move((ADAM._replace(count=count),), like)
        assert jax.tree.structure(moved) == jax.tree.structure(like)
        (got,) = (x for _, x in optax.tree_utils.tree_get_all_with_path(moved, "count"))
        assert (got.dtype, got) == (np.int32, 1)


def test_shapes_and_fields_are_named_as_the_argument_has_them(refused: Any) -> None:
    like, amsgrad = OURS.init(WIDE), axo.adamw(0.1, amsgrad=True).init(PARAMS)
    call: Any = functools.partial(axo.from_optax_state, STOCK_STATE, like)
    refused(call, ValueError, "opt_state.mu['w']", "has shape (2, 3)", "must be (2, 4)")
    call = functools.partial(axo.to_optax_state, NATIVE_STATE, STOCK.init(WIDE))
    refused(call, ValueError, "state.m['w']", "has shape (2, 3)", "must be (2, 4)")
    call = functools.partial(axo.to_optax_state, amsgrad, STOCK.init(PARAMS))
    refused(call, ValueError, "state.nu_max", "no place for it", "state._replace(nu_max=None)")


# ------------------------------------------------------------------------ opt_state[0]


def test_the_state_reads_as_that_of_optax() -> None:
    assert (STATE[0].count, STATE[0].mu, STATE[0].nu) == (STATE.count, STATE.mu, STATE.nu)
    np.testing.assert_allclose(STATE[0].mu["w"], STOCK_STATE[0].mu["w"], rtol=1e-6)
    chained = optax.chain(optax.clip(1.0), OURS).init(PARAMS)
    assert chained[1][0].count == optax.chain(optax.clip(1.0), STOCK).init(PARAMS)[1][0].count
    later = STATE[0]._replace(count=jnp.int32(7))
    assert OURS.update(PARAMS, later, PARAMS)[1][0].count == 8


def test_the_state_is_a_tuple_of_its_fields_all_the_same() -> None:
    leaves, treedef = jax.tree.flatten(STATE)
    assert leaves[0] is STATE.count
    assert treedef.unflatten(leaves) == STATE
    assert tuple(STATE) == tuple(STATE._asdict().values())
    assert STATE[1:3] == (STATE.mu, STATE.nu)
    path, _ = jax.tree_util.tree_flatten_with_path(STATE)[0][0]
    assert jax.tree_util.keystr(path) == ".count"
    state_dict = flax.serialization.to_state_dict(STATE)
    again = flax.serialization.from_state_dict(OURS.init(PARAMS), state_dict)
    jax.tree.map(np.testing.assert_array_equal, again, STATE)


def test_without_optax_the_error_says_what_to_install(
    refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    said = ("adamw_xla.optax", "needs optax, which is not installed", "pip install 'optax>=0.2.5'")
    refused(lambda: importlib.reload(axo), ModuleNotFoundError, *said)
