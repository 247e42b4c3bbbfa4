"""States in words, and remainders, that were saved, cast or moved: read as they are, or refused."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import re
from typing import Any

from comparing import same
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

WORDS = ax.AdamW(0.01, state_format="word16")


def tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"a": ((5, 16), jnp.bfloat16), "b": ((7,), np.float32)}
    return {k: jnp.asarray(rng.standard_normal(s), d) for k, (s, d) in shapes.items()}


def test_what_is_no_state_in_words_is_not_read_as_one() -> None:
    params = tree()
    state = ax.adamw_init(params, ax.AdamW(state_format="word16", master="split"))
    for dtype, advice in {
        "uint16": r"x\.view\(jax\.numpy\.\w+\)",
        "float32": "saved in\\.$",
    }.items():
        cast = jax.tree.map(lambda x, d=dtype: x.astype(d), state)
        with pytest.raises(TypeError, match=rf"^state\.words\['a'\]: has dtype {dtype}.*{advice}"):
            ax.unpack_state(cast)
        with pytest.raises(
            TypeError, match=rf"^state\.remainder\['a'\]: has dtype {dtype}.*{advice}"
        ):
            ax.master_params(params, cast)
    shapes = jax.eval_shape(lambda: state)
    for call, field in {
        lambda: ax.unpack_state(shapes): "words",
        lambda: ax.master_params(params, shapes): "remainder",
        lambda: ax.pack_state(jax.eval_shape(ax.unpack_state, state)): "m",
    }.items():
        with pytest.raises(TypeError, match=rf"^state\.{field}\['a'\]: is a jax\.ShapeDtypeStruct"):
            call()
    with pytest.raises(
        ValueError, match=r"^state\.remainder\['b'\]: has shape \(7,\); must be \(1,\)"
    ):
        ax.master_params(params | {"b": params["b"][:1]}, state)


@pytest.mark.parametrize("field", ["m", "v"])
def test_a_nan_becomes_no_word(field: str) -> None:
    """What is too large saturates, as documented; a NaN would be a number, so it is refused."""
    params = {"a": jnp.ones((5, 16)), "b": jnp.ones(7)}
    state = ax.adamw_init(params, ax.AdamW())
    large = dataclasses.replace(state, **{field: {"a": state.v["a"] + np.inf, "b": state.v["b"]}})
    bound = {"m": 15 * 2.0**-49, "v": 1.75 * 2.0**27}[field]
    assert np.all(getattr(ax.unpack_state(ax.pack_state(large)), field)["a"] == bound)
    nan = dataclasses.replace(
        state, **{field: {"a": state.v["a"].at[3, 1].set(np.nan), "b": state.v["b"]}}
    )
    stock = axo.to_optax_state(nan, optax.adamw(0.01).init(params))
    like, theirs = ax.adamw_init(params, WORDS), {"m": "mu", "v": "nu"}[field]
    calls: list[tuple[str, Callable[[], Any]]] = [
        (f"state.{field}", lambda: ax.pack_state(nan)),
        (f"state.{field}", lambda: ax.adapt_state(nan, params, WORDS)),
        (f"opt_state.{theirs}", lambda: axo.from_optax_state(stock, like)),
        (f"opt_state.{field}", lambda: axo.from_optax_state(nan, like)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=rf"^{re.escape(name)}\['a'\]: has a NaN, .*moments"):
            call()
    # Of a trace nothing is known; nor are the moments of a state that is to be filled looked at.
    same(jax.jit(ax.pack_state)(nan).words, jax.jit(lambda: ax.pack_state(nan))().words)
    ax.adapt_state(nan, params, ax.AdamW(use_ema=True))
    same(axo.from_optax_state(ax.pack_state(state), nan).v, state.v)


def test_a_state_in_host_memory_changes_its_format() -> None:
    """On the device, as ``pack_state`` and ``unpack_state`` do it: none computes in the host's."""
    params = tree()
    for options, other in ((ax.AdamW(), WORDS), (WORDS, ax.AdamW())):
        state = ax.adamw_init(params, options)
        there = jax.device_put(state, jax.memory.Space.Host)
        same(ax.adapt_state(there, params, other), ax.adapt_state(state, params, other))


def test_masters_of_params_in_other_containers() -> None:
    """As Flax' optimizer holds them, and a checkpoint returns them without a template."""
    params = tree()
    state = ax.adamw_init(params, ax.AdamW(master="split"))
    low = jax.tree.map(lambda x: x + 3, state.remainder)
    masters = ax.master_params(params, dataclasses.replace(state, remainder=low))
    lists = dataclasses.replace(state, remainder={k: [x] for k, x in low.items()})
    tuples = {k: (x,) for k, x in params.items()}
    same(ax.master_params(tuples, lists), {k: (x,) for k, x in masters.items()})


def test_words_that_a_checkpoint_returned_without_their_class() -> None:
    params, ours = tree(), axo.adamw(0.01, state_format="word16")
    state = ours.init(params)
    with pytest.raises(TypeError, match=r"adamw_xla\.optax\.AdamWOptState\(\*\*opt_state\) has"):
        ours.update(params, state._asdict(), params)
    fields = {"count": state.count, "words": state.words}
    with pytest.raises(TypeError, match=r"adamw_xla\.AdamWState\(\*\*state\) has the same moments"):
        ax.adamw_step(params, params, fields, WORDS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"AdamWOptState\(\*\*opt_state\) has the same moments"):
        ours.update(params, fields, params)
    fields = {**state._asdict(), "count": None}
    with pytest.raises(TypeError, match=r"lacks 'count', which each state has"):
        ours.update(params, fields, params)


def test_a_state_without_words_is_the_tree_that_it_was_before_there_were_any() -> None:
    """Orbax' templates, and what was exported, compare trees with all their fields."""
    params = jnp.ones(3)
    keys = jax.tree_util.tree_flatten_with_path(
        ax.adamw_init(params, ax.AdamW()), is_leaf=lambda x: x is None
    )[0]
    fields = ["count", "m", "v", "v_max", "ema", "accumulated", "micro_step", "skipped"]
    assert [key[0].name for key, _ in keys] == fields
    state = ax.adamw_init(params, WORDS)
    assert jax.tree.structure(jax.tree.map(lambda x: x, state)) == jax.tree.structure(state)
    # A whole field that is taken out keeps its place, as Equinox' partition needs.
    without = jax.tree.map(lambda x: x if x.dtype == np.int32 else None, state)
    merged = jax.tree.map(
        lambda a, b: b if a is None else a, without, state, is_leaf=lambda x: x is None
    )
    same(merged, state)
