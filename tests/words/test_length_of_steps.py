"""Guards what is said of the noise of m and v in words, and the factor on steps for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import words

import adamw_xla as ax
from adamw_xla_lowering.formats import noise

F32 = np.float32


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.9, 0.9999), (0.5, 0.99), (0, 0.9)])
def test_the_bound_of_m_is_reached_and_not_passed(betas: tuple[float, float]) -> None:
    """By gradients that grow by b2/b1; random ones of any scales stay below."""
    b1, b2 = betas
    age = np.arange(100)[::-1]
    worst = (b1 / b2) ** age.astype(float)
    rng = np.random.default_rng(0)
    others = rng.standard_normal((2000, 100)) * np.exp(rng.normal(0, 4, (2000, 100)))
    g = np.vstack([worst, others])
    m = (1 - b1) * (g * np.power(float(b1), age)).sum(1)
    v = (1 - b2) * (g * g * b2**age).sum(1)
    ratio = np.abs(m) / np.sqrt(v)
    np.testing.assert_allclose(ratio[0], noise.bound(b1, b2), rtol=1e-3)
    assert (ratio[1:] < noise.bound(b1, b2)).all()


def test_where_betas_bound_nothing() -> None:
    assert noise.bound(0.99, 0.9) == np.inf
    assert 2 * noise.bound(0.9, 0.999) < noise.LARGEST_M < 2 * noise.bound(0.9, 0.9999)
    in_words = 2 * noise.bound(0.9, 1 - noise.complement_in_words(0.001))
    assert noise.LARGEST_M < in_words < 1.016 * noise.LARGEST_M
    assert words.U.values[-1] == noise.LARGEST_M


def test_the_unit_bounds_v_whichever_way_v_was_rounded() -> None:
    values = words.V.values
    v = np.concatenate([values, np.nextafter(values.astype(F32), F32(np.inf))])[:-1]
    for random in (0, words.V.num_noises - 1):
        code = words.V.code(v[v <= values[-1]], random)
        assert (np.sqrt(v[v <= values[-1]]) < 2 * words.unit(code)).all()


@pytest.mark.parametrize("epsilon", [1e-7, 1e-14])
def test_gradients_of_any_size_make_steps_of_few_learning_rates(epsilon: float) -> None:
    """Above 15,000 v saturates and steps are too long, but no more than 15 times; none is NaN."""
    g = np.concatenate([[0.0], np.logspace(-18, 18, 1000)]).astype(F32)
    rng = np.random.default_rng(0)
    m, v = np.zeros_like(g), np.zeros_like(g)
    early, late = np.zeros_like(g), np.zeros_like(g)  # with corrections of bias, and after them
    for t in range(400):
        now = g * F32(t < 200)  # and then they stop
        m = F32(0.9) * m + F32(0.1) * now
        v = F32(0.999) * v + F32(0.001) * now * now
        step = np.abs(m) / (np.sqrt(v) + epsilon)
        late = np.maximum(late, step)
        early = np.maximum(early, step * (1 - 0.999 ** (t + 1)) ** 0.5)
        r = rng.integers(0, 2**32, g.shape, dtype=np.uint32)
        m, v = words.decode(words.encode(m, v, r))
    assert 7 < late.max() < 9
    assert early[g < 15_000].max() < 2


@pytest.mark.parametrize("beta_2", [0.9, 0.95, 0.99, 0.999, 0.9999])
def test_the_factor_is_the_chain_s(beta_2: float) -> None:
    """Beside float32's E[1/sqrt(v)], an integral over v's Laplace transform, which is a product."""
    a = (1 - beta_2) * beta_2 ** np.arange(int(20 / (1 - beta_2)))
    x, width = np.linspace(-30, 20, 401, retstep=True)
    transform = [np.exp(-0.5 * np.log1p(2 * s * a).sum()) for s in np.exp(x)]
    of_float32 = (np.exp(x / 2) @ transform * width + 2 * np.exp(x[0] / 2)) / np.pi**0.5
    too_long = noise.stationary(beta_2, phases=2).inverse_root / of_float32
    assert abs(too_long * noise.step_factor(1 - beta_2, 1e9) - 1) < 2e-3


def test_the_chain_is_what_training_on_noise_tends_to() -> None:
    """And the factor holds from the first steps on. 4,000 elements; errors of .0005 and .001."""
    rng = np.random.default_rng(0)
    b2, size, steps = 0.95, 4000, 250
    scale = np.exp2(rng.uniform(0, 2, size))
    v = exact = np.zeros(size, F32)
    ratios, spread, deviation = [], [], []
    for _ in range(steps):
        g2 = (rng.standard_normal(size) * scale).astype(F32) ** 2
        v, exact = (F32(b2) * x + F32(1 - b2) * g2 for x in (v, exact))
        with np.errstate(divide="ignore"):
            ratios.append((scale / np.sqrt(v)).mean() / (scale / np.sqrt(exact)).mean())
        r = rng.integers(0, 2**32, size, dtype=np.uint32)
        v = words.decode(words.encode(np.zeros_like(v), v, r))[1]
        spread.append(np.std(v / scale**2))
        deviation.append(np.std((v - exact) / scale**2))
    early, late = np.mean(ratios[10:22]), np.mean(ratios[100:])
    assert abs(late * noise.step_factor(1 - b2, 1e9) - 1) < 2e-3
    assert abs(early * noise.step_factor(1 - b2, 16.0) - 1) < 4e-3
    assert abs(np.mean(spread[100:]) - noise.stationary(b2).deviation) < 5e-3
    assert abs(np.mean(deviation[100:]) - 0.23) < 5e-3


FORGOTTEN = [(0.8, 0.02), (0.9, 0.05), (0.95, 0.10), (0.98, 0.13), (0.99, 0.14)]


@pytest.mark.parametrize(("b2", "faster"), FORGOTTEN)
def test_v_without_gradients_is_forgotten_as_is_said(b2: float, faster: float) -> None:
    """Its logarithm as float32's with the beta_2 that words have in place of ``b2``.

    And without that, 1/sqrt(v) as much faster as is said, while v itself is right on average.
    20,000 elements over the time that v is remembered; errors of .003, .002 and .01.
    """
    rng = np.random.default_rng(0)
    size, steps = 20_000, round(1 / (1 - b2))
    first = np.exp2(rng.uniform(0, 2, size)).astype(F32)
    begun = words.decode(words.encode(0 * first, first, np.full(size, 2**20, np.uint32)))[1]

    def rates(kept: float) -> tuple[float, float, float]:
        """By log(v), by 1/sqrt(v) and by v, in units of float32's at ``b2``."""
        v = begun
        for _ in range(steps):
            r = rng.integers(0, 2**32, size, dtype=np.uint32)
            v = words.decode(words.encode(np.zeros_like(v), F32(kept) * v, r))[1]
        ratio = v / begun.astype(np.float64)
        logs = np.log(ratio).mean(), -2 * np.log((ratio**-0.5).mean()), np.log(ratio.mean())
        return tuple(log / (steps * np.log(b2)) for log in logs)

    by_log, _, _ = rates(1 - noise.complement_in_words(1 - b2))
    assert abs(by_log - 1) < 0.015
    _, by_root, by_mean = rates(b2)
    assert abs(by_root - 1 - faster) < 0.01
    assert abs(by_mean - 1) < 0.01


