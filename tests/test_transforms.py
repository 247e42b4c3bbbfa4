"""The update under JAX's transformations; each test fails where its rule is missing."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
from jax import export
from jax.interpreters import partial_eval as pe
import jax.numpy as jnp
import numpy as np
import pytest

import adamw_xla as ax
from adamw_xla.lowering import UpdateNotDifferentiableError, adamw_update_p

CONFIG = ax.AdamW(learning_rate=0.01, amsgrad=True, use_ema=True)
SHAPES = {"a": (4, 3), "b": (3,), "c": ()}


def tree(seed: int, batch: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.standard_normal((*batch, *s)), jnp.float32) for k, s in SHAPES.items()
    }


def problem(config: ax.AdamW = CONFIG) -> tuple[Any, Any, ax.AdamWState]:
    params = tree(0)
    return params, tree(1), ax.adamw_init(params, config)


def step(params: Any, grads: Any, state: Any) -> Any:
    return ax.adamw_step(params, grads, state, CONFIG)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=5e-7, atol=3e-8)


def equations(jaxpr: Any) -> list[Any]:
    """All update equations in a jaxpr and in those inside of it."""
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()))]
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive is adamw_update_p]
    for x in inner:
        if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
            found += equations(getattr(x, "jaxpr", x))
    return found


# ------------------------------------------------------------------------- jit and eager


def test_one_equation_for_the_whole_tree() -> None:
    assert len(equations(jax.make_jaxpr(step)(*problem()).jaxpr)) == 1


def test_eager_is_jit() -> None:
    args = problem()
    close(step(*args), jax.jit(step)(*args))


def test_donation_updates_in_place() -> None:
    params = {k: jnp.ones((256, 128)) for k in "abc"}
    state = ax.adamw_init(params, CONFIG)
    grads = jax.tree.map(jnp.ones_like, params)
    donating = jax.jit(step, donate_argnums=(0, 2))
    aliased = donating.lower(params, grads, state).compile().memory_analysis().alias_size_in_bytes
    # params, m, v, v_max and ema, all of them
    assert aliased >= 5 * sum(p.nbytes for p in params.values())
    donating(params, grads, state)
    donated = jax.tree.leaves((params, state.m, state.v, state.v_max, state.ema))
    assert all(x.is_deleted() for x in donated)
    assert not any(x.is_deleted() for x in grads.values())


def test_a_changed_number_does_not_retrace() -> None:
    traces = 0

    @jax.jit
    def count(params: Any, grads: Any, state: Any, config: ax.AdamW) -> Any:
        nonlocal traces
        traces += 1
        return ax.adamw_step(params, grads, state, config)

    args = problem(ax.AdamW())
    slow, _ = count(*args, ax.AdamW(learning_rate=0.001, beta_1=0.9))
    fast, _ = count(*args, ax.AdamW(learning_rate=0.1, beta_1=0.8, weight_decay=0.5, epsilon=1e-3))
    assert traces == 1
    assert not np.array_equal(slow["a"], fast["a"])
    count(*args, ax.AdamW(epsilon_hat=False))
    assert traces == 2


# ------------------------------------------------------------- scan, cond, checkpoint


def test_scan() -> None:
    params, _, state = problem()
    grads = tree(2, (5,))

    @jax.jit
    def scanned(params: Any, state: Any) -> Any:
        return jax.lax.scan(
            lambda carry, g: (step(carry[0], g, carry[1]), None), (params, state), grads
        )[0]

    expected = (params, state)
    for k in range(5):
        expected = jax.jit(step)(expected[0], jax.tree.map(lambda g, k=k: g[k], grads), expected[1])
    close(scanned(params, state), expected)


@pytest.mark.parametrize("taken", [True, False])
def test_cond(taken: bool) -> None:
    params, grads, state = problem()

    @jax.jit
    def maybe(flag: jax.Array) -> Any:
        return jax.lax.cond(flag, lambda: step(params, grads, state), lambda: (params, state))

    close(
        maybe(jnp.asarray(taken)), jax.jit(step)(params, grads, state) if taken else (params, state)
    )


def test_checkpoint() -> None:
    args = problem()
    close(jax.jit(jax.checkpoint(step))(*args), jax.jit(step)(*args))


def test_checkpoint_under_grad_of_something_else() -> None:
    params, grads, state = problem()

    @jax.checkpoint
    def loss(x: jax.Array) -> jax.Array:
        new, _ = step(params, grads, state)
        return jnp.sum(jax.lax.stop_gradient(new["a"]) * x**2)

    new, _ = step(params, grads, state)
    np.testing.assert_allclose(jax.grad(loss)(3.0), 6 * jnp.sum(new["a"]), rtol=1e-5)


# ------------------------------------------------------------------------------- vmap

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


# --------------------------------------------------------------------------- autodiff


@pytest.mark.parametrize("transform", ["jvp", "grad", "linearize", "vjp", "jacfwd"])
@pytest.mark.parametrize("jit", [False, True])
def test_derivatives_are_refused_by_name(transform: str, jit: bool) -> None:
    params, grads, state = problem()

    def loss(p: Any) -> jax.Array:
        return jnp.sum(step(p, grads, state)[0]["a"])

    f = jax.jit(loss) if jit else loss
    calls = {
        "jvp": lambda: jax.jvp(f, (params,), (params,)),
        "grad": lambda: jax.grad(f)(params),
        "linearize": lambda: jax.linearize(f, params),
        "vjp": lambda: jax.vjp(f, params),
        "jacfwd": lambda: jax.jacfwd(f)(params),
    }
    with pytest.raises(UpdateNotDifferentiableError, match=r"adamw_xla\.reference\.adamw_step"):
        calls[transform]()


@pytest.mark.parametrize("jit", [False, True])
def test_zero_tangents_pass(jit: bool) -> None:
    params, grads, state = problem()

    def loss(x: jax.Array, p: Any) -> jax.Array:
        stopped = jax.lax.stop_gradient(x * p["a"])
        new, _ = step({**p, "a": stopped}, grads, state)
        return jnp.sum(new["a"]) * x

    f = jax.jit(loss) if jit else loss
    x = jnp.float32(1.5)
    value, slope = jax.value_and_grad(f)(x, params)
    np.testing.assert_allclose(slope, value / x, rtol=1e-6)
    _, tangent = jax.jvp(lambda x: f(x, params), (x,), (jnp.float32(1),))
    np.testing.assert_allclose(tangent, value / x, rtol=1e-6)


@pytest.mark.parametrize("argument", ["rate", "params", "grads"])
def test_the_reference_is_differentiable(argument: str) -> None:
    params, grads, state = problem()
    index = ["rate", "params", "grads"].index(argument)

    def loss(*args: Any) -> jax.Array:
        new, s = ax.reference.adamw_step(args[1], args[2], state, CONFIG, learning_rate=args[0])
        new, _ = ax.reference.adamw_step(new, args[2], s, CONFIG, learning_rate=args[0])
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(new))

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (0.05, params, grads))
        params, state = wide[1], ax.adamw_init(wide[1], CONFIG)
        slope = jax.grad(loss, argnums=index)(*wide)
        h = 1e-6
        direction = jax.tree.map(
            lambda x: np.cos(np.arange(np.size(x))).reshape(np.shape(x)), wide[index]
        )

        def at(sign: float) -> float:
            moved = jax.tree.map(lambda x, d: x + sign * h * d, wide[index], direction)
            return float(loss(*wide[:index], moved, *wide[index + 1 :]))

        parts = jax.tree.map(lambda s, d: np.sum(np.asarray(s) * d), slope, direction)
        np.testing.assert_allclose(
            sum(jax.tree.leaves(parts)), (at(1) - at(-1)) / (2 * h), rtol=1e-5
        )


def test_the_reference_is_the_same_update() -> None:
    args = problem()
    close(
        jax.jit(step)(*args),
        jax.jit(lambda p, g, s: ax.reference.adamw_step(p, g, s, CONFIG))(*args),
    )


# ------------------------------------------------------------------- export, dead code


def test_one_artifact_for_cpu_cuda_and_tpu() -> None:
    args = problem()
    xla = functools.partial(ax.adamw_step, config=CONFIG, implementation="xla")
    exported = export.export(jax.jit(xla), platforms=("cpu", "cuda", "tpu"))(*args)
    loaded = export.deserialize(exported.serialize())
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    close(jax.jit(loaded.call)(*args), jax.jit(step)(*args))


def test_the_default_exports_too() -> None:
    args = problem()
    exported = export.export(jax.jit(step), platforms=("cpu", "tpu"))(*args)
    close(export.deserialize(exported.serialize()).call(*args), jax.jit(step)(*args))


def test_unused_leaves_are_dropped() -> None:
    params, grads, state = problem()
    closed = jax.make_jaxpr(lambda p, g, s: ax.adamw_step(p, g, s, CONFIG)[0])(params, grads, state)
    used = [k == "b" for k in sorted(SHAPES)]
    jaxpr, used_inputs = pe.dce_jaxpr(closed.jaxpr, used)
    (eqn,) = equations(jaxpr)
    assert eqn.params["spec"].num_leaves == 1
    assert sum(used_inputs) == 1 + 6  # the count, and all that belongs to b
    assert all(x.aval.shape in ((1, 14), (3,)) for x in eqn.invars)
    nothing, _ = pe.dce_jaxpr(closed.jaxpr, [False] * 3)
    assert not equations(nothing)


def test_dead_code_in_a_mask_keeps_each_leaf_its_decay() -> None:
    params = tree(0)
    config = ax.AdamW(weight_decay=0.5, weight_decay_mask={"a": True, "b": False, "c": True})
    state, grads = ax.adamw_init(params, config), tree(1)

    def some(keys: str) -> Any:
        @jax.checkpoint  # its partial evaluation runs the rule
        def f(x: jax.Array) -> Any:
            new, _ = ax.adamw_step(params, grads, state, config)
            return {k: x * jax.lax.stop_gradient(new[k]) for k in keys}

        return jax.jit(lambda x: jax.vjp(f, x)[0])(1.0)

    full, _ = ax.adamw_step(params, grads, state, config)
    for keys in ("a", "b", "bc"):
        close(some(keys), {k: full[k] for k in keys})


def test_dead_code_keeps_leaf_norms() -> None:
    config = ax.AdamW(clipnorm=0.5)
    params, grads = tree(0), tree(1)
    state = ax.adamw_init(params, config)
    closed = jax.make_jaxpr(lambda p: ax.adamw_step(p, grads, state, config)[0])(params)
    jaxpr, used = pe.dce_jaxpr(closed.jaxpr, [False, False, True])
    kept = [x for x, keep in zip(jax.tree.leaves(params), used, strict=True) if keep]
    (c,) = jax.core.eval_jaxpr(jaxpr, closed.consts, *kept)
    close(c, ax.adamw_step(params, grads, state, config)[0]["c"])


def test_the_update_is_named_in_the_compiled_program() -> None:
    text = jax.jit(step).lower(*problem()).compile().as_text()
    assert "adamw_update" in text
