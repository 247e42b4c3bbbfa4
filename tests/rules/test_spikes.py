"""Steps that are skipped for their gradient's norm, and the window that it is held to."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from comparing import close, same
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import tree

import adamw_xla as ax
from adamw_xla._inside.processes import _text
from adamw_xla._rules import spikes
import adamw_xla.optax as axo

RULE = ax.SpikeRule(window=8)

# ------------------------------------------------------------------------ what is a spike

NOISE = np.exp(0.1 * np.random.default_rng(0).standard_normal(300))
DEFAULT = ax.AdamW(skip_spikes=ax.SpikeRule())


@jax.jit
def skipped_by_default(scales: Any) -> Any:
    """For gradients of these norms, which are skipped, and the last window."""
    params = jnp.zeros(4)

    def step(carry: Any, scale: Any) -> Any:
        (_, state), before = ax.adamw_step(params, scale * unit, carry, DEFAULT), carry
        return state, state.skipped - before.skipped

    unit = jnp.full(4, 0.5)
    state, skipped = jax.lax.scan(step, ax.adamw_init(params, DEFAULT), scales)
    return skipped, state.norms


def skips(scales: Any) -> Any:
    return np.flatnonzero(skipped_by_default(jnp.asarray(scales, jnp.float32))[0])


def with_(changes: dict[int, float]) -> Any:
    scales = NOISE.copy()
    scales[[*changes]] = [*changes.values()]
    return scales


def test_a_spike_does_not_hide_those_behind_it() -> None:
    assert skips(with_({150: 1000, 160: 20, 170: 2, 277: 2, 299: 1000})).tolist() == [
        *(150, 160, 170, 277, 299)
    ]


@pytest.mark.parametrize(("level", "few", "many"), [(10, 10, 45), (1000, 50, 85)])
@pytest.mark.parametrize("noise", [NOISE, NOISE**0, NOISE**3], ids=["10 %", "none", "30 %"])
def test_a_level_that_changes_for_good_is_not_skipped_for_ever(
    level: float, few: int, many: int, noise: Any
) -> None:
    scales = np.where(np.arange(300) < 150, 1, level) * noise
    found = skips(scales)
    assert few <= len(found) <= many
    assert found.min() == 150
    assert found.max() < 150 + many
    assert len(skips(scales[::-1])) == 0  # and one that falls is none


def test_norms_that_differ_by_rounding_are_no_spikes() -> None:
    for size, found in ((1 + 1e-6, []), (1.05, []), (1.07, [200])):
        assert skips(np.where(np.arange(300) == 200, size, 1.0)).tolist() == found


@pytest.mark.parametrize("first", [1.0, 0.0])
def test_until_half_of_the_window_is_filled_all_is_made(first: float) -> None:
    """And where all norms are 0, since then there is no level."""
    changes = {3: 100.0, 63: 1000.0} if first else {64: 1.0}
    scales = first * NOISE
    scales[[*changes]] = [*changes.values()]
    assert skips(scales).size == 0
    assert skips(with_({64: 1000.0})).tolist() == [64]


def test_one_norm_is_no_level() -> None:
    """Not of the shortest window, of which it is a half; and a norm at the bound passes."""
    judge = functools.partial(spikes.judged, ax.SpikeRule(window=2, deviations=100.0))
    passes, entered = judge(window(-1, 1), jnp.float32(9))
    assert passes
    same(entered, window(1, 9))
    assert judge(window(1, 1), jnp.float32(2))[0]
    assert not judge(window(1, 1), jnp.float32(2.001))[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_one_at_any_time_and_does_not_enter(bad: float) -> None:
    scales = with_({0: bad, 1: bad, 200: bad})
    assert skips(scales).tolist() == [0, 1, 200]
    kept = scales[np.isfinite(scales)][-128:]
    norms = skipped_by_default(jnp.asarray(scales, jnp.float32))[1]
    np.testing.assert_allclose(norms, kept, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-60, 70, 123])
def test_norms_of_any_size(exponent: int) -> None:
    """Squares vanish, overflow; and the norm is near the end of float32's range."""
    scales = with_({100: 10.0, 299: 10.0})
    small, large = (
        skipped_by_default(jnp.asarray(np.ldexp(scales, e), jnp.float32)) for e in (0, exponent)
    )
    same(large[0], small[0])
    np.testing.assert_allclose(np.ldexp(np.float64(large[1]), -exponent), small[1], rtol=1e-6)


