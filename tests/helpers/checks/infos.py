"""What a step tells of itself, judged against the float64 oracle.

A norm's elements may be off as results may (``steps.py``): by 4 units in the last place of their
terms, and norms of what differs by ``e`` differ by at most ``|e|``. On top of that come the squares
and their sum: of n of them, in any order, a relative ``(n + 2) eps / 2``, of which a norm has half,
and its root, quotient and factor a rounding each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import oracle

import adamw_xla as ax

from . import steps

Array = np.ndarray[Any, np.dtype[np.float64]]
FACTOR_ULPS = 4  # of what clips: a sum's root, a quotient, and the product with the unit


def _norm(leaves: Sequence[Array]) -> float:
    with np.errstate(over="ignore"):
        return float(np.sqrt(sum(np.sum(np.square(x)) for x in leaves)))


def check(
    info: ax.StepInfo, params: Sequence[Any], new_params: Sequence[Any], terms: oracle.Terms
) -> None:
    """Raises AssertionError where the info is not the oracle's.

    Args:
      info: of one step, with the norms of each leaf if these are to be judged.
      params: before it.
      new_params: after it.
      terms: the oracle's.
    """
    exact = terms.info
    wide = [np.float64 if p.dtype == np.float64 else np.float32 for p in params]
    dtype = np.dtype(np.float64 if np.float64 in wide else np.float32)
    eps = float(np.finfo(np.float32).eps)
    assert bool(info.applied) == exact.applied
    assert {x.dtype for x in jax.tree.leaves(info)} == {dtype, np.dtype(bool)}
    for name in ("learning_rate", "weight_decay"):
        np.testing.assert_allclose(getattr(info, name), getattr(exact, name), rtol=2 * eps)
    live = sorted(exact.added)
    factor = steps.FACTOR_ULPS["step"]

    def off(terms: Array, i: int) -> Array:
        return np.asarray((steps.ULPS + factor) * steps.spacing(terms, wide[i]))

    def off_added(i: int) -> Array:
        units = steps.EXPM1_ULPS + factor
        return off(terms.added[i], i) + units * steps.spacing(terms.step[i], wide[i])

    new = {i: np.asarray(new_params[i]).astype(np.float64) for i in live}
    # Of a new param the norm is that of what is stored.
    columns: dict[str, tuple[dict[int, Array], Callable[[int], Array]]] = {
        "grad_norm": (exact.grads, lambda i: off(terms.grads[i], i)),
        "param_norm": (new, lambda i: np.zeros_like(new[i])),
        "update_norm": (exact.added, off_added),
    }
    for name, (values, error) in columns.items():
        # What has a norm: a part of some leaves, all of each or one of its layers.
        found: list[tuple[Any, list[int], Any]] = [(getattr(info, name), live, ...)]
        if info.per_leaf is not None:
            for i, norms in enumerate(getattr(info.per_leaf, name)):
                layers = enumerate(norms) if np.ndim(norms) else [(..., norms)]
                found += [(norm, [i], part) for part, norm in layers]
        for got, leaves, part in found:
            if not live:  # nothing was measured
                assert np.isnan(got), name
                continue
            own = [values[i][part] for i in leaves]
            want, n = _norm(own), sum(x.size for x in own)
            allowed = _norm([error(i)[part] for i in leaves]) if np.isfinite(want) else 0.0
            allowed += want * ((n + 2) / 4 + 3) * eps
            # Squares of what is below the root of the smallest normal number count as 0.
            allowed += np.sqrt(n * float(np.finfo(np.float32).tiny))
            assert abs(float(got) - want) <= allowed or _same(float(got), want), (
                name,
                leaves,
                part,
            )
    if live:
        n = sum(x.size for x in exact.grads.values())
        np.testing.assert_allclose(
            info.clip_factor, exact.clip_factor, rtol=((n + 2) / 4 + FACTOR_ULPS) * eps
        )
    else:
        assert np.isnan(info.clip_factor)


def _same(a: float, b: float) -> bool:
    return a == b or not (np.isfinite(a) or np.isfinite(b))
