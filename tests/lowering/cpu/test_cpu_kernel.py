"""What the CPU kernel alone does: buckets, and its own conversions of 16-bit numbers."""

import functools
from typing import Any

from cpu_oracle import DTYPES, check, hyper, leaves, require_native
import jax
import numpy as np
import pytest

from adamw_xla_lowering import UpdateResult, adamw_update


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


@pytest.fixture(autouse=True)
def _x64() -> Any:
    with jax.enable_x64(True):
        yield


def run(h: Any, tree: dict[str, Any], **options: Any) -> UpdateResult:
    step = functools.partial(adamw_update, implementation="native", **options)
    return jax.jit(lambda h, tree: step(h, **tree))(h, tree)


def test_groups_and_leaf_scale_reach_their_leaves_across_buckets() -> None:
    n = 70  # five calls
    groups = [i * 7 % 3 for i in range(n)]
    h = hyper(3)
    tree: dict[str, Any] = {"leaf_scale": np.linspace(0.1, 2.0, n, dtype=np.float32)}
    tree |= leaves([(i % 5 + 1,) for i in range(n)])
    check(run(h, tree, groups=groups), h, tree, groups)


@pytest.mark.parametrize("param", ["bfloat16", "float16"])
def test_every_16_bit_pattern_survives_unchanged(param: str) -> None:
    """With no step and no decay a param is widened and narrowed again."""
    bits = np.arange(2**16, dtype=np.uint16)
    wide = bits.view(DTYPES[param]).astype(np.float32)
    bits, wide = bits[~np.isinf(wide)], wide[~np.isinf(wide)]  # 0*inf, the decay, is NaN
    tree = leaves([bits.shape], param)
    tree["params"] = [bits.view(DTYPES[param])]
    tree["grads"] = [np.zeros(bits.shape, DTYPES[param])]
    h = hyper(STEP_SIZE=0.0, DECAY_RATE=0.0)
    got = np.asarray(run(h, tree).params[0])
    flushed = np.abs(wide) < np.finfo(np.float32).tiny  # as everywhere in XLA:CPU
    same = (got.view(np.uint16) == bits) | (np.isnan(wide) & np.isnan(got.astype(np.float32)))
    np.testing.assert_array_equal(same | flushed, True)
    np.testing.assert_array_equal(got[flushed].astype(np.float32), 0.0)


@pytest.mark.parametrize("param", ["bfloat16", "float16"])
def test_rounding_is_to_nearest_even(param: str) -> None:
    """A param of zero becomes -STEP_SIZE*m/EPSILON, rounded once."""
    rng = np.random.default_rng(0)
    edges = np.array([65504, 65519.99, 65520, 1e30, 6e-8, 2.9e-8, 3.1e-8, 6.1e-5, 0.0], np.float32)
    with np.errstate(over="ignore"):
        scales = 2.0 ** rng.integers(-26, 18, 20_000)
    m = np.concatenate([edges, -edges, (rng.standard_normal(20_000) * scales).astype(np.float32)])
    ties = np.arange(1, 4096, dtype=np.float32) / 2048 + np.float32(2**-12)
    m = np.concatenate([m, ties])
    zeros = np.zeros(m.shape, np.float32)
    tree = {"params": [zeros.astype(DTYPES[param])], "grads": [zeros], "m": [m], "v": [zeros]}
    h = hyper(STEP_SIZE=-1.0, EPSILON=1.0, BETA_1=1.0)
    got = np.asarray(run(h, tree).params[0])
    with np.errstate(over="ignore"):
        want = m.astype(DTYPES[param])
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
