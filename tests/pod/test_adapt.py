"""``adapt_state``: options that change in mid-training, and what checkpoints leave of a state."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from comparing import same
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import adamw_xla as ax

SHAPES = {"a": (4, 3), "b": (3,)}
# Moments that forget fast, so that what a maximum or an average begins with is seen.
COMMON: dict[str, Any] = {"learning_rate": 0.01, "beta_2": 0.5}
PLAIN = ax.AdamW(**COMMON)
OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "use_ema": {"use_ema": True, "ema_momentum": 0.5},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "skip_nonfinite": {"skip_nonfinite": True},
}
ALL = {name: value for options in OPTIONS.values() for name, value in options.items()}
FULL = ax.AdamW(**COMMON, **ALL)
ONE_BY_ONE = [pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
FIELDS = {field.name for field in dataclasses.fields(ax.AdamWState)}
FIELDS -= {"words", "remainder", "norms"}
"""Of a state of moments; ``tests/formats`` has the other ones, and ``tests/rules`` norms."""
BEFORE, AFTER = 5, 6


def grads(step: int) -> dict[str, Any]:
    """Ever smaller gradients, so that the largest second moment is the first."""
    rng = np.random.default_rng(step)
    return {k: np.float32(rng.standard_normal(s) / 2**step) for k, s in SHAPES.items()}


@functools.cache
def jitted(config: ax.AdamW) -> Any:
    return jax.jit(functools.partial(ax.adamw_step, config=config), donate_argnums=(0, 2))


def train(params: Any, state: Any, config: ax.AdamW, steps: range) -> Any:
    for k in steps:
        params, state = jitted(config)(params, grads(k), state)
    return params, state


def trained(config: ax.AdamW = PLAIN, steps: int = BEFORE) -> Any:
    params = jax.tree.map(jnp.asarray, grads(100))
    return train(params, ax.adamw_init(params, config), config, range(steps))


@pytest.mark.parametrize("name", [*ONE_BY_ONE, "all of them"])
def test_a_training_goes_on_by_the_formulas(name: str) -> None:
    """In float64: the maximum begins as v, the average as the params, a sum as zero."""
    turned = OPTIONS.get(name, ALL)
    wanted = [np.float64(x) for x in grads(100).values()]
    held, options = oracle.init(wanted), oracle.Options(**COMMON)
    for k in range(BEFORE):
        wanted, held, _ = oracle.step(wanted, [*grads(k).values()], held, options)
    held = dataclasses.replace(held, v_max=held.v, ema=wanted)
    options = oracle.Options(**COMMON, **turned)
    for k in range(BEFORE, BEFORE + AFTER):
        wanted, held, _ = oracle.step(wanted, [*grads(k).values()], held, options)

    params, state = trained()
    config = ax.AdamW(**COMMON, **turned)
    state = ax.adapt_state(state, params, config)
    params, state = train(params, state, config, range(BEFORE, BEFORE + AFTER))
    # Eleven steps, each of which rounds a param below 4 twice, and itself is below 0.02.
    atol = (BEFORE + AFTER) * 4 * 2**-24
    for field, leaves in {"params": wanted, "ema": held.ema, "v_max": held.v_max}.items():
        tree = params if field == "params" else getattr(state, field)
        if tree is not None:
            for got, want in zip(jax.tree.leaves(tree), leaves, strict=True):
                np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    counts = (held.count, held.micro_step, held.skipped)
    assert counts == (state.count, state.micro_step or 0, state.skipped or 0)


@pytest.mark.parametrize("name", [*ONE_BY_ONE, "all of them"])
def test_what_does_not_change_is_not_copied(name: str) -> None:
    params, state = trained(FULL)
    options = {k: x for k, x in ALL.items() if k not in OPTIONS.get(name, ALL)}
    less = ax.adapt_state(state, params, ax.AdamW(**COMMON, **options))
    dropped = {x for x in FIELDS if getattr(less, x) is None}
    wanted = {
        "amsgrad": {"v_max"},
        "use_ema": {"ema"},
        "gradient_accumulation_steps": {"accumulated", "micro_step"},
        "skip_nonfinite": {"skipped"},
    }
    assert dropped == wanted.get(name, set().union(*wanted.values()))
    again = ax.adapt_state(less, params, FULL)
    for field in FIELDS - dropped:
        for x, y in zip(*(jax.tree.leaves(getattr(s, field)) for s in (again, state)), strict=True):
            assert x is y
    # Nothing that is new is what it was copied from, or two arguments would be one buffer.
    train(params, again, FULL, range(1))


def test_under_jit_it_is_the_same() -> None:
    params, state = trained()
    adapted = ax.adapt_state(state, params, FULL)
    same(jax.jit(functools.partial(ax.adapt_state, config=FULL))(state, params), adapted)
    shapes = jax.eval_shape(functools.partial(ax.adapt_state, config=FULL), state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), adapted
    )


@pytest.mark.parametrize("of", ["the state", "the params", "both"])
def test_arrays_of_numpy_are_taken(of: str) -> None:
    """As a checkpoint returns them that is not told of devices."""
    params, state = trained()
    adapted = ax.adapt_state(state, params, FULL)
    params_, state_ = jax.tree.map(np.asarray, (params, state))
    given = {"the state": (state_, params), "the params": (state, params_)}.get(
        of, (state_, params_)
    )
    same(ax.adapt_state(*given, FULL), adapted)


def test_first_moments_are_cast() -> None:
    params, state = trained(FULL)
    narrow = ax.adapt_state(state, params, dataclasses.replace(FULL, state_dtype=jnp.bfloat16))
    same(narrow.m, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.m))
    same(dataclasses.replace(narrow, m=state.m), state)
    back = ax.adapt_state(narrow, params, FULL)
    same(back.m, jax.tree.map(lambda x: x.astype(jnp.float32), narrow.m))
    train(params, back, FULL, range(1))


def test_a_param_without_state_gets_none() -> None:
    params, state = trained()
    state = dataclasses.replace(state, m=state.m | {"b": None}, v=state.v | {"b": None})
    full = ax.adapt_state(state, params | {"b": len}, FULL)
    for field in ("m", "v", "v_max", "ema", "accumulated"):
        assert [k for k, x in getattr(full, field).items() if x is None] == ["b"]


# --------------------------------------------------------------- without their classes


class Pair(NamedTuple):
    z: Any
    a: Any


# Twelve of one shape: in a dict of strings "10" stands before "2"; and z before a.
NESTED = {"layers": tuple(jnp.full(3, float(i)) for i in range(12)), "pair": Pair(*jnp.eye(2))}


def as_dicts(tree: Any) -> Any:
    """What Orbax returns without a template: dicts for classes, lists for tuples."""
    if isinstance(tree, ax.AdamWState):
        return {name: as_dicts(x) for name, x in vars(tree).items()}
    if hasattr(tree, "_asdict"):
        return as_dicts(tree._asdict())
    if isinstance(tree, dict):
        return {name: as_dicts(tree[name]) for name in sorted(tree)}
    return [as_dicts(x) for x in tree] if isinstance(tree, tuple | list) else tree


LEFT: dict[str, Any] = {
    "dicts and lists": as_dicts,
    "dicts of strings": flax.serialization.to_state_dict,
    "NumPy, from bytes": lambda x: flax.serialization.msgpack_restore(
        flax.serialization.to_bytes(x)
    ),
    "a class of dicts": lambda x: ax.AdamWState(**as_dicts(x)),
    "fields in a list": lambda x: [*as_dicts(x).values()],
    "Python counts": lambda x: vars(x) | {"count": 1, "micro_step": 1, "skipped": 0},
    "without what is None": lambda x: {k: y for k, y in as_dicts(x).items() if y is not None},
}


@pytest.mark.parametrize("name", LEFT)
def test_each_leaf_goes_where_its_path_says(name: str) -> None:
    trees = {
        field: jax.tree.map(lambda x, k=k: x + 100 * k, NESTED)
        for k, field in enumerate(("m", "v", "v_max", "ema", "accumulated"))
    }
    state = ax.AdamWState(jnp.int32(1), **trees, micro_step=jnp.int32(1), skipped=jnp.int32(0))
    same(ax.adapt_state(LEFT[name](state), NESTED, FULL), state)

    words, remainder = (
        jax.tree.map(lambda x, d=d: x.astype(d), NESTED) for d in ("bfloat16", "i2")
    )
    state = ax.AdamWState(jnp.int32(1), words=words, remainder=remainder)
    config = ax.AdamW(**COMMON, state_format="word16", master="split")
    same(ax.adapt_state(LEFT[name](state), words, config), state)


def test_a_state_of_before_a_field_keeps_what_it_has() -> None:
    params, state = trained(FULL)
    old = {k: x for k, x in vars(state).items() if k not in ("micro_step", "skipped")}
    adapted = ax.adapt_state(old, params, FULL)
    zeros = {"micro_step": jnp.int32(0), "skipped": jnp.int32(0)}
    same(adapted, dataclasses.replace(state, **zeros))