@pytest.mark.parametrize("b1", [0.8, 0.9, 0.95])
def test_the_noise_of_m_is_what_is_said(b1: float) -> None:
    rng = np.random.default_rng(0)
    size, unit = 4000, F32(1)
    scale = np.exp2(rng.uniform(0, 1, size)).astype(F32)
    m = exact = np.zeros(size, F32)
    for _ in range(120):
        g = rng.standard_normal(size).astype(F32) * scale
        m, exact = (F32(b1) * x + F32(1 - b1) * g for x in (m, exact))
        r = rng.integers(0, 2**32, size, dtype=np.uint32)
        m = words.decode(words.encode(m, np.full(size, unit), r))[0]
    relative = np.std((m - exact) / scale) / np.std(exact / scale)
    assert abs(relative - noise.deviation_of_m(b1)) < 0.01


WAYS_TO_A_STEP: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True},
    "epsilon without bias": {"epsilon_hat": False, "epsilon": 0.1},
    "epsilon's root": {"epsilon_root": 0.1},
    "a group's": {"beta_2": 0.99, "groups": (ax.Group("a", beta_2=0.9),)},
}


@pytest.mark.parametrize(
    ("implementation", "traced"), [("xla", False), ("xla", True), ("reference", False)]
)
@pytest.mark.parametrize("name", WAYS_TO_A_STEP)
def test_words_step_as_moments_of_their_own_beta_2(
    name: str, implementation: str, traced: bool
) -> None:
    """In v, in its bias and in the step's length: by ``Group`` and config, at each update."""
    more: dict[str, Any] = {"beta_2": 0.9, **WAYS_TO_A_STEP[name]}
    words = ax.AdamW(0.01, 0.0, state_format="word16", **more)
    complement = noise.complement_in_words(0.1)
    if "groups" in more:
        more["groups"] = (ax.Group("a", beta_2=1 - complement),)
    else:
        more["beta_2"] = 1 - complement
    factor = noise.step_factor(complement, 6.0)
    moments = ax.AdamW(0.01 * factor, 0.0, **more)
    params, grads = {"a": jnp.zeros((5, 16))}, {"a": jnp.cos(jnp.arange(80.0)).reshape(5, 16)}
    state = dataclasses.replace(
        ax.adamw_init(params, moments),
        m={"a": jnp.linspace(-1, 1, 80).reshape(5, 16)},
        v={"a": jnp.linspace(0.5, 2, 80).reshape(5, 16)},
        count=jnp.int32(5),
    )
    state = ax.pack_state(state)
    step: Any = {"xla": ax.adamw_step, "reference": ax.reference.adamw_step}[implementation]
    step = jax.jit(step, static_argnames=() if traced else "config")
    got, _ = step(params, grads, state, config=words)
    want, _ = ax.reference.adamw_step(params, grads, ax.unpack_state(state), moments)
    np.testing.assert_allclose(got["a"], want["a"], rtol=2e-5)
