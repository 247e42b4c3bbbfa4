"""Guards ``adamw_sum_of_squares``: its rules, and each platform's StableHLO, against NumPy."""

from collections.abc import Callable
import functools
import math
from typing import Any

from checks.norms import RTOL, RTOL_64, SHAPES, make_leaves, oracle, squared
from elsewhere import run_as
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import adamw_xla as ax
from adamw_xla_lowering import Squares, adamw_sum_of_squares, norm_stablehlo, small_unit
from adamw_xla_lowering.gpu import norm as gpu_norm

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("other", "reference")]


@pytest.fixture(scope="module", params=["cpu", "cuda", "tpu", *SLOW])
def sum_of_squares(request: pytest.FixtureRequest) -> Callable[..., Squares]:
    """The public function, with the StableHLO of each platform."""

    def call(scale: Any, leaves: Any, *, per_leaf: bool = False) -> Squares:
        if request.param == "reference":
            return ax.reference.sum_of_squares(scale, leaves, per_leaf=per_leaf)
        f = functools.partial(adamw_sum_of_squares, per_leaf=per_leaf)
        if request.param != "other":
            return run_as(request.param, f, scale, leaves)
        with pytest.MonkeyPatch.context() as patch:  # as where a partitioner is still to come
            patch.setattr(norm_stablehlo, "devices_hold_whole_operands", lambda ctx: False)
            return run_as("tpu", f, scale, leaves)

    return call


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("per_leaf", [False, True])
def test_sums(sum_of_squares: Callable[..., Squares], dtype: Any, per_leaf: bool) -> None:
    leaves = make_leaves(dtype)
    found = sum_of_squares(jnp.float32(0.5), leaves, per_leaf=per_leaf)
    expected = oracle(0.5, leaves)
    want = expected if per_leaf else expected.sum()
    np.testing.assert_allclose(squared(found), want, rtol=RTOL)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
    assert np.all(found.unit == 1)