# --------------------------------------------------------------- which norm, and what stays

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"amsgrad": True, "use_ema": True, "skip_nonfinite": True},
    "clipnorm": {"clipnorm": 0.25, "state_format": "word16"},
    "clipvalue": {"clipvalue": 0.25, "state_format": "word16", "master": "split"},
    "global": {"global_clipnorm": 0.5, "loss_scale_factor": 0.25, "maximize": True},
    "groups": {"groups": (ax.Group("w", frozen=True), ax.Group("b/0", scale=2.0))},
    "mean": {"gradient_accumulation_steps": 2, "clipnorm": 0.25, "loss_scale_factor": 0.25},
}


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_norm_is_that_of_the_gradient_and_what_is_skipped_keeps_every_bit(
    name: str, implementation: Any
) -> None:
    """Unscaled, before any clip, of what is trained, and of the mean."""
    config = ax.AdamW(skip_spikes=RULE, **OPTIONS[name])
    step = jax.jit(functools.partial(ax.adamw_step, config=config, implementation=implementation))
    calls, factor = config.gradient_accumulation_steps or 1, config.loss_scale_factor or 1.0
    params: Any = tree()
    state, wanted = ax.adamw_init(params, config), []
    for k in range(6):
        total: Any = 0
        for i in range(calls):
            grads = jax.tree.map(lambda x: 1000.0 * x if k == 4 else x, tree(1 + i))  # noqa: B023
            total = total + np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])
            before = params, state
            params, state = step(params, grads, state)
        wanted.append(np.linalg.norm(total[:3] if name == "groups" else total) / factor / calls)
        if k == 4:
            assert (int(state.skipped), int(state.count)) == (1, 4)
            kept = {"skipped": before[1].skipped, "norms": before[1].norms}
            if calls > 1:  # the sum begins anew
                kept |= {x: getattr(before[1], x) for x in ("accumulated", "micro_step")}
                assert not any(np.any(x) for x in jax.tree.leaves(state.accumulated))
            same((params, dataclasses.replace(state, **kept)), before)
    wanted[4] = np.mean(wanted[:4]) * 1.06  # all the same: the least deviation counts
    np.testing.assert_allclose(state.norms, [-1, -1, *wanted], rtol=1e-5)
    assert (int(state.skipped), int(state.count)) == (1, 5)


def test_what_skip_nonfinite_skips_does_not_enter() -> None:
    """A gradient whose squares overflow has a norm, but ``v`` would not recover from it."""
    config = ax.AdamW(skip_spikes=RULE, skip_nonfinite=True)
    params = {"w": jnp.ones(3)}
    state = ax.adamw_init(params, config)
    step = jax.jit(functools.partial(ax.adamw_step, config=config))
    for scale in (1e25, 1.0):
        params, state = step(params, {"w": jnp.full(3, scale)}, state)
    np.testing.assert_allclose(state.norms[-2:], [-1, np.sqrt(3)], rtol=1e-6)
    assert (int(state.skipped), int(state.count)) == (1, 1)


# -------------------------------------------------------------------------------- vmap, jit


def after(config: ax.AdamW, scales: Any) -> Any:
    def step(carry: Any, scale: Any) -> Any:
        return ax.adamw_step(carry[0], jax.tree.map(lambda g: scale * g, grads), carry[1], config)

    grads, params = tree(1), tree()
    carry = params, ax.adamw_init(params, config)
    return jax.lax.scan(lambda carry, scale: (step(carry, scale), None), carry, scales)[0]


def test_each_member_of_a_population_has_its_window_and_its_bound() -> None:
    scales = jnp.array([[1, 1.1, 1.2, 1, 2, 1], [1, 9, 1, 9, 30, 9], [1, 1.1, 1.2, 1, 2, 1.0]])
    bounds = jnp.array([6.0, 6.0, 60.0])

    def run(bound: Any, scales: Any) -> Any:
        rule = ax.SpikeRule(window=4, deviations=bound)
        return after(ax.AdamW(skip_spikes=rule, global_clipnorm=0.5), scales)

    together = jax.jit(jax.vmap(run))(bounds, scales)
    assert together[1].skipped.tolist() == [1, 0, 0]
    one = jax.jit(run)
    alone = [one(*x) for x in zip(bounds, scales, strict=True)]
    close(together, jax.tree.map(lambda *x: jnp.stack(x), *alone))


