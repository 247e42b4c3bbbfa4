"""Groups of leaves with numbers of their own: against the oracle, peers, and a step by hand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from checks.steps import NONE, TREE, errors, random_array
from comparing import close, same
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
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
OWNERS = [0, 1, None, 1, 2, 3]
"""For each leaf of ``TREE`` its group; one has none."""

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "independent_decay": {"decay_times_lr": False, "amsgrad": True, "nesterov": True},
    "accumulated": {"gradient_accumulation_steps": 2, "loss_scale_factor": 4.0, "clipvalue": 0.5},
    "masked": {
        "epsilon_hat": False,
        "epsilon_root": 1e-3,
        "use_ema": True,
        "ema_momentum": 0.75,
        "weight_decay_mask": [True, False, True, True, True, False],
        "clipnorm": 0.5,
        "maximize": True,
        "cautious_decay": True,
    },
}


def alone(config: ax.AdamW, owner: int | None) -> ax.AdamW:
    """The config that the leaves of a group would have by themselves."""
    mask = config.weight_decay_mask
    kept = {"weight_decay_mask": None if mask is None else part(mask, owner), "groups": ()}
    if owner is None:
        return dataclasses.replace(config, **kept)
    group = GROUPS[owner]
    numbers = {name: getattr(group, name) for name in ax.Group.NUMBERS}
    own = {name: value for name, value in numbers.items() if value is not None}
    scale, rate = own.pop("scale", 1.0), own.get("learning_rate", config.learning_rate)
    own["learning_rate"] = (lambda k: rate(k) * scale) if callable(rate) else rate * scale
    return dataclasses.replace(config, **own, **kept)


def part(value: Any, owner: int | None) -> Any:
    """Of a list of all leaves those of one group; of a state that of these leaves."""
    if isinstance(value, ax.AdamWState):
        fields = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
        return ax.AdamWState(**{name: part(x, owner) for name, x in fields.items()})
    if not isinstance(value, list):
        return value
    return [x for x, its in zip(value, OWNERS, strict=True) if its == owner]


STEPS = [
    *((name, ax.adamw_step) for name in OPTIONS if name != "plain"),
    ("plain", ax.reference.adamw_step),
]


@pytest.mark.parametrize(("name", "step"), STEPS, ids=[name for name, _ in STEPS])
def test_each_group_is_an_optimizer_of_its_own(name: str, step: Any) -> None:
    options = OPTIONS[name]
    config = ax.AdamW(0.25, 0.125, groups=GROUPS, **options)
    step = jax.jit(step)  # the config is traced
    rng = np.random.default_rng(0)
    params = [jnp.asarray(random_array(rng, shape, dtype)) for shape, dtype, _ in TREE]
    state = ax.adamw_init(params, config)
    for _ in range(3):
        grads = [jnp.asarray(random_array(rng, shape, dtype)) for shape, _, dtype in TREE]
        new, new_state = step(params, grads, state, config)
        for owner in (None, *range(len(GROUPS))):
            of = functools.partial(part, owner=owner)
            before, after = map(of, (params, grads, state)), map(of, (new, new_state))
            for what, off in errors(*before, alone(config, owner), *after, slack=NONE):
                assert off <= 1, f"{what} of group {owner}: {off:.2f} times as far as allowed"
        params, state = new, new_state


# ------------------------------------------------------------------------------- peers

PATHS = {str(i): shape for i, shape in enumerate(peers.SHAPES)}
RATES = {"0": (peers.LR, peers.B1, peers.WD), "[12]": (4 * peers.LR, 0.75, 0.0)}
"""For each pattern a rate, beta_1 and decay; what is left has four times the decay."""


def grouped() -> tuple[ax.Group, ...]:
    return tuple(
        ax.Group(pattern, learning_rate=rate, beta_1=beta, weight_decay=decay)
        for pattern, (rate, beta, decay) in RATES.items()
    )


def by_path(leaves: Any) -> dict[str, Any]:
    return dict(zip(PATHS, map(jnp.asarray, leaves), strict=True))


def optax_partition() -> Any:
    pairs = {"0": 0, "1": 1, "2": 1, "3": 2}
    kinds = [*RATES.values(), (peers.LR, peers.B1, 4 * peers.WD)]
    parts = {
        i: optax.adamw(rate, beta, peers.B2, weight_decay=decay)
        for i, (rate, beta, decay) in enumerate(kinds)
    }
    return optax.partition(parts, pairs)


def ours_by_optax() -> Any:
    return axo.adamw(peers.LR, peers.B1, peers.B2, weight_decay=4 * peers.WD, groups=grouped())


def trained(solver: Any, params: Any, grads: Any) -> Any:
    @jax.jit
    def step(params: Any, grads: Any, state: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = by_path(params)
    state = solver.init(params)
    for g in grads:
        params, state = step(params, by_path(g), state)
    return params.values()


def torch_groups(params: Any, grads: Any) -> Any:
    torch = pytest.importorskip("torch", reason="pip finds no CPU build of it for this Python")
    leaves = [torch.nn.Parameter(torch.from_numpy(np.array(p))) for p in params]
    kinds = [*RATES.values(), (peers.LR, peers.B1, 4 * peers.WD)]
    members = [leaves[:1], leaves[1:3], leaves[3:]]
    optimizer = torch.optim.AdamW(
        {"params": own, "lr": rate, "betas": (beta, peers.B2), "weight_decay": decay}
        for own, (rate, beta, decay) in zip(members, kinds, strict=True)
    )
    for g in grads:
        for p, x in zip(leaves, g, strict=True):
            p.grad = torch.from_numpy(np.asarray(x))
        optimizer.step()
    return [p.detach().numpy() for p in leaves]


def by_partition(params: Any, grads: Any) -> Any:
    return trained(optax_partition(), params, grads)


@pytest.mark.parametrize("theirs", [by_partition, torch_groups])
def test_as_optax_partition_and_torch_param_groups(theirs: Any) -> None:
    params, grads = peers.problem(20)
    peers.close(trained(ours_by_optax(), params, grads), theirs(params, grads))


def test_independent_decay_as_a_chain_that_decays_behind_the_rate() -> None:
    """With a schedule for the rate, and one of its own for the decay."""

    def rate(count: Any) -> Any:
        return peers.LR / (1 + count)

    def decay(count: Any) -> Any:
        return 1e-3 * (1 + count)

    def minus_decay(count: Any) -> Any:
        return -decay(count)

    theirs = optax.chain(
        optax.scale_by_adam(peers.B1, peers.B2),
        optax.scale_by_learning_rate(rate),
        optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=minus_decay),
    )
    ours = axo.adamw(rate, peers.B1, peers.B2, weight_decay=decay, decay_times_lr=False)
    params, grads = peers.problem(20)
    peers.close(trained(ours, params, grads), trained(theirs, params, grads))


# ----------------------------------------------------------------------- traced numbers

TWO = (
    ax.Group("^b", learning_rate=0.5, beta_1=0.5, epsilon=0.0),
    ax.Group("w", weight_decay=0.5, scale=2.0),
)


def step_with(config: ax.AdamW, **overrides: Any) -> Any:
    params = tree()
    return ax.adamw_step(params, tree(1), ax.adamw_init(params, config), config, **overrides)


def test_a_changed_number_does_not_recompile() -> None:
    @jax.jit
    def step(config: ax.AdamW) -> Any:
        traces.append(config)
        return step_with(config)

    traces: list[ax.AdamW] = []
    bias, matrix = TWO
    changes = {"learning_rate": 0.25, "beta_1": 0.75, "epsilon": 1e-3}
    others = (dataclasses.replace(bias, **changes), dataclasses.replace(matrix, scale=3.0))
    for groups in (TWO, others):
        config = ax.AdamW(groups=groups)
        close(step(config), jax.jit(functools.partial(step_with, config))())
    assert len(traces) == 1
    step(ax.AdamW(groups=(dataclasses.replace(bias, match="b/"), matrix)))  # a match is static
    assert len(traces) == 2


def test_a_rate_is_batched() -> None:
    def step(rate: Any) -> Any:
        return step_with(ax.AdamW(groups=(dataclasses.replace(TWO[0], learning_rate=rate), TWO[1])))

    rates = jnp.array([0.5, 0.125])
    close(jax.vmap(step)(rates), jax.tree.map(lambda *x: jnp.stack(x), *map(step, rates)))


def test_an_override_is_of_the_config_alone() -> None:
    config = ax.AdamW(0.125, 0.25, groups=TWO)
    plain, _ = step_with(ax.AdamW(1.0, 0.125, groups=TWO))
    same(step_with(config, learning_rate=1.0, weight_decay=0.125)[0], plain)
    scaled, _ = step_with(ax.AdamW(2.0, 0.5))
    close(plain["w"], scaled["w"])
    own, _ = step_with(ax.AdamW(0.5, 0.125, beta_1=0.5, epsilon=0.0))
    close(plain["b"], own["b"])


# ------------------------------------------------------------------ what is not computed


@pytest.mark.parametrize("mask", [None, {"w": True, "b": False}], ids=["", "masked"])
def test_one_group_costs_no_operation(mask: Any) -> None:
    whole = ax.Group("", learning_rate=0.001, beta_1=0.9, epsilon=1e-7)
    configs = [ax.AdamW(weight_decay_mask=mask, groups=groups) for groups in ((), (whole,))]
    plain, grouped = (
        str(
            jax.make_jaxpr(lambda p, g, s, c=c: ax.adamw_step(p, g, s, c))(
                tree(), tree(1), ax.adamw_init(tree(), c)
            )
        )
        for c in configs
    )
    assert grouped == plain
    assert plain.count(" div ") == 1  # rows that differ in their decay alone share the rest


def test_groups_are_rows_of_one_equation() -> None:
    config = ax.AdamW(groups=TWO, weight_decay_mask={"w": True, "b": [True, False]})
    (equation,) = equations(jax.make_jaxpr(functools.partial(step_with, config))().jaxpr)
    assert equation.invars[0].aval.shape[0] == 3


# ----------------------------------------------------------------------------- optax


def test_the_drop_in_for_optax_has_the_same_groups() -> None:
    groups = (dataclasses.replace(TWO[0], learning_rate=0.25), ax.Group("w", frozen=True))
    config = ax.AdamW(0.5, 0.25, epsilon=1e-8, epsilon_hat=False, groups=groups)
    solver = axo.adamw(0.5, weight_decay=0.25, groups=groups)
    params, grads = tree(), tree(1)
    state = solver.init(params)
    same(state.native(), ax.adamw_init(params, config))
    updates, _ = jax.jit(solver.update)(grads, state, params)
    close(optax.apply_updates(params, updates), step_with(config)[0])
    assert not np.any(updates["w"])
    bare, _ = solver.update(grads | {"w": None}, state, params)
    assert bare["w"] is None
