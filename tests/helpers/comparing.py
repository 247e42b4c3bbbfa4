"""Two programs' results of one computation: of the same bits, or as close as rounding allows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

HALF_A_UNIT = 2.0**-24  # of a float32, in units of its value

# Compilers fuse other multiplications with additions. So either program may round each of
# the two sums that make a result (p less decay, less step; the mean of m and g) elsewhere.
RTOL = 2 * 2 * HALF_A_UNIT
# Where a sum cancels, the error is of its terms; they are below one in these problems: the
# products with the rates and with one less the betas, or a param that is stepped across 0.
ATOL = 2 * HALF_A_UNIT / 2


def same(a: Any, b: Any) -> None:
    """Equal, leaf by leaf, in a tree of the same structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a: Any, b: Any, rtol: float = RTOL, atol: float = ATOL) -> None:
    """One step in float32 on numbers of order one; for more, say what its errors add up to."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        got, want = np.asarray(x), np.asarray(y)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