def test_a_changed_bound_does_not_recompile_and_is_exported() -> None:
    scales = jnp.array([1, 1.1, 1.2, 1, 2, 1.0])

    @jax.jit
    def run(config: ax.AdamW) -> Any:
        traces.append(config)
        return after(config, scales)

    traces: list[Any] = []
    configs = [
        ax.AdamW(skip_spikes=ax.SpikeRule(window=4, deviations=k), groups=(ax.Group("w"),))
        for k in (6.0, 60.0)
    ]
    assert [int(run(config)[1].skipped) for config in configs] == [1, 0]
    assert len(traces) == 1
    loaded = export.deserialize(export.export(run, platforms=("cpu",))(configs[0]).serialize())
    for config in configs:
        close(loaded.call(config), run(config))
    with pytest.raises(ValueError, match="tree"):
        loaded.call(ax.AdamW(skip_spikes=ax.SpikeRule(window=5), groups=(ax.Group("w"),)))


def test_configs_with_equal_rules_are_equal() -> None:
    rules = ({}, {"window": 4}, {"deviations": 5.0}, {"deviations": np.float32(5)})
    made = [ax.AdamW(skip_spikes=ax.SpikeRule(**rule)) for rule in rules]
    assert len({*made, ax.AdamW()}) == 5
    assert made[1] == ax.AdamW(skip_spikes=ax.SpikeRule(window=4))
    assert jax.tree.map(lambda x: x, made[1]) == made[1]
    assert len({_text("skip_spikes", config.skip_spikes) for config in made}) == 4


# ------------------------------------------------------------------------------- the state


def window(*norms: float) -> Any:
    return jnp.array(norms, jnp.float32)


def test_a_state_is_fitted_to_another_window_and_keeps_the_newest() -> None:
    plain, config = ax.AdamW(), ax.AdamW(skip_spikes=ax.SpikeRule(window=4))
    params = tree()
    state = ax.adapt_state(ax.adamw_init(params, plain), params, config)
    same(state, ax.adamw_init(params, config))
    held = dataclasses.replace(state, norms=window(-1, 1, 2, 3))
    assert ax.adapt_state(held, params, config).norms is held.norms
    for length, norms in ((2, (2, 3)), (6, (-1, -1, -1, 1, 2, 3))):
        other = ax.AdamW(skip_spikes=ax.SpikeRule(window=length))
        with pytest.raises(ValueError, match=rf"state\.norms: has shape \(4,\); .*\({length},\)"):
            ax.adamw_step(params, tree(1), held, other)
        for given in (held, dataclasses.asdict(held), dataclasses.astuple(held)):
            adapted = ax.adapt_state(given, params, other)
            same(adapted, dataclasses.replace(held, norms=window(*norms)))
        to = axo.adamw(0.1, skip_spikes=other.skip_spikes).init(params)
        same(axo.from_optax_state(held, to).norms, window(*norms))
    same(ax.adapt_state(held, params, plain), ax.adamw_init(params, plain))
    with pytest.raises(TypeError, match=r"state\.norms: .* dtype int32"):
        ax.adamw_step(params, tree(1), dataclasses.replace(held, norms=jnp.arange(4)), config)


def test_shapes_and_shardings_have_a_place_for_it() -> None:
    params, config = tree(), ax.AdamW(skip_spikes=RULE)
    state = ax.adamw_init(params, config)
    places = ax.sharding.state_shardings(params, config)
    shapes = ax.sharding.abstract_state(params, config)
    structure = jax.tree.structure(state)
    assert jax.tree.structure(places) == structure == jax.tree.structure(shapes)
    assert (shapes.norms.shape, shapes.norms.dtype) == ((8,), np.float32)
    assert shapes.norms.sharding == places.norms
    same(jax.jit(functools.partial(ax.adamw_init, config=config))(params), state)
    # And what was saved without one is the tree that it was.
    assert "norms" not in str(jax.tree.structure(ax.adamw_init(params, ax.AdamW())))