def test_more_summands_than_one_kernel_takes(sum_of_squares: Callable[..., Squares]) -> None:
    leaves = [jnp.full((4,), float(i)) for i in range(2 * gpu_norm.MAX_MERGED_SUMMANDS + 1)]
    found = sum_of_squares(jnp.float32(1.0), leaves)
    assert found.sum == oracle(1.0, leaves).sum()  # whole numbers that float32 holds


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_rows_of_very_large_leaves(
    per_leaf: bool, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are added by the kernel that sums them, here from 16 sums on that are left."""
    monkeypatch.setattr(gpu_norm, "MIN_FOLDED_ROWS", 16)
    leaves = make_leaves(batch=batch)
    call = functools.partial(adamw_sum_of_squares, jnp.float32(0.5), per_leaf=per_leaf)

    def f(leaves: list[jax.Array]) -> Squares:
        return jax.vmap(call)(leaves) if batch else call(leaves)

    exported = jax.export.export(
        jax.jit(f), platforms=("cuda",), disabled_checks=[jax.export.DisabledSafetyCheck.platform()]
    )(leaves)
    assert "8x16x128xcomplex<f32>" in exported.mlir_module()  # an eighth of 128 rows
    found = squared(run_as("cuda", f, leaves))
    rows = [[x[i] for x in leaves] for i in range(*batch)] if batch else [leaves]
    expected = np.array([oracle(0.5, row) for row in rows]).reshape(*batch, -1)
    want = expected if per_leaf else expected.sum(-1)
    np.testing.assert_allclose(found, want, rtol=RTOL)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_is_seen(sum_of_squares: Callable[..., Squares], bad: float) -> None:
    leaves = make_leaves()
    leaves[6] = leaves[6].at[3, 4].set(bad)
    assert not np.isfinite(sum_of_squares(jnp.float32(1.0), leaves).sum)
    sums = sum_of_squares(jnp.float32(1.0), leaves, per_leaf=True).sum
    np.testing.assert_array_equal(np.isfinite(sums), np.arange(len(leaves)) != 6)


WIDE: dict[tuple[int, ...], Any] = {
    (3,): np.float32,
    (2, 5): ml_dtypes.bfloat16,
    (7,): np.float16,
    (2048,): np.float32,
}


@st.composite
def _trees(draw: st.DrawFn) -> list[np.ndarray]:
    """Leaves of all dtypes and magnitudes, each element around its leaf's."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    leaves = []
    for shape, dtype in WIDE.items():
        # The last leaf is large enough to be summed in two stages.
        spread = draw(st.sampled_from([0, 3, 40]))
        exponents = draw(st.floats(-149.0, 127.9)) - spread * rng.random(shape)
        limit = float(ml_dtypes.finfo(dtype).max)
        x = np.minimum(2.0**exponents, limit) * rng.choice([-1, 1], shape)
        leaves.append(x.astype(dtype))
    return leaves


@pytest.mark.parametrize("per_leaf", [False, True])
def test_norms_of_any_magnitude(sum_of_squares: Callable[..., Squares], per_leaf: bool) -> None:
    """Every finite tree has the norm that float64 says, but for elements below 1.1e-19."""
    structs = [jnp.zeros(shape, dtype) for shape, dtype in WIDE.items()]
    compiled = jax.jit(functools.partial(sum_of_squares, jnp.float32(1.0), per_leaf=per_leaf))
    compiled = compiled.lower(structs).compile()
    units = set()

    @hypothesis.given(_trees())
    @hypothesis.settings(max_examples=150)
    def agree(leaves: list[np.ndarray]) -> None:
        found = compiled([jnp.asarray(x) for x in leaves])
        want = oracle(1.0, leaves)
        want = want if per_leaf else want.sum()
        lost = sum(x.size for x in leaves) * float(np.finfo(np.float32).tiny)
        np.testing.assert_allclose(squared(found), want, rtol=RTOL, atol=lost)
        units.update(np.ravel(found.unit).tolist())

    agree()
    assert units == {1.0, small_unit(np.float32)}


def test_sums_of_as_many_as_there_may_be() -> None:
    """The largest number, as often as 2^39 times, does not overflow in the small unit."""
    for dtype in (np.float32, np.float64):
        largest = float(np.finfo(dtype).max)
        assert math.log2(largest * small_unit(dtype)) * 2 + 39 < np.finfo(dtype).maxexp
        # In it what overflows in units of 1 is far from where squares vanish.
        assert np.sqrt(largest) * small_unit(dtype) / 2**30 > np.sqrt(np.finfo(dtype).tiny)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("per_leaf", [False, True])
def test_float64_of_any_magnitude(platform: str, per_leaf: bool) -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        for low, high in ((-300, -100), (-3, 3), (100, 308), (-150, 308)):
            leaves = [10.0 ** rng.uniform(low, high, n) for n in (3, 2048)]
            f = functools.partial(adamw_sum_of_squares, per_leaf=per_leaf)
            found = run_as(platform, f, jnp.float64(1.0), [jnp.asarray(x) for x in leaves])
            want = np.array([np.sum(x.astype(np.longdouble) ** 2) for x in leaves])
            got = np.asarray(found.sum, np.longdouble) / np.asarray(found.unit, np.longdouble) ** 2
            lost = 2051 * np.longdouble(np.finfo(np.float64).tiny)
            want = want if per_leaf else want.sum()
            assert np.all(np.abs(got - want) <= RTOL_64 * want + lost)


def test_float64() -> None:
    with jax.enable_x64(True):
        leaves = make_leaves(np.float64)
        found = adamw_sum_of_squares(jnp.float64(0.5), leaves)
        np.testing.assert_allclose(squared(found), oracle(0.5, leaves).sum(), rtol=RTOL_64)


def test_cpus_read_the_leaves_again_in_a_branch_alone() -> None:
    """XLA makes both sides of a branch by a bool, if they are only reductions."""
    leaves = make_leaves()
    text = jax.jit(adamw_sum_of_squares).lower(jnp.float32(1.0), leaves).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    assert entry.count(" conditional(") == 1
    readers = [line for line in entry.splitlines() if "f32[16389]" in line]
    assert len(readers) <= 4, readers  # the argument, its sum, and its way into the branch


def test_nothing_to_sum() -> None:
    assert adamw_sum_of_squares(jnp.float32(1.0), []) == (0, 1)
    assert adamw_sum_of_squares(jnp.float32(1.0), [], per_leaf=True).sum.shape == (0,)


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_vmap(per_leaf: bool, axes: tuple[int | None, int | None]) -> None:
    scales = jnp.array([0.5, 2.0]) if axes[0] == 0 else jnp.float32(0.5)
    leaves = make_leaves(batch=(2,)) if axes[1] == 0 else make_leaves()
    call = functools.partial(adamw_sum_of_squares, per_leaf=per_leaf)
    found = squared(jax.jit(jax.vmap(call, in_axes=axes))(scales, leaves))
    for i in range(2):
        row = [x[i] for x in leaves] if axes[1] == 0 else leaves
        expected = oracle(float(scales[i]) if axes[0] == 0 else 0.5, row)
        np.testing.assert_allclose(found[i], expected if per_leaf else expected.sum(), rtol=RTOL)


def test_nested_vmap_with_one_batched_leaf() -> None:
    scales, leaf = jnp.array([1.0, 2.0]), jnp.arange(12.0).reshape(3, 4)

    def one(scale: jax.Array, x: jax.Array) -> Squares:
        return adamw_sum_of_squares(scale, [x, jnp.ones(2)])

    inner = jax.vmap(one, in_axes=(None, 0))
    found = jax.vmap(inner, in_axes=(0, None))(scales, leaf)
    expected = np.array([[s**2 * ((row**2).sum() + 2) for row in leaf] for s in scales])
    np.testing.assert_array_equal(found.sum, expected)  # whole numbers that float32 holds


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

    assert reductions("cpu") == 2 * len(SHAPES) + 1  # one half, and its question, in a branch
    assert reductions("tpu") == 2 * len(set(SHAPES))  # those of one shape
    assert reductions("cuda") < len(set(SHAPES))  # those of one size, and both sums
