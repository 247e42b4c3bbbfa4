"""``vmap`` of the update: any operands, any axes, nested, and what must not be copied."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from comparing import close
import jax
import jax.numpy as jnp
import pytest
from small import CONFIG, equations, problem, step, tree

import adamw_xla as ax

KINDS = ("rate", "params", "grads", "m", "v")
SUBSETS = [c for n in range(1, 6) for c in itertools.combinations(KINDS, n)]
RATES = jnp.array([0.1, 0.01, 0.003], jnp.float32)


def step_of(rate: Any, params: Any, grads: Any, m: Any, v: Any) -> Any:
    state = ax.AdamWState(jnp.int32(4), m, v)
    params, state = ax.adamw_step(params, grads, state, ax.AdamW(), learning_rate=rate)
    return params, state.m, state.v


def operands(batched: Any, batch: tuple[int, ...] = (3,)) -> list[Any]:
    made = [RATES if "rate" in batched else RATES[0]]
    for seed, kind in enumerate(KINDS[1:]):
        x = tree(seed, batch if kind in batched else ())
        made.append(jax.tree.map(jnp.abs, x) if kind == "v" else x)
    return made


def pick(x: Any, i: int, axis: int | None) -> Any:
    return x if axis is None else jax.tree.map(lambda leaf: jnp.take(leaf, i, axis=axis), x)


@pytest.mark.parametrize("batched", SUBSETS, ids="-".join)
def test_vmap_of_any_subset(batched: tuple[str, ...]) -> None:
    args = operands(batched)
    axes = [0 if kind in batched else None for kind in KINDS]
    found = jax.jit(jax.vmap(step_of, in_axes=axes))(*args)
    for i in range(3):
        one = [pick(x, i, axis) for x, axis in zip(args, axes, strict=True)]
        close(pick(found, i, 0), jax.jit(step_of)(*one))


def test_vmap_makes_one_equation() -> None:
    batched = jax.vmap(step_of, in_axes=(0, 0, 0, None, 0))
    args = operands(("rate", "params", "grads", "v"))
    (eqn,) = equations(jax.make_jaxpr(batched)(*args).jaxpr)
    assert eqn.params["spec"].batch_rank == 1
    shapes = [x.aval.shape for x in eqn.invars]
    assert (1, 4, 3) in shapes  # m is not copied for each replica
    assert (3, 4, 3) in shapes


def test_vmap_of_other_axes() -> None:
    params, grads, state = problem()
    axes = {"a": 1, "b": 1, "c": 0}
    moved = {k: jnp.stack([grads[k], 2 * grads[k]], axis) for k, axis in axes.items()}

    def f(g: Any) -> Any:
        return step(params, g, state)[0]

    found = jax.vmap(f, in_axes=(axes,), out_axes=axes)(moved)
    for i in range(2):
        one = f({k: jnp.take(moved[k], i, axis) for k, axis in axes.items()})
        close({k: jnp.take(found[k], i, axis) for k, axis in axes.items()}, one)


def test_unbatched_leaves_stay_unbatched() -> None:
    params, grads, state = problem()
    many = jnp.stack([grads["a"], -grads["a"]])

    def f(g: Any) -> Any:
        new, _ = step(params, {**grads, "a": g}, state)
        return new["a"], new["b"], new["c"]

    a, b, c = jax.vmap(f, out_axes=(0, None, None))(many)
    assert (a.shape, b.shape, c.shape) == ((2, 4, 3), (3,), ())
    close((b, c), f(grads["a"])[1:])


def test_nested_vmap() -> None:
    params, _, state = problem()
    grads, rates = tree(5, (2, 3)), jnp.array([0.1, 0.2])

    def f(rate: Any, g: Any) -> Any:
        return ax.adamw_step(params, g, state, CONFIG, learning_rate=rate)[0]

    inner = jax.vmap(f, in_axes=(None, 0))
    found = jax.jit(jax.vmap(inner))(rates, grads)
    for i, j in itertools.product(range(2), range(3)):
        one = jax.tree.map(lambda g, i=i, j=j: g[i, j], grads)
        close(jax.tree.map(lambda x, i=i, j=j: x[i, j], found), f(rates[i], one))
    assert found["a"].shape == (2, 3, 4, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"clipnorm": 0.5},
        {"global_clipnorm": 0.5},
        {"clipvalue": 0.25},
        {"skip_nonfinite": True},
        {"gradient_accumulation_steps": 2},
        {"use_ema": True, "ema_overwrite_frequency": 1},
        {"weight_decay_mask": {"a": True, "b": False, "c": True}},
    ],
    ids=lambda o: next(iter(o)),
)
def test_a_population_is_a_loop_of_single_runs(options: dict[str, Any]) -> None:
    """Batched config numbers, each replica with its own state, three steps."""
    params, n = tree(0), 3
    grads = [tree(seed, (n,)) for seed in (1, 2, 3)]
    if "skip_nonfinite" in options:
        grads[1]["b"] = grads[1]["b"].at[1].set(jnp.nan)
    rates, betas = jnp.array([0.1, 0.01, 0.001]), jnp.array([0.5, 0.75, 0.875])

    def run(rate: Any, beta: Any, *grads: Any) -> Any:
        config = ax.AdamW(learning_rate=rate, beta_1=beta, **options)
        p, state = params, ax.adamw_init(params, config)
        for g in grads:
            p, state = ax.adamw_step(p, g, state, config)
        return p, state

    found = jax.jit(jax.vmap(run))(rates, betas, *grads)
    for i in range(n):
        one = [pick(g, i, 0) for g in grads]
        close(pick(found, i, 0), jax.jit(run)(rates[i], betas[i], *one))


def test_vmap_over_a_config() -> None:
    params, grads, state = problem(ax.AdamW())
    grid = [ax.AdamW(learning_rate=r, weight_decay=w) for r in (0.1, 0.2) for w in (0.0, 0.5)]
    stacked = jax.tree.map(lambda *x: jnp.asarray(x, jnp.float32), *grid)
    f = jax.jit(functools.partial(ax.adamw_step, params, grads, state))
    found, _ = jax.vmap(f)(stacked)
    for i, config in enumerate(grid):
        close(pick(found, i, 0), f(config)[0])
