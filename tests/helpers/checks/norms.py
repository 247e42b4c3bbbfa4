"""``adamw_sum_of_squares`` on the default device, against float64 NumPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla_lowering import Squares, adamw_sum_of_squares

SHAPES = [(), (3,), (3,), (0, 2), (2, 5), (5, 2), (64, 256), (128, 128), (16389,)]

# Roundings go up as often as down: one chain of additions over the largest leaf would be off
# by about sqrt(16389)/3 half units. Rows, vectors and trees have shorter chains.
HALF_UNITS = 16389**0.5 / 3
RTOL = HALF_UNITS * 2.0**-24
RTOL_64 = HALF_UNITS * 2.0**-53


def make_leaves(dtype: Any = np.float32, batch: tuple[int, ...] = ()) -> list[jax.Array]:
    rng = np.random.default_rng(7)
    return [jnp.asarray(rng.normal(size=(*batch, *shape)), dtype) for shape in SHAPES]


def oracle(scale: float, leaves: list[Any]) -> np.ndarray:
    return np.array([np.sum((scale * np.asarray(x, np.float64)) ** 2) for x in leaves])


def squared(found: Squares) -> np.ndarray:
    """The squared norm, in float64."""
    return np.asarray(found.sum, np.float64) / np.asarray(found.unit, np.float64) ** 2


def sums(implementation: Any, dtype: Any, per_leaf: bool) -> None:
    """The sum over a tree, or over each of its leaves."""
    with jax.enable_x64(dtype == np.float64):
        leaves = make_leaves(dtype)
        scale = jnp.asarray(0.5, np.float64 if dtype == np.float64 else np.float32)
        f = functools.partial(
            adamw_sum_of_squares, per_leaf=per_leaf, implementation=implementation
        )
        found = jax.jit(f)(scale, leaves)
        assert {x.dtype for x in found} == {scale.dtype}
        want = oracle(0.5, leaves)
        rtol = RTOL_64 if dtype == np.float64 else RTOL
        np.testing.assert_allclose(squared(found), want if per_leaf else want.sum(), rtol=rtol)


def whole_numbers(implementation: Any) -> None:
    """Sums that float32 holds, of more leaves than a kernel takes, and run after run."""
    leaves = [jnp.full((4,), float(i % 8)) for i in range(530)]
    leaves += [jnp.full((300_001,), 1.0), jnp.full((1 << 20,), 2.0)]
    f = jax.jit(functools.partial(adamw_sum_of_squares, implementation=implementation))
    want = oracle(1.0, leaves).sum()
    for _ in range(4):
        found = f(jnp.float32(1.0), leaves).sum
        assert found == want, f"{found} is not {want}"


def deterministic(implementation: Any) -> None:
    """The same bits, run after run, of a sum that rounding enters."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1 << 21), np.float32)
    f = jax.jit(functools.partial(adamw_sum_of_squares, implementation=implementation))
    found = {float(f(jnp.float32(0.7), [x, x[:70_001]]).sum) for _ in range(8)}
    assert len(found) == 1, f"{found} differ"


def one_bad_element(implementation: Any) -> None:
    """NaN and infinity are seen."""
    f = jax.jit(functools.partial(adamw_sum_of_squares, implementation=implementation))
    for bad in (np.nan, np.inf, -np.inf):
        leaves = make_leaves()
        leaves[6] = leaves[6].at[3, 4].set(bad)
        assert not np.isfinite(f(jnp.float32(1.0), leaves).sum), f"{bad} is not seen"


def batched(implementation: Any, per_leaf: bool) -> None:
    """Under ``vmap``, with a scale for each member."""
    scales, leaves = jnp.array([0.5, 2.0]), make_leaves(batch=(2,))
    call = functools.partial(adamw_sum_of_squares, per_leaf=per_leaf, implementation=implementation)
    found = squared(jax.jit(jax.vmap(call))(scales, leaves))
    for i in range(2):
        want = oracle(float(scales[i]), [x[i] for x in leaves])
        np.testing.assert_allclose(found[i], want if per_leaf else want.sum(), rtol=RTOL)
