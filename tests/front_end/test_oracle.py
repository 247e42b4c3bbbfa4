"""Every option, alone and in pairs, against the float64 oracle.

``checks/steps.py`` says what a result may be off by, and why.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from checks.steps import TREE, check_run, doubles, oracle_options, oracle_state
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
import jax
import numpy as np
import oracle
import pytest

import adamw_xla as ax

# name of the option -> arguments of AdamW
OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "clipnorm": {"clipnorm": 0.5},
    "stacked": {"clipnorm": 0.5, "stacked": [False, True, True, True, False, True]},
    "clipvalue": {"clipvalue": 0.25},
    "global_clipnorm": {"global_clipnorm": 0.75},
    "ema": {"use_ema": True, "ema_momentum": 0.75},
    "ema_overwrite": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 3},
    "loss_scale": {"loss_scale_factor": 24.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "pytorch_epsilon": {"epsilon_hat": False},
    "nesterov": {"nesterov": True},
    "epsilon_root": {"epsilon_root": 1e-3},
    "mask": {"weight_decay_mask": [True, False, True, False, True, False]},
    "skip": {"skip_nonfinite": True},
    "info": {},
    "spikes": {"skip_spikes": ax.SpikeRule(window=4, deviations=1.5)},
    "maximize": {"maximize": True},
    "independent_decay": {"decay_times_lr": False},
    "cautious_decay": {"cautious_decay": True},
    "schedules": {
        "learning_rate": lambda k: 0.25 / (1 + k),
        "weight_decay": lambda k: 0.125 * (k % 3),
    },
}
CLIPS = {"clipnorm", "clipvalue", "global_clipnorm", "stacked"}
OF_THE_TREE = {"mask", "stacked"}
CHOICES = [
    *((name,) for name in OPTIONS),
    *(pair for pair in itertools.combinations(OPTIONS, 2) if not set(pair) <= CLIPS),
]


def arguments(names: tuple[str, ...]) -> dict[str, Any]:
    return functools.reduce(lambda a, b: a | b, (OPTIONS[name] for name in names), {})


def single(number: float) -> float:
    """A number that float32 holds: traced hyperparameters are float32."""
    return float(np.float32(number))


def around(default: float, low: float, high: float) -> Any:
    """Zero where it is allowed, but nothing that makes subnormals, which XLA flushes."""
    edges = [default] if low else [default, 0.0]
    return st.one_of(st.sampled_from(edges), st.floats(low or 0.01, high)).map(single)


numbers = st.fixed_dictionaries(
    {
        "learning_rate": around(0.001, 1e-6, 1.0),
        "weight_decay": around(0.004, 0, 0.5),
        "beta_1": around(0.9, 0, 0.999),
        "beta_2": around(0.999, 0, 0.9999),
        "epsilon": around(1e-7, 1e-10, 1e-2),
    }
)


PAIRS_ARE_SLOW = [
    pytest.param(names, marks=pytest.mark.slow) if len(names) > 1 else names for names in CHOICES
]


@pytest.mark.parametrize("names", PAIRS_ARE_SLOW, ids="-".join)
def test_options_alone_and_in_pairs(names: tuple[str, ...]) -> None:
    call = functools.partial(ax.adamw_step, return_info="per_leaf" if "info" in names else False)
    step = jax.jit(call)  # the config is traced: one compilation for all examples

    @settings(max_examples=3)
    @given(numbers=numbers, steps=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
    def run(numbers: dict[str, float], steps: int, seed: int) -> None:
        check_run(names, ax.AdamW(**(numbers | arguments(names))), step, TREE, steps, seed)

    run()


@st.composite
def trees(draw: Any, dtypes: tuple[str, ...]) -> list[tuple[tuple[int, ...], str, str]]:
    shapes = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    leaf = st.tuples(shapes, st.sampled_from(dtypes), st.sampled_from(dtypes))
    return draw(st.lists(leaf, min_size=1, max_size=4))


HALVES = ("bfloat16", "float16", "float32")


@pytest.mark.slow
@settings(max_examples=40)
@given(
    tree=trees(HALVES),
    names=st.sampled_from([names for names in CHOICES if not OF_THE_TREE & {*names}]),
    numbers=numbers,
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_dtype(
    tree: Any, names: tuple[str, ...], numbers: dict[str, float], steps: int, seed: int
) -> None:
    config = ax.AdamW(**(numbers | arguments(names)))
    told = "info" in names
    step = jax.jit(lambda p, g, s, _: ax.adamw_step(p, g, s, config, return_info=told))
    check_run(names, config, step, tree, steps, seed)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    tree=trees((*HALVES, "float64")),
    names=st.sampled_from([names for names in CHOICES if not OF_THE_TREE & {*names}]),
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_float64_beside_other_dtypes(
    tree: Any, names: tuple[str, ...], steps: int, seed: int
) -> None:
    # float32 holds these betas and their complements
    config = ax.AdamW(beta_1=0.875, beta_2=1 - 2**-10, **arguments(names))
    told = "info" in names
    with jax.enable_x64(True):
        step = jax.jit(lambda p, g, s, _: ax.adamw_step(p, g, s, config, return_info=told))
        check_run(names, config, step, tree, steps, seed)


@pytest.mark.parametrize("implementation", ["jit", "eager", "reference"])
def test_the_default_config_for_50_steps(implementation: str) -> None:
    config = ax.AdamW()
    steps = {
        "jit": jax.jit(lambda p, g, s, _: ax.adamw_step(p, g, s, config)),
        "eager": lambda p, g, s, _: ax.adamw_step(p, g, s, config),
        "reference": jax.jit(lambda p, g, s, _: ax.reference.adamw_step(p, g, s, config)),
    }
    check_run((), config, steps[implementation], TREE, 50, seed=3)


def test_decay_at_fine_tuning_rates_is_not_biased() -> None:
    """lr*wd = 4e-8: the float32 factor 1 - lr*wd, as in PyTorch, decays by half too much."""
    config = ax.AdamW(learning_rate=1e-5, weight_decay=0.004)
    rng = np.random.default_rng(0)
    params = [rng.uniform(0.5, 1.0, 100_000).astype(np.float32)]
    grads = [rng.standard_normal(100_000).astype(np.float32)]
    state = ax.adamw_init(params, config)
    (ours,), _ = jax.jit(ax.adamw_step)(params, grads, state, config)
    options = oracle_options(config)
    (exact,), _, _ = oracle.step(
        doubles(params), doubles(grads), oracle_state(params, state), options
    )
    (undecayed,), _, _ = oracle.step(
        doubles(params),
        doubles(grads),
        oracle_state(params, state),
        dataclasses.replace(options, weight_decay=0.0),
    )
    factor = np.float32(1) - np.float32(1e-5) * np.float32(0.004)
    factored = params[0] * factor + (undecayed - params[0]).astype(np.float32)
    decay = float(np.mean(undecayed - exact))
    assert abs(np.mean(np.float64(ours) - exact)) < 0.02 * decay
    assert abs(np.mean(np.float64(factored) - exact)) > 0.4 * decay
