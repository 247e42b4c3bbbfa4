"""Guards ``adamw_sum_of_squares``: its rules, and each platform's StableHLO, against NumPy."""

from collections.abc import Callable
import functools
from typing import Any

from checks.norms import RTOL, RTOL_64, SHAPES, make_leaves, oracle
from elsewhere import run_as
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamw_xla_lowering import adamw_sum_of_squares
from adamw_xla_lowering.gpu import norm as gpu_norm


@pytest.fixture(scope="module", params=["cpu", "cuda", "tpu"])
def sum_of_squares(request: pytest.FixtureRequest) -> Callable[..., jax.Array]:
    """The public function, with the StableHLO of each platform."""

    def call(scale: Any, leaves: Any, *, per_leaf: bool = False) -> jax.Array:
        f = functools.partial(adamw_sum_of_squares, per_leaf=per_leaf)
        return run_as(request.param, f, scale, leaves)

    return call


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("per_leaf", [False, True])
def test_sums(sum_of_squares: Callable[..., jax.Array], dtype: Any, per_leaf: bool) -> None:
    leaves = make_leaves(dtype)
    found = sum_of_squares(jnp.float32(0.5), leaves, per_leaf=per_leaf)
    expected = oracle(0.5, leaves)
    np.testing.assert_allclose(found, expected if per_leaf else expected.sum(), rtol=RTOL)
    assert found.dtype == jnp.float32


def test_more_summands_than_one_kernel_takes(sum_of_squares: Callable[..., jax.Array]) -> None:
    leaves = [jnp.full((4,), float(i)) for i in range(2 * gpu_norm.MAX_MERGED_SUMMANDS + 1)]
    found = sum_of_squares(jnp.float32(1.0), leaves)
    assert found == oracle(1.0, leaves).sum()  # whole numbers that float32 holds


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_rows_of_very_largemake_leaves(
    per_leaf: bool, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are added by the kernel that sums them, here from 16 sums on that are left."""
    monkeypatch.setattr(gpu_norm, "MIN_FOLDED_ROWS", 16)
    leaves = make_leaves(batch=batch)
    call = functools.partial(adamw_sum_of_squares, jnp.float32(0.5), per_leaf=per_leaf)

    def f(leaves: list[jax.Array]) -> jax.Array:
        return jax.vmap(call)(leaves) if batch else call(leaves)

    exported = jax.export.export(
        jax.jit(f), platforms=("cuda",), disabled_checks=[jax.export.DisabledSafetyCheck.platform()]
    )(leaves)
    assert "4x16x256xf32" in exported.mlir_module()  # a quarter of 64 rows
    found = np.asarray(run_as("cuda", f, leaves))
    rows = [[x[i] for x in leaves] for i in range(*batch)] if batch else [leaves]
    expected = np.array([oracle(0.5, row) for row in rows]).reshape(*batch, -1)
    want = expected if per_leaf else expected.sum(-1)
    np.testing.assert_allclose(found, want, rtol=RTOL)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_is_seen(sum_of_squares: Callable[..., jax.Array], bad: float) -> None:
    leaves = make_leaves()
    leaves[6] = leaves[6].at[3, 4].set(bad)
    assert not np.isfinite(sum_of_squares(jnp.float32(1.0), leaves))


def test_float64() -> None:
    with jax.enable_x64(True):
        leaves = make_leaves(np.float64)
        found = adamw_sum_of_squares(jnp.float64(0.5), leaves)
        np.testing.assert_allclose(found, oracle(0.5, leaves).sum(), rtol=RTOL_64)


def test_nothing_to_sum() -> None:
    assert adamw_sum_of_squares(jnp.float32(1.0), []) == 0
    assert adamw_sum_of_squares(jnp.float32(1.0), [], per_leaf=True).shape == (0,)


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_vmap(per_leaf: bool, axes: tuple[int | None, int | None]) -> None:
    scales = jnp.array([0.5, 2.0]) if axes[0] == 0 else jnp.float32(0.5)
    leaves = make_leaves(batch=(2,)) if axes[1] == 0 else make_leaves()
    call = functools.partial(adamw_sum_of_squares, per_leaf=per_leaf)
    found = jax.jit(jax.vmap(call, in_axes=axes))(scales, leaves)
    for i in range(2):
        row = [x[i] for x in leaves] if axes[1] == 0 else leaves
        expected = oracle(float(scales[i]) if axes[0] == 0 else 0.5, row)
        np.testing.assert_allclose(found[i], expected if per_leaf else expected.sum(), rtol=RTOL)


def test_nested_vmap_with_one_batched_leaf() -> None:
    scales, leaf = jnp.array([1.0, 2.0]), jnp.arange(12.0).reshape(3, 4)

    def one(scale: jax.Array, x: jax.Array) -> jax.Array:
        return adamw_sum_of_squares(scale, [x, jnp.ones(2)])

    inner = jax.vmap(one, in_axes=(None, 0))
    found = jax.vmap(inner, in_axes=(0, None))(scales, leaf)
    expected = np.array([[s**2 * ((row**2).sum() + 2) for row in leaf] for s in scales])
    np.testing.assert_array_equal(found, expected)  # whole numbers that float32 holds


@pytest.mark.parametrize(
    ("scale", "leaf", "fragment"),
    [(jnp.int32(1), jnp.ones(2), "scale has dtype int32"), (1.0, jnp.ones(2, int), "leaf 0")],
)
def test_refuses_what_cannot_be_summed(scale: Any, leaf: jax.Array, fragment: str) -> None:
    with pytest.raises(TypeError, match=fragment):
        adamw_sum_of_squares(jnp.asarray(scale), [leaf])


def test_who_adds_leaves_before_they_are_reduced() -> None:
    def reductions(platform: str) -> int:
        traced = jax.jit(lambda x: adamw_sum_of_squares(jnp.float32(1.0), x)).trace(make_leaves())
        return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.reduce(")

    assert reductions("cpu") == len(SHAPES)
    assert reductions("tpu") == len(set(SHAPES))  # those of one shape
    assert reductions("cuda") < len(set(SHAPES))  # those of one size
