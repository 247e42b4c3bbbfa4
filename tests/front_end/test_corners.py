"""Guards where a factor is 0/0, overflows or vanishes, against float64 in every implementation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

STEPS = {
    "xla": functools.partial(ax.adamw_step, implementation="xla"),
    "default": ax.adamw_step,
    "reference": ax.reference.adamw_step,
}

PARAMS = [np.array([1.0, -2.0, 0.5, 3.0]), np.array([[0.25], [-1.5]])]
GRADS = [np.array([0.5, 0.0, -1.0, 2.0]), np.array([[0.0], [0.0]])]
ZEROS = [np.zeros_like(g) for g in GRADS]
HUGE = [np.array([1e20, -2e25, 3e37, 0.0]), np.array([[1e30], [0.0]])]
LAST = np.iinfo(np.int32).max

CORNERS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "global bound 0": ({"global_clipnorm": 0.0}, GRADS),
    "global bound 0, gradient 0": ({"global_clipnorm": 0.0}, ZEROS),
    "global bound -0, gradient 0": ({"global_clipnorm": -0.0}, ZEROS),
    "global bound infinite": ({"global_clipnorm": np.inf}, GRADS),
    "global bound, gradient 0": ({"global_clipnorm": 1.0}, ZEROS),
    "leaf bound 0": ({"clipnorm": 0.0}, GRADS),
    "leaf bound -0": ({"clipnorm": -0.0}, GRADS),
    "leaf bound infinite": ({"clipnorm": np.inf}, GRADS),
    "value bound 0": ({"clipvalue": 0.0}, GRADS),
    "beta_1 0": ({"beta_1": 0.0}, GRADS),
    "beta_1 0, nesterov": ({"beta_1": 0.0, "nesterov": True}, GRADS),
    "beta_2 0": ({"beta_2": 0.0}, GRADS),
    "betas 0": ({"beta_1": 0.0, "beta_2": 0.0, "epsilon_hat": False}, GRADS),
    "epsilon 0": ({"epsilon": 0.0}, GRADS),
    "epsilon 0, as in optax": ({"epsilon": 0.0, "epsilon_hat": False}, GRADS),
    "epsilon 0, amsgrad": ({"epsilon": 0.0, "amsgrad": True}, GRADS),
    "epsilons 0": ({"epsilon": 0.0, "epsilon_root": 0.0, "nesterov": True}, GRADS),
    "epsilon 0, bound 0": ({"epsilon": 0.0, "global_clipnorm": 0.0}, GRADS),
    "rate 0": ({"learning_rate": 0.0}, GRADS),
    "rate 0, epsilon 0": ({"learning_rate": 0.0, "epsilon": 0.0}, GRADS),
    "decay 0": ({"weight_decay": 0.0}, GRADS),
    "momentum 0": ({"use_ema": True, "ema_momentum": 0.0}, GRADS),
    "momentum 1": ({"use_ema": True, "ema_momentum": 1.0}, GRADS),
    "squares overflow, global": ({"global_clipnorm": 1.0}, HUGE),
    "squares overflow, leaf": ({"clipnorm": 2.0}, HUGE),
    "squares overflow, large bound": ({"global_clipnorm": 1e15}, HUGE),
    "squares overflow, value": ({"clipvalue": 1.0, "skip_nonfinite": True}, HUGE),
    "squares overflow, scaled": ({"global_clipnorm": 1.0, "loss_scale_factor": 1024.0}, HUGE),
    "squares overflow, global, skip": ({"global_clipnorm": 1.0, "skip_nonfinite": True}, HUGE),
    "squares overflow, leaf, skip": ({"clipnorm": 1.0, "skip_nonfinite": True}, HUGE),
}


def float32(leaves: list[Any]) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.float32) for x in leaves]


SLOW = [pytest.param(count, marks=pytest.mark.slow) for count in (7, LAST - 1, LAST)]


@pytest.mark.parametrize("count", [0, *SLOW])
@pytest.mark.parametrize("name", CORNERS)
def test_a_corner(name: str, count: int) -> None:
    """Numbers are traced: what is known and out of range is refused before."""
    options, grads = CORNERS[name]
    numbers = {k: v for k, v in options.items() if isinstance(v, float)}
    config = ax.AdamW(**{k: v for k, v in options.items() if k not in numbers})
    before = oracle.init(PARAMS)
    before.count = count
    want = oracle.step(PARAMS, list(grads), before, oracle.Options(**options))
    state = dataclasses.replace(ax.adamw_init(float32(PARAMS), config), count=jnp.int32(count))
    traced = dataclasses.replace(config, **dict.fromkeys(numbers, 0.5))
    for how, function in STEPS.items():

        def step(numbers: dict[str, Any], p: Any, g: Any, s: Any, function: Any = function) -> Any:
            return function(p, g, s, _with(traced, numbers))

        new, after = jax.jit(step)(
            {k: jnp.float32(v) for k, v in numbers.items()}, float32(PARAMS), float32(grads), state
        )
        found = {"params": new, "m": after.m, "v": after.v, "v_max": after.v_max, "ema": after.ema}
        wanted = {"params": want[0], **vars(want[1])}
        for kind, leaves in found.items():
            for got, exact in zip(leaves or [], wanted[kind], strict=bool(leaves)):
                message = f"{how}: {kind}"
                # float32's own rounding of beta_2 makes 1 - beta_2 wrong by 2e-5.
                np.testing.assert_allclose(got, exact, rtol=3e-5, atol=1e-30, err_msg=message)
        assert int(after.count) == min(count + 1, LAST)


def _with(config: ax.AdamW, numbers: dict[str, Any]) -> ax.AdamW:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(config)
    return treedef.unflatten([numbers.get(path[0].name, leaf) for path, leaf in leaves])


@pytest.mark.slow
@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize(
    ("options", "grad", "is_skipped"),
    [
        ({}, 1e20, True),  # v would be infinite
        ({}, 1e18, False),
        ({"clipvalue": 1e20}, 1e21, True),
        ({"clipvalue": 1e10}, 1e21, False),
        ({"global_clipnorm": 1e20}, 1e25, True),
        ({"global_clipnorm": 1e10}, 1e25, False),
        ({"global_clipnorm": 1.0}, np.inf, True),
        ({"clipnorm": 1.0}, np.nan, True),
        ({"clipnorm": 1e10}, 1e25, False),
        ({"loss_scale_factor": jnp.float32(0.0)}, 1.0, True),
    ],
)
@pytest.mark.parametrize("accumulates", [False, True])
def test_what_is_skipped(
    how: str, options: dict[str, Any], grad: float, is_skipped: bool, accumulates: bool
) -> None:
    """A step is skipped where ``v`` would not recover from it, and only there."""
    steps = 2 if accumulates else None
    options = {"loss_scale_factor": None, **options}
    factor = options.pop("loss_scale_factor")
    config = ax.AdamW(
        **options,
        loss_scale_factor=None if factor is None else 1.0,
        skip_nonfinite=True,
        gradient_accumulation_steps=steps,
    )
    params = [jnp.ones(3)]
    state = ax.adamw_init(params, config)
    numbers = {} if factor is None else {"loss_scale_factor": factor}
    step = jax.jit(lambda n, p, g, s: STEPS[how](p, g, s, _with(config, n)))
    for _ in range(steps or 1):
        params, state = step(numbers, params, [jnp.array([grad, 0.0, 1.0])], state)
    calls = steps or 1
    assert (int(state.skipped), int(state.count)) == ((calls, 0) if is_skipped else (0, 1))
    for leaf in jax.tree.leaves((params, state)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.slow
@pytest.mark.parametrize("how", [*STEPS, "optax"])
@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_a_clip_brings_any_gradient_to_its_bound(how: str, clip: str) -> None:
    kind = np.finfo(np.float32)
    tiny = float(kind.tiny)

    @jax.jit
    def clipped(x: Any, bound: Any) -> Any:
        if how == "optax":
            return axo.clip_by_global_norm(bound).update(x, optax.EmptyState())[0]
        config = _with(ax.AdamW(beta_1=0.0, **{clip: 1.0}), {clip: bound})
        zeros = jnp.zeros_like(x)
        return STEPS[how](zeros, x, ax.adamw_init(zeros, config), config)[1].m

    @hypothesis.given(
        st.lists(st.floats(-44, 38.5), min_size=4, max_size=4), st.floats(-18, 38), st.booleans()
    )
    @hypothesis.settings(max_examples=200)
    def agree(exponents: list[float], exponent: float, negative: bool) -> None:
        x = (10.0 ** np.array(exponents) * (1 - 2 * negative)).astype(np.float32)
        bound = np.float32(10.0**exponent)
        norm = np.sqrt(np.sum(x.astype(np.float64) ** 2))
        factor = min(1.0, bound / norm) if norm else 1.0
        found = np.asarray(clipped(jnp.asarray(x), bound))
        if factor < tiny and how != "optax":  # as documented: 0, where there are no subnormals
            assert np.all(np.abs(found) <= 1.1 * np.abs(x * factor) + tiny)
            return
        # Squares of what is below 1.1e-19 count as 0, and XLA makes 0 of what is no normal number;
        # in the small unit, optax' first factor, that is what is far below the norm.
        rtol = 8 * float(kind.eps) + np.sqrt(x.size * tiny) / max(norm, float(bound))
        lost = tiny + float(bound) * 2.0**-100
        np.testing.assert_allclose(found, x * factor, rtol=rtol, atol=lost)

    agree()


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("grads", [ZEROS, GRADS], ids=["zeros", ""])
def test_derivatives_at_the_corners_are_numbers(clip: str, grads: list[Any]) -> None:
    def after(grads: Any, bound: Any) -> Any:
        config = _with(ax.AdamW(**{clip: 1.0}), {clip: bound})
        state = ax.adamw_init(float32(PARAMS), config)
        return sum(map(jnp.sum, ax.reference.adamw_step(float32(PARAMS), grads, state, config)[0]))

    for bound in (0.0, 1.0, 100.0):
        slopes = jax.grad(after, argnums=(0, 1))(float32(grads), jnp.float32(bound))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slopes)), (bound, slopes)
