"""Groups that are frozen: no gradient is looked at, no state is there, nothing moves."""

from __future__ import annotations

import dataclasses
from typing import Any

from comparing import same
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import tree

import adamw_xla as ax

FROZEN = (ax.Group("^b/0", frozen=True),)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"global_clipnorm": 0.25, "skip_nonfinite": True},
    "every field": {"use_ema": True, "amsgrad": True, "gradient_accumulation_steps": 2},
    "words": {"state_format": "word16", "master": "split"},
}


def without(value: Any) -> Any:
    """A tree without the leaf that is frozen; of a state, in all of its fields."""
    if isinstance(value, ax.AdamWState):
        fields = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
        return ax.AdamWState(**{name: without(x) for name, x in fields.items()})
    return {"w": value["w"], "b": [None, value["b"][1]]} if isinstance(value, dict) else value


@pytest.mark.parametrize("given", ["NaN", "None", "another shape"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_frozen_leaf_is_as_if_it_were_not_there(options: dict[str, Any], given: str) -> None:
    config, plain = ax.AdamW(groups=FROZEN, **options), ax.AdamW(**options)
    params, grads = tree(), tree(1)
    grads["b"][0] = {"NaN": jnp.full(2, np.nan), "None": None, "another shape": jnp.ones(7)}[given]
    state = ax.adamw_init(params, config)
    same(state, ax.adamw_init(without(params), plain))
    new, new_state = ax.adamw_step(params, grads, state, config)
    assert new["b"][0] is params["b"][0]
    wanted = ax.adamw_step(without(params), without(grads), without(state), plain)
    same((without(new), new_state), wanted)


def test_what_is_frozen_in_mid_training_keeps_its_state_until_it_is_adapted() -> None:
    def mask(params: Any) -> Any:
        assert params["b"][0] is None
        return jax.tree.map(lambda p: True, params)

    plain, config = ax.AdamW(), ax.AdamW(groups=FROZEN, weight_decay_mask=mask)
    params, state = ax.adamw_step(tree(), tree(1), ax.adamw_init(tree(), plain), plain)
    new, kept = ax.adamw_step(params, tree(2), state, config)
    assert kept.m["b"][0] is state.m["b"][0]
    assert new["b"][0] is params["b"][0]
    adapted = ax.adapt_state(state, params, config)
    same(adapted, without(state))
    same(ax.adamw_step(params, tree(2), adapted, config)[0], new)
    with pytest.raises(ValueError, match=r"state\.m\['b'\]\[0\]: lacks a leaf"):
        ax.adamw_step(params, tree(2), adapted, plain)


def test_what_is_no_float_may_be_frozen() -> None:
    params = {"step": jnp.arange(3), "w": jnp.ones(2)}
    config = ax.AdamW(groups=(ax.Group("step", frozen=True),))
    state = ax.adamw_init(params, config)
    new, _ = ax.adamw_step(params, {"step": None, "w": jnp.ones(2)}, state, config)
    assert new["step"] is params["step"]


def test_shapes_and_shardings_have_no_place_for_it_either() -> None:
    config = ax.AdamW(groups=FROZEN, use_ema=True)
    params = tree()
    state = ax.adamw_init(params, config)
    places = ax.sharding.state_shardings(params, config)
    structure = jax.tree.structure(state)
    assert jax.tree.structure(places) == structure
    assert jax.tree.structure(ax.sharding.abstract_state(params, config)) == structure
    shardings = jax.tree.map(lambda x: x.sharding, params)
    assert jax.tree.structure(ax.sharding.state_shardings(shardings, config)) == structure
    same(jax.device_put(state, places), state)
    new, _ = ax.adamw_step(params, tree(1), state, config, state_shardings=places)
    same(new, ax.adamw_step(params, tree(1), state, config)[0])
    same(ax.adamw_finalize(params, state, config), params)
    called = ax.AdamW(groups=(ax.Group(lambda path, leaf: leaf.ndim == 2, frozen=True),))
    assert ax.sharding.state_shardings(params, called).m["w"] is None
    with pytest.raises(TypeError, match=r"tree of shardings.*called with leaves; give params"):
        ax.sharding.state_shardings(shardings, called)
