"""What is stored in words, remainders and params that are rounded at random, on any device."""

from __future__ import annotations

from typing import Any

from cpu_oracle import hyper
import jax
import numpy as np
import words

from adamw_xla_lowering import Slot, adamw_update

SIZES = [5, 64, 1000]
FORMATS = {"float32": "float32", "stochastic": "bfloat16", "split": "bfloat16"}


def tree(params: str) -> dict[str, list[Any]]:
    """Leaves of any words, and of params and gradients of many scales."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {kind: [] for kind in ("params", "grads", "words")}
    for size in SIZES:
        scales = np.exp2(rng.integers(-40, 40, size))
        p, g = (rng.standard_normal((2, size)) * scales).astype(np.float32)
        p[:4] = [0, -0.0, np.inf, np.nan] if size > 5 else 0
        columns["params"].append(p.astype(FORMATS[params]))
        columns["grads"].append(g)
        columns["words"].append(rng.choice(words.legal().ravel(), size))
        if params == "split":
            pairs = columns.setdefault("remainder", [])
            pairs.append(rng.integers(-(2**15), 2**15, size).astype(np.int16))
    return columns


def expected(row: Any, leaf: dict[str, Any], params: Any) -> dict[str, Any]:
    """One leaf's step: the formulas of ``contract.py`` in float32, each rounded once."""
    s = {slot: row[slot] for slot in Slot}
    old = words.loaded(words.Stored(leaf["params"], leaf["words"], leaf.get("remainder")))
    with np.errstate(all="ignore"):
        g = leaf["grads"] * s[Slot.GRAD_SCALE]
        m = s[Slot.BETA_1] * old.m + s[Slot.ONE_MINUS_BETA_1] * g
        v = s[Slot.BETA_2] * old.v + s[Slot.ONE_MINUS_BETA_2] * (g * g)
        root = np.sqrt(v) * s[Slot.V_CORRECTION] + s[Slot.EPSILON]
        change = s[Slot.DECAY_RATE] * old.params + s[Slot.STEP_SIZE] * m / root
        new = words.Loaded(old.params - change, m, v)
    kept = words.stored(new, leaf["grads"], old.params, row[Slot.SALT], params)
    return dict(zip(("params", "words", "remainder"), kept, strict=True))


def same(got: Any, want: Any) -> None:
    """Equal bits, but for those of a NaN."""
    got = np.asarray(got)
    assert got.dtype == want.dtype
    nan = np.isnan(want) if want.dtype.kind != "i" else np.zeros(want.shape, bool)
    assert np.isnan(got[nan]).all()
    assert got[~nan].tobytes() == want[~nan].tobytes()


def check(implementation: Any, params: str, exact: bool) -> None:
    """A step, and one that is skipped: to the bit what float32 NumPy makes of the formulas.

    Not ``exact``, where a compiler contracts sums and divides as it likes, some words differ.
    """
    columns, flags = tree(params), {"stochastic": params == "stochastic"}

    def step(h: Any, x: Any) -> Any:
        return adamw_update(h, **x, **flags, skip=True, implementation=implementation)

    for apply in (1.0, 0.0):
        h = hyper(SALT=3.0, APPLY=apply)
        got = {k: x for k, x in jax.jit(step)(h, columns)._asdict().items() if x is not None}
        for i in range(len(SIZES)):
            leaf = {kind: column[i] for kind, column in columns.items()}
            want = expected(h[0], leaf, params) if apply else leaf
            for kind, column in got.items():
                if exact or not apply:
                    same(column[i], want[kind])
                elif kind == "words":
                    assert np.mean(np.asarray(column[i]) != want[kind]) < 0.02, params