# --------------------------------------------------------------------------- optax, reference


def test_the_drop_in_for_optax_and_the_reference_have_it() -> None:
    config = ax.AdamW(0.5, 0.25, epsilon=1e-8, epsilon_hat=False, skip_spikes=RULE)
    solver = axo.adamw(0.5, weight_decay=0.25, skip_spikes=RULE)
    params: Any = tree()
    ours, opt_state, state = params, solver.init(params), ax.adamw_init(params, config)
    update = jax.jit(solver.update)
    step = jax.jit(functools.partial(ax.reference.adamw_step, config=config))
    for scale in (1.0, 1.0, 1.0, 1.0, 9.0, 1.0):
        grads = jax.tree.map(lambda g: scale * g, tree(1))  # noqa: B023
        updates, opt_state = update(grads, opt_state, ours)
        assert scale == 1 or not any(np.any(x) for x in jax.tree.leaves(updates))
        ours = optax.apply_updates(ours, updates)
        params, state = step(params, grads, state)
    close((ours, opt_state.native()), (params, state))
    assert (int(state.count), int(state.skipped)) == (5, 1)
    move = jax.jit(jax.grad(lambda g: step(params, g, state)[0]["w"].sum()))
    assert np.isfinite(move(jax.tree.map(jnp.zeros_like, params))["w"]).all()


@pytest.mark.parametrize(
    "guard", [("jax_numpy_dtype_promotion", "strict"), ("jax_debug_infs", True)], ids=str
)
def test_guards_of_jax_do_not_stop_at_it(guard: tuple[str, Any]) -> None:
    config = ax.AdamW(skip_spikes=RULE)
    state = ax.adamw_init(tree(), config)
    before = getattr(jax.config, guard[0])
    jax.config.update(*guard)
    try:
        _, state = ax.adamw_step(tree(), tree(1), state, config)
    finally:
        jax.config.update(guard[0], before)
    assert int(state.count) == 1


# ------------------------------------------------------------------------------- refusals

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "one norm": (lambda: ax.SpikeRule(window=1), ValueError, "^SpikeRule: window .* got 1"),
    "a part": (lambda: ax.SpikeRule(window=2.5), TypeError, "window must be an integer, got 2.5"),
    "no window": (lambda: ax.SpikeRule(window=None), TypeError, "an integer, got None"),
    "no bound": (
        lambda: ax.SpikeRule(deviations=0.0),
        ValueError,
        "^SpikeRule: deviations .* got 0",
    ),
    "below": (lambda: ax.SpikeRule(deviations=-1), ValueError, "above 0, got -1"),
    "NaN": (lambda: ax.SpikeRule(deviations=np.nan), ValueError, "finite and above 0, got nan"),
    "a word": (
        lambda: ax.SpikeRule(deviations="6"),
        TypeError,
        "^SpikeRule: deviations .* real number",
    ),
    "by position": (lambda: ax.SpikeRule(6.0), TypeError, "window, deviations are given by name"),
    "other name": (lambda: ax.SpikeRule(sigma_factor=6), TypeError, "here it is deviations"),
    "a number": (lambda: ax.AdamW(skip_spikes=6.0), TypeError, "SpikeRule, or None, got 6.0"),
    "a flag": (lambda: ax.AdamW(skip_spikes=True), TypeError, "got True; SpikeRule.. has the"),
    "a dict": (lambda: ax.AdamW(skip_spikes={"window": 8}), TypeError, r"got dict; SpikeRule\(\*"),
    "a class": (lambda: ax.AdamW(skip_spikes=ax.SpikeRule), TypeError, "call it: SpikeRule"),
    "elsewhere": (lambda: ax.AdamW(skip_bad_steps=True), TypeError, "here it is skip_spikes"),
    "in optax": (lambda: axo.adamw(0.1, skip_spikes=6.0), TypeError, "skip_spikes must be"),
}


@pytest.mark.parametrize(("call", "error", "text"), WRONG.values(), ids=WRONG)
def test_wrong_rules(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
