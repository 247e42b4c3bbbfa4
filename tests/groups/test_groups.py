"""Groups of leaves with numbers of their own: against the oracle, and separate optimizers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from checks.steps import TREE, doubles, errors, random_array
from comparing import close, same
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import tree
from small import equations

import adamw_xla as ax
import adamw_xla.optax as axo

# ------------------------------------------------------------------ against the oracle

GROUPS = (
    ax.Group("^0$", learning_rate=0.125, beta_1=0.75, beta_2=0.9375),
    ax.Group("^[13]$", scale=0.5, weight_decay=lambda count: 0.25 / (1 + count), epsilon=1e-3),
    ax.Group(lambda path, leaf: leaf.ndim == 3, weight_decay=0.0, beta_2=0.5),
    ax.Group("5", learning_rate=lambda count: 0.5 / (1 + count), scale=0.25),
)
"""Of ``TREE``; leaf 2 is of none."""

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pytorch": {"epsilon_hat": False, "amsgrad": True, "nesterov": True, "decay_times_lr": False},
    "masked": {
        "use_ema": True,
        "ema_momentum": 0.75,
        "weight_decay_mask": [True, False, True, True, True, False],
        "epsilon_root": 1e-3,
        "clipnorm": 0.5,
        "maximize": True,
        "cautious_decay": True,
    },
    "accumulated": {"gradient_accumulation_steps": 2, "loss_scale_factor": 4.0, "clipvalue": 0.5},
}


def of_group(config: ax.AdamW, group: ax.Group | None) -> ax.AdamW:
    """The config that a group's leaves would have by themselves."""
    numbers = {x: y for x in ax.Group.NUMBERS if (y := getattr(group, x, None)) is not None}
    scale = numbers.pop("scale", 1.0)
    rate = numbers.get("learning_rate", config.learning_rate)
    scaled = (lambda count: rate(count) * scale) if callable(rate) else rate * scale
    return dataclasses.replace(config, **numbers | {"learning_rate": scaled}, groups=())


@pytest.mark.parametrize(
    "step", [ax.adamw_step, ax.reference.adamw_step], ids=["ours", "reference"]
)
@pytest.mark.parametrize("chosen", OPTIONS.values(), ids=OPTIONS)
def test_each_group_is_an_optimizer_of_its_own(chosen: dict[str, Any], step: Any) -> None:
    config = ax.AdamW(0.25, 0.125, groups=GROUPS, **chosen)
    owners = [0, 1, None, 1, 2, 3]
    step = jax.jit(step)
    rng = np.random.default_rng(0)
    params = [jnp.asarray(random_array(rng, shape, dtype)) for shape, dtype, _ in TREE]
    state = ax.adamw_init(params, config)
    for _ in range(4):
        grads = [jnp.asarray(random_array(rng, shape, dtype)) for shape, _, dtype in TREE]
        new, new_state = step(params, grads, state, config)
        for owner in (None, *range(len(GROUPS))):
            own = [i for i, x in enumerate(owners) if x == owner]

            def part(x: Any, own: list[int] = own) -> Any:
                return [x[i] for i in own] if isinstance(x, list) else x

            def state_of(x: ax.AdamWState) -> ax.AdamWState:
                fields = {f.name: part(getattr(x, f.name)) for f in dataclasses.fields(x)}  # noqa: B023
                return ax.AdamWState(**fields)

            alone = of_group(config, None if owner is None else GROUPS[owner])
            alone = dataclasses.replace(alone, weight_decay_mask=part(config.weight_decay_mask))
            found = errors(
                *(part(params), part(grads), state_of(state), alone, part(new)),
                state_of(new_state),
                slack=Slack(),
            )
            for what, off in found:
                assert off <= 1, f"{what} of group {owner}: {off:.2f} times as far as allowed"
        params, state = new, new_state
