"""The update under JAX's transformations, but for ``vmap``; each test fails without its rule."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from comparing import close
import jax
from jax import export
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, SHAPES, equations, problem, step, tree

import adamw_xla as ax
from adamw_xla.lowering import NUM_SLOTS, UpdateNotDifferentiableError, adamw_update_p

# ------------------------------------------------------------------------- jit and eager


def test_one_equation_for_the_whole_tree() -> None:
    assert len(equations(jax.make_jaxpr(step)(*problem()).jaxpr)) == 1


def test_eager_is_jit() -> None:
    args = problem()
    close(step(*args), jax.jit(step)(*args))


@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 1.0}])
def test_without_jit(options: dict[str, Any]) -> None:
    config = ax.AdamW(**options)
    args = problem(config)
    want = ax.adamw_step(*args, config)
    with jax.disable_jit():
        close(ax.adamw_step(*args, config), want)


def test_eager_accumulation_compiles_nothing_anew(caplog: pytest.LogCaptureFixture) -> None:
    jax.clear_caches()  # of what other tests have compiled
    config = ax.AdamW(gradient_accumulation_steps=2)
    params, grads, state = problem(config)
    calls = []
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for _ in range(6):
            caplog.clear()
            params, state = ax.adamw_step(params, grads, state, config)
            calls.append([r for r in caplog.messages if r.startswith("Compiling")])
    assert calls[0]  # or the messages have changed
    assert calls[1]
    assert not any(calls[2:])


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


# --------------------------------------------------------------------------- autodiff


@pytest.mark.parametrize("transform", ["jvp", "grad", "linearize", "vjp", "jacfwd"])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("of", ["params", "grads through the norm"])
def test_derivatives_are_refused_by_name(transform: str, jit: bool, of: str) -> None:
    params, grads, state = problem()
    config = dataclasses.replace(CONFIG, global_clipnorm=None if of == "params" else 1.0)

    def loss(p: Any) -> jax.Array:
        args = (p, grads) if of == "params" else (params, p)
        return jnp.sum(ax.adamw_step(*args, state, config)[0]["a"])

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


def test_the_rule_itself_passes_zeros() -> None:
    """JAX's tracers never ask it then; transformations that call rules by hand do."""
    (eqn,) = equations(jax.make_jaxpr(step)(*problem()).jaxpr)
    primals = [jnp.ones(x.aval.shape, x.aval.dtype) for x in eqn.invars]
    zeros = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in primals]
    results, tangents = ad.primitive_jvps[adamw_update_p](primals, zeros, **eqn.params)
    close(results, adamw_update_p.bind(*primals, **eqn.params))
    assert all(isinstance(t, ad.Zero) for t in tangents)
    with pytest.raises(UpdateNotDifferentiableError):
        ad.primitive_jvps[adamw_update_p](primals, [*zeros[1:], primals[0]], **eqn.params)


@pytest.mark.slow
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
    assert all(x.aval.shape in ((1, NUM_SLOTS), (3,)) for x in eqn.invars)
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


def test_sums_that_nobody_reads_are_not_made() -> None:
    params, grads, state = problem()

    def told(p: Any, g: Any, s: Any) -> Any:
        new, _, info = ax.adamw_step(p, g, s, CONFIG, return_info=True)
        return new["a"], info.param_norm

    closed = jax.make_jaxpr(told)(params, grads, state)
    for used, sums, leaves in (([True, False], None, 1), ([True, True], "tree", 3)):
        jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, used)
        (eqn,) = equations(jaxpr)
        assert (eqn.params["spec"].sums, eqn.params["spec"].num_leaves) == (sums, leaves)


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
