"""States in words, params rounded at random, and split masters: as options of a training."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

WORDS = ax.AdamW(0.01, state_format="word16")
FORMATS: dict[str, dict[str, Any]] = {
    "words": {"state_format": "word16"},
    "words, stochastic params": {"state_format": "word16", "params_rounding": "stochastic"},
    "stochastic params": {"params_rounding": "stochastic"},
    "split master": {"master": "split"},
    "words, split master": {"state_format": "word16", "master": "split"},
}
MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"global_clipnorm": 0.5, "skip_nonfinite": True},
    "averaged": {"use_ema": True, "ema_overwrite_frequency": 2, "nesterov": True},
    "accumulated": {"gradient_accumulation_steps": 2, "clipvalue": 0.3},
}


def tree(seed: int, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"a": ((5, 16), dtype), "b": ((7,), np.float32)}
    return {k: jnp.asarray(rng.standard_normal(s), d) for k, (s, d) in shapes.items()}


def trained(step: Any, params: Any, state: Any, steps: int = 6) -> Any:
    for i in range(steps):
        params, state = step(params, tree(100 + i), state)
    return params, state


def same(a: Any, b: Any) -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def step_of(config: ax.AdamW, **how: Any) -> Any:
    return jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config, **how))


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@pytest.mark.parametrize("given", FORMATS.values(), ids=FORMATS)
def test_a_step_is_the_reference(given: dict[str, Any], more: dict[str, Any]) -> None:
    """From one state: to rounding, and words to a code, since XLA contracts as it likes."""
    config = ax.AdamW(0.01, **given, **more)
    params = tree(0)
    params, state = trained(step_of(config), params, ax.adamw_init(params, config), 3)
    got = step_of(config)(params, tree(9), state)
    want = jax.jit(ax.reference.adamw_step)(params, tree(9), state, config)
    for kind in ("words", "remainder"):
        found = [getattr(s, kind) for _, s in (got, want)]
        assert (found[0] is None) == (found[1] is None)
        if kind == "words" and found[0] is not None:
            for a, b in zip(*map(jax.tree.leaves, found), strict=True):
                assert np.mean(np.asarray(a) != np.asarray(b)) < 0.05
    masters = [ax.master_params(p, s) if s.remainder is not None else p for p, s in (got, want)]
    for a, b in zip(*map(jax.tree.leaves, masters), strict=True):
        tolerance = 1e-6 if a.dtype == np.float32 else 2.0**-8
        np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), rtol=tolerance, atol=1e-7
        )


def test_a_split_master_is_the_float32_param() -> None:
    """Bit by bit: the same training in float32, of which the model reads roundings."""
    split, whole = ax.AdamW(1e-3, master="split"), ax.AdamW(1e-3)
    step = functools.partial(step_of, implementation="xla")
    params = tree(0)
    wide = jax.tree.map(lambda x: x.astype(np.float32), params)
    params, state = trained(step(split), params, ax.adamw_init(params, split), 30)
    wide, moments = trained(step(whole), wide, ax.adamw_init(wide, whole), 30)
    same(ax.master_params(params, state), wide)
    same((state.m, state.v), (moments.m, moments.v))
    nearest = jax.tree.map(lambda x, p: x.astype(p.dtype), wide, params)
    same(nearest, params)  # no master is half way between two params


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_small_steps_are_made_on_average(rounding: Any) -> None:
    config = ax.AdamW(1e-4, weight_decay=0.0, params_rounding=rounding, state_format="word16")
    n = 4096
    grads = jnp.asarray(1 + np.arange(n) / n, jnp.bfloat16) * jnp.linspace(0.5, 1.0, n)
    params = jnp.ones(n, jnp.bfloat16)
    state = ax.adamw_init(params, config)
    step = step_of(config)
    for _ in range(20):
        params, state = step(params, grads, state)
    moved = 1 - np.asarray(params, np.float64).mean()
    if rounding == "nearest":
        assert moved == 0
        return
    # Twenty steps of 1e-4, each to one of two numbers at most 2^-7 apart.
    deviation = 2.0**-7 * np.sqrt(20 * 0.25 / n)
    assert abs(moved - 20e-4) < 5 * deviation + 20e-4 * 0.1


@pytest.mark.parametrize("given", FORMATS.values(), ids=FORMATS)
def test_bits_do_not_depend_on_how_a_step_is_called(given: dict[str, Any]) -> None:
    config = ax.AdamW(0.01, **given)
    params = tree(0)
    state = ax.adamw_init(params, config)
    want = trained(step_of(config), params, state, 4)
    grads = [tree(100 + i) for i in range(4)]

    @jax.jit
    def scanned(params: Any, state: Any, grads: Any) -> Any:
        def body(carry: Any, g: Any) -> Any:
            return ax.adamw_step(carry[0], g, carry[1], config), None

        return jax.lax.scan(body, (params, state), grads)[0]

    same(scanned(params, state, jax.tree.map(lambda *x: jnp.stack(x), *grads)), want)
    alone = {k: step_of(config) for k in params}  # leaf by leaf: no leaf knows of another
    for k, step in alone.items():
        p, s = {k: params[k]}, ax.adamw_init({k: params[k]}, config)
        for g in grads:
            p, s = step(p, {k: g[k]}, s)
        same(p[k], want[0][k])
    replicas = jax.tree.map(lambda x: jnp.stack([x, x]), (params, state))
    step = jax.jit(jax.vmap(lambda p, g, s: ax.adamw_step(p, g, s, config), in_axes=(0, None, 0)))
    for g in grads:
        replicas = step(replicas[0], g, replicas[1])
    for i in range(2):
        same(jax.tree.map(lambda x, i=i: x[i], replicas), want)


@pytest.mark.parametrize("given", FORMATS.values(), ids=FORMATS)
def test_through_optax(given: dict[str, Any]) -> None:
    solver = axo.adamw(0.01, **given)
    config = ax.AdamW(0.01, weight_decay=1e-4, epsilon=1e-8, epsilon_hat=False, **given)

    @jax.jit
    def step(params: Any, grads: Any, state: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = tree(0)
    got = trained(step, params, solver.init(params))
    want = trained(step_of(config, implementation="xla"), params, ax.adamw_init(params, config))
    same((got[0], got[1].native()), want)


def test_tiny_gradients_make_no_long_steps_without_epsilon() -> None:
    """Their v rounds to 0 while m does not."""
    config = ax.AdamW(1.0, weight_decay=0.0, epsilon=0.0, state_format="word16")
    params = {"a": jnp.zeros(64)}
    state, step = ax.adamw_init(params, config), step_of(config)
    for i in range(40):
        before = params["a"]
        grads = {"a": jnp.linspace(1e-17, 2e-17, 64) * (i < 20)}
        params, state = step(params, grads, state)
        assert np.max(np.abs(params["a"] - before)) < 10


def test_steps_are_as_long_as_with_moments() -> None:
    """On average, of gradients that are noise: without the correction 3 % longer."""
    n, steps = 20000, 250
    params = jnp.asarray(np.random.default_rng(0).standard_normal(n), np.float32)
    keys = jax.random.split(jax.random.key(0), steps)

    def lengths(state_format: Any) -> Any:
        config = ax.AdamW(1.0, weight_decay=0.0, beta_2=0.99, state_format=state_format)

        def body(state: Any, key: Any) -> Any:
            grads = jax.random.normal(key, (n,))
            new, state = ax.adamw_step(params, grads, state, config, implementation="xla")
            return state, jnp.mean(jnp.abs(new - params))

        return jax.jit(lambda s: jax.lax.scan(body, s, keys))(ax.adamw_init(params, config))[1]

    ratio = np.asarray(lengths("word16")) / np.asarray(lengths("moments"))
    # 0.2 % is m's noise; of the mean over 150 steps 0.2 % is chance.
    assert abs(ratio[100:].mean() - 1.002) < 0.006
    assert abs(ratio[:20].mean() - 1) < 0.006


@pytest.mark.parametrize("traced", [False, True])
def test_v_is_forgotten_as_with_moments(traced: bool) -> None:
    """By its logarithm, while there is no gradient: without the change of beta_2 6 % sooner."""
    n, steps, beta_2 = 10000, 40, 0.95
    params = jnp.asarray(np.random.default_rng(0).standard_normal(n), np.float32)

    def fallen(beta_2: Any) -> Any:
        config = ax.AdamW(0.0, beta_2=beta_2, state_format="word16")

        def step(state: Any, grads: Any) -> Any:
            state = ax.adamw_step(params, grads, state, config, implementation="xla")[1]
            return state, jnp.log(ax.unpack_state(state).v)

        first, _ = step(ax.adamw_init(params, config), params)
        logs = jax.lax.scan(step, first, jnp.zeros((steps, n)))[1]
        return jnp.mean(logs[-1] - logs[0])

    found = jax.jit(fallen)(beta_2) if traced else fallen(beta_2)
    assert abs(found / ((steps - 1) * np.log(beta_2)) - 1) < 0.015


# --------------------------------------------------------------------------- other formats


def test_moments_become_words_and_words_moments() -> None:
    moments = ax.AdamW(0.01, skip_nonfinite=True)
    words = dataclasses.replace(moments, state_format="word16", master="split")
    params = tree(0)
    params, state = trained(step_of(moments), params, ax.adamw_init(params, moments))
    packed = ax.adapt_state(state, params, words)
    assert packed.m is None
    assert packed.v is None
    same(packed.words, ax.pack_state(state).words)
    assert all(not np.any(x) for x in jax.tree.leaves(packed.remainder))
    back = ax.adapt_state(packed, params, moments)
    same(back, ax.unpack_state(dataclasses.replace(packed, remainder=None)))
    same(ax.pack_state(back).words, packed.words)
    for kind, part in {"m": 2.0**-3, "v": 2.0**-3}.items():  # half of what 2 bits leave open
        for a, b in zip(*(jax.tree.leaves(getattr(s, kind)) for s in (back, state)), strict=True):
            bound = part * np.abs(b) + (2.0**-11 * 2 if kind == "m" else 0)
            assert np.all(np.abs(a - b) <= bound * 1.0001), kind
    trained(step_of(words), params, packed, 2)
    trained(step_of(moments), params, back, 2)


def test_to_optax_and_back() -> None:
    params = tree(0)
    params, state = trained(step_of(WORDS), params, ax.adamw_init(params, WORDS))
    stock = optax.adamw(0.01, mu_dtype=np.float32)
    theirs = axo.to_optax_state(
        ax.unpack_state(state), stock.init(jax.tree.map(lambda x: x.astype(np.float32), params))
    )
    like = ax.adamw_init(params, ax.AdamW(0.01))
    same(ax.pack_state(axo.from_optax_state(theirs, like)).words, state.words)
    # The two convert where formats differ, in the dtypes of like.
    narrow = axo.to_optax_state(state, stock.init(params))[0]
    same(narrow.mu, theirs[0].mu)
    same(narrow.nu, jax.tree.map(lambda v, p: v.astype(p.dtype), theirs[0].nu, params))
    same(axo.from_optax_state(theirs, ax.adamw_init(params, WORDS)), state)
    ours = axo.AdamWOptState.of(state)
    largest = axo.from_optax_state(ours, axo.adamw(0.01, amsgrad=True).init(params))
    same((largest.mu, largest.nu), (theirs[0].mu, theirs[0].nu))
    with pytest.raises(ValueError, match=r"opt_state\.nu_max: is there, but like has no place"):
        axo.from_optax_state(largest, ax.adamw_init(params, WORDS))
    with pytest.raises(
        TypeError, match=r"got adamw_xla\.optax\.AdamWOptState\. state\.native\(\) "
    ):
        ax.unpack_state(ours)  # type: ignore[arg-type]


def test_a_state_is_exported_and_restored() -> None:
    config = ax.AdamW(0.01, state_format="word16", params_rounding="stochastic")
    params = tree(0)
    state = ax.adamw_init(params, config)
    step = functools.partial(ax.adamw_step, implementation="xla")
    args = params, tree(1), state, config
    data = export.export(jax.jit(step), platforms=("cpu", "tpu"))(*args).serialize()
    same(export.deserialize(data).call(*args), jax.jit(step)(*args))


# --------------------------------------------------------------------------------- refusals

CONFIGS = {
    "state_format must be 'moments' or 'word16', got 'int8'": {"state_format": "int8"},
    "params_rounding must be 'nearest' or 'stochastic', got None": {"params_rounding": None},
    "master must be None or 'split', got True": {"master": True},
    "amsgrad does not go with": {"state_format": "word16", "amsgrad": True},
    "state_dtype=float32 does not go with": {"state_format": "word16", "state_dtype": "float32"},
    'params_rounding="stochastic" does not go with master="split"': {
        "params_rounding": "stochastic",
        "master": "split",
    },
}


@pytest.mark.parametrize(("text", "given"), CONFIGS.items(), ids=CONFIGS)
def test_options_that_cannot_be(text: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^AdamW: {re.escape(text)}"):
        ax.AdamW(**given)


def moved(**change: Any) -> Any:
    return lambda state: dataclasses.replace(state, **change)


STATES = {
    r'^state: has m and v, and the config sets .*"word16"; adamw_xla\.pack_state\(state\)': (
        ax.AdamW(),
        WORDS,
        None,
    ),
    r'^state: has words, and the config sets .*"moments"; adamw_xla\.unpack_state\(state\)': (
        WORDS,
        ax.AdamW(),
        None,
    ),
    r"state\.remainder: the state lacks it, but the config sets master": (
        ax.AdamW(),
        ax.AdamW(master="split"),
        None,
    ),
    r"state\.words\['a'\]: has dtype float32; must be bfloat16, whose bits": (
        WORDS,
        WORDS,
        lambda s: dataclasses.replace(
            s,
            words=jax.tree.map(lambda x: x * 1.0, s.words) | {"a": s.words["a"].astype(np.float32)},
        ),
    ),
    r"words\['a'\]: has dtype uint16; must be bfloat16, .* take x\.view\(jax\.numpy\.bfloat16\)": (
        WORDS,
        WORDS,
        lambda s: dataclasses.replace(s, words=jax.tree.map(lambda x: x.view("u2"), s.words)),
    ),
    r"state\.words\['b'\]: has shape \(3,\); must be \(7,\)": (
        WORDS,
        WORDS,
        lambda s: dataclasses.replace(s, words=s.words | {"b": s.words["b"][:3]}),
    ),
}


@pytest.mark.parametrize(("text", "case"), STATES.items(), ids=STATES)
def test_states_that_do_not_fit(text: str, case: Any) -> None:
    made, used, change = case
    params = tree(0)
    state = ax.adamw_init(params, made)
    with pytest.raises((TypeError, ValueError), match=text):
        ax.adamw_step(params, params, state if change is None else change(state), used)


@pytest.mark.parametrize("option", [{"master": "split"}, {"params_rounding": "stochastic"}])
def test_float16_params_are_refused_by_name(option: dict[str, Any]) -> None:
    params = {"a": jnp.ones(3, np.float16)}
    with pytest.raises(TypeError, match=r"params\['a'\]: is float16, and (master|params_rounding)"):
        ax.adamw_init(params, ax.AdamW(**option))


def test_float64_params_have_no_words() -> None:
    with jax.enable_x64(True):
        params = {"a": jnp.ones(3, np.float64)}
        with pytest.raises(TypeError, match=r"params\['a'\]: is float64, and words hold float32"):
            ax.adamw_init(params, WORDS)


def test_what_optax_arguments_exclude() -> None:
    with pytest.raises(ValueError, match="mu_dtype='bfloat16' does not go with"):
        axo.adamw(0.1, mu_dtype="bfloat16", state_format="word16")
    with pytest.raises(ValueError, match="does not go with updates_like_grads"):
        axo.adamw(0.1, master="split", updates_like_grads=True)


def test_a_state_without_remainders_has_no_masters() -> None:
    params = tree(0)
    with pytest.raises(ValueError, match=r"state\.remainder: is None"):
        ax.master_params(params, ax.adamw_init(params, WORDS))
