"""Every option, alone and in pairs, against the float64 oracle.

The unit: one step is made by both from the same state, ours, which float64 holds exactly.
A float32 result may be off by 4 units in the last place of the largest term that enters
it (``oracle.Terms``; for a param mostly the param itself). A 16-bit param may be off by
one rounding, half a unit of its own, on top of those 4 of float32.

Two roundings are shared by a whole leaf and are allowed for by name (``allowance``):
XLA's expm1 on CPU, seen 2.9 units off, scales the whole step and shows only where the
step is larger than the param; and a gradient's factor (norms, loss scale, mean) is a
scalar made of up to six roundings, which ``v`` sees twice.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import adamw_xla as ax

ULPS = 4
KINDS = ("params", "m", "v", "v_max", "ema", "accumulated")

# name of the option -> arguments of AdamW
OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "clipnorm": {"clipnorm": 0.5},
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
    "schedules": {
        "learning_rate": lambda k: 0.25 / (1 + k),
        "weight_decay": lambda k: 0.125 * (k % 3),
    },
}
EXPM1_ULPS = 2  # of the step alone
FACTOR_ULPS = {"m": 1, "v": 4, "v_max": 4, "step": 1}
FACTORS = ("clipnorm", "global_clipnorm", "loss_scale_factor", "gradient_accumulation_steps")
CLIPS = {"clipnorm", "clipvalue", "global_clipnorm"}
CHOICES = [
    *((name,) for name in OPTIONS),
    *(pair for pair in itertools.combinations(OPTIONS, 2) if not set(pair) <= CLIPS),
]
# rank 0 to 4, no elements, one element; every dtype, gradients narrower and wider
TREE = [
    ((), "float32", "float32"),
    ((3,), "float32", "bfloat16"),
    ((0, 2), "float32", "float32"),
    ((2, 3), "bfloat16", "bfloat16"),
    ((1, 2, 2), "bfloat16", "float32"),
    ((2, 1, 3, 2), "float16", "float16"),
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


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Magnitudes from 1e-4 to 1e3, some exact zeros."""
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 2.5, shape)
    return np.where(rng.random(shape) < 0.1, 0, x).astype(dtype)


def spacing(x: Any, dtype: Any) -> Any:
    """The unit in the last place of ``dtype`` at ``x``, as float64."""
    info = ml_dtypes.finfo(dtype)
    size = np.maximum(np.abs(np.asarray(x, np.float64)), float(info.tiny))
    return 2.0 ** np.floor(np.log2(size)) * float(info.eps)


def doubles(tree: Any) -> list[Any]:
    return [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)]


def oracle_state(params: Any, state: ax.AdamWState) -> oracle.State:
    found = oracle.init(doubles(params))
    for field in dataclasses.fields(found):
        value = getattr(state, field.name)
        if value is not None:
            number = field.name in ("count", "micro_step", "skipped")
            setattr(found, field.name, int(value) if number else doubles(value))
    return found


def oracle_options(config: ax.AdamW) -> oracle.Options:
    names = {field.name for field in dataclasses.fields(oracle.Options)} - {"mask"}
    mask = config.weight_decay_mask
    chosen = {name: getattr(config, name) for name in names}
    return oracle.Options(**chosen, mask=None if mask is None else tuple(mask))


def allowance(config: ax.AdamW, kind: str, term: Any, step: Any, dtype: Any) -> Any:
    """By how much a result may be off."""
    extra = FACTOR_ULPS if any(getattr(config, name) is not None for name in FACTORS) else {}
    allowed = (ULPS + extra.get(kind, 0)) * spacing(term, dtype)
    if kind in ("params", "ema"):
        allowed = allowed + (EXPM1_ULPS + extra.get("step", 0)) * spacing(step, dtype)
    return allowed


def errors(params: Any, grads: Any, state: Any, config: Any, new_params: Any, new: Any) -> Any:
    """(what, error as a fraction of what is allowed) for each leaf of a step."""
    before = oracle_state(params, state)
    p, after, terms = oracle.step(doubles(params), doubles(grads), before, oracle_options(config))
    for name in ("count", "micro_step", "skipped"):
        if getattr(new, name) is not None:
            assert int(getattr(new, name)) == getattr(after, name), name
    for kind in KINDS:
        ours = new_params if kind == "params" else getattr(new, kind)
        if ours is None:
            continue
        exact = p if kind == "params" else getattr(after, kind)
        for i, (x, y, term) in enumerate(zip(ours, exact, getattr(terms, kind), strict=True)):
            assert x.shape == y.shape
            wide = np.float64 if params[i].dtype == np.float64 else np.float32
            allowed = allowance(config, kind, np.maximum(term, np.abs(y)), terms.step[i], wide)
            off = np.abs(np.asarray(x).astype(np.float64) - y)
            if np.dtype(x.dtype).itemsize == 2:
                off = np.maximum(off - spacing(y, x.dtype) / 2, 0)
            yield f"{kind}[{i}]", float(np.max(off / allowed, initial=0.0))


def check_run(names: Any, config: ax.AdamW, step: Any, tree: Any, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(random_array(rng, shape, dtype)) for shape, dtype, _ in tree]
    state = ax.adamw_init(params, config)
    for k in range(steps):
        grads = [jnp.asarray(random_array(rng, shape, dtype)) for shape, _, dtype in tree]
        if "skip" in names and k % 4 == 1:
            grads[0] = jnp.full_like(grads[0], [np.nan, np.inf][k % 8 == 1])
        new_params, new_state = step(params, grads, state, config)
        for what, off in errors(params, grads, state, config, new_params, new_state):
            assert off <= 1, f"{what} is {off:.2f} times as far off as allowed, at step {k}"
        params, state = new_params, new_state


@pytest.mark.parametrize("names", CHOICES, ids="-".join)
def test_options_alone_and_in_pairs(names: tuple[str, ...]) -> None:
    step = jax.jit(ax.adamw_step)  # the config is traced: one compilation for all examples

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


@settings(max_examples=40)
@given(
    tree=trees(HALVES),
    names=st.sampled_from([names for names in CHOICES if "mask" not in names]),
    numbers=numbers,
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_dtype(
    tree: Any, names: tuple[str, ...], numbers: dict[str, float], steps: int, seed: int
) -> None:
    config = ax.AdamW(**(numbers | arguments(names)))
    step = jax.jit(lambda p, g, s, _: ax.adamw_step(p, g, s, config))
    check_run(names, config, step, tree, steps, seed)


@settings(max_examples=25)
@given(
    tree=trees((*HALVES, "float64")),
    names=st.sampled_from([names for names in CHOICES if "mask" not in names]),
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_float64_beside_other_dtypes(
    tree: Any, names: tuple[str, ...], steps: int, seed: int
) -> None:
    # float32 holds these betas and their complements
    config = ax.AdamW(beta_1=0.875, beta_2=1 - 2**-10, **arguments(names))
    with jax.enable_x64(True):
        step = jax.jit(lambda p, g, s, _: ax.adamw_step(p, g, s, config))
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
