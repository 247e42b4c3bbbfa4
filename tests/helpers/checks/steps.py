"""Steps of the front end, judged one by one against the float64 oracle.

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
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle

import adamw_xla as ax

from . import infos

ULPS = 4
KINDS = ("params", "m", "v", "v_max", "ema", "accumulated")
EXPM1_ULPS = 2  # of the step alone
FACTOR_ULPS = {"m": 1, "v": 4, "v_max": 4, "step": 1}
FACTORS = ("clipnorm", "global_clipnorm", "loss_scale_factor", "gradient_accumulation_steps")

# rank 0 to 4, no elements, one element; every dtype, gradients narrower and wider
TREE = [
    ((), "float32", "float32"),
    ((3,), "float32", "bfloat16"),
    ((0, 2), "float32", "float32"),
    ((2, 3), "bfloat16", "bfloat16"),
    ((1, 2, 2), "bfloat16", "float32"),
    ((2, 1, 3, 2), "float16", "float16"),
]


@dataclasses.dataclass(frozen=True)
class Slack:
    """Units in the last place that a device's operations may be off, beyond IEEE's.

    Attributes:
      step: of Adam's step: a quotient, a root, and a reciprocal root of the step's number.
      factor: of a gradient's factor: a quotient and a root.
    """

    step: float = 0
    factor: float = 0


NONE = Slack()
PTX = Slack(step=(2 - 0.5) + (1 - 0.5) + (2 ** (23 - 22.9) - 0.5), factor=(2 - 0.5) + (1 - 0.5))
"""By the PTX ISA ``div.full.f32`` is off by 2 units, ``sqrt.approx.f32`` by 2^-23 and
``rsqrt.approx.f32`` by 2^-22.9 of its result; IEEE's are off by half a unit."""


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
        if field.name == "norms":
            found.norms = np.zeros(0) if value is None else np.asarray(value, np.float64)
        elif value is not None:
            number = field.name in ("count", "micro_step", "skipped")
            setattr(found, field.name, int(value) if number else doubles(value))
    return found


def oracle_options(config: ax.AdamW) -> oracle.Options:
    names = {field.name for field in dataclasses.fields(oracle.Options)} - {"mask"}
    mask = config.weight_decay_mask
    chosen = {name: getattr(config, name) for name in names}
    return oracle.Options(**chosen, mask=None if mask is None else tuple(mask))


def allowance(
    config: ax.AdamW, kind: str, term: Any, step: Any, dtype: Any, slack: Slack = NONE
) -> Any:
    """By how much a result may be off."""
    extra = {}
    if any(getattr(config, name) is not None for name in FACTORS):
        extra = {name: units + 2 * slack.factor for name, units in FACTOR_ULPS.items()}
    allowed = (ULPS + extra.get(kind, 0)) * spacing(term, dtype)
    if kind in ("params", "ema"):
        units = EXPM1_ULPS + slack.step + extra.get("step", 0)
        allowed = allowed + units * spacing(step, dtype)
    return allowed


def errors(
    params: Any,
    grads: Any,
    state: Any,
    config: Any,
    new_params: Any,
    new: Any,
    slack: Slack,
    info: ax.StepInfo | None = None,
) -> Any:
    """(what, error as a fraction of what is allowed) for each leaf of a step."""
    before = oracle_state(params, state)
    p, after, terms = oracle.step(doubles(params), doubles(grads), before, oracle_options(config))
    if info is not None:
        infos.check(info, params, new_params, terms)
    for name in ("count", "micro_step", "skipped"):
        if getattr(new, name) is not None:
            assert int(getattr(new, name)) == getattr(after, name), name
    if new.norms is not None:
        # In float32: some units of a norm, and of a bound that is a few deviations away.
        np.testing.assert_allclose(new.norms, after.norms, rtol=16 * 2**-23)
    for kind in KINDS:
        ours = new_params if kind == "params" else getattr(new, kind)
        if ours is None:
            continue
        exact = p if kind == "params" else getattr(after, kind)
        for i, (x, y, term) in enumerate(zip(ours, exact, getattr(terms, kind), strict=True)):
            assert x.shape == y.shape
            wide = np.float64 if params[i].dtype == np.float64 else np.float32
            largest = np.maximum(term, np.abs(y))
            allowed = allowance(config, kind, largest, terms.step[i], wide, slack)
            off = np.abs(np.asarray(x).astype(np.float64) - y)
            if np.dtype(x.dtype).itemsize == 2:
                off = np.maximum(off - spacing(y, x.dtype) / 2, 0)
            yield f"{kind}[{i}]", float(np.max(off / allowed, initial=0.0))


def check_run(
    names: Any,
    config: ax.AdamW,
    step: Any,
    tree: Any,
    steps: int,
    seed: int,
    slack: Slack = NONE,
) -> None:
    """Makes ``steps`` steps ``step(params, grads, state, config)``, and judges each.

    And what they tell of themselves, where they return it.
    """
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(random_array(rng, shape, dtype)) for shape, dtype, _ in tree]
    state = ax.adamw_init(params, config)
    for k in range(steps):
        grads = [jnp.asarray(random_array(rng, shape, dtype)) for shape, _, dtype in tree]
        if "skip" in names and k % 4 == 1:
            grads[0] = jnp.full_like(grads[0], [np.nan, np.inf][k % 8 == 1])
        new_params, new_state, *info = step(params, grads, state, config)
        found = errors(params, grads, state, config, new_params, new_state, slack, *info)
        for what, off in found:
            assert off <= 1, f"{what} is {off:.2f} times as far off as allowed, at step {k}"
        params, state = new_params, new_state
