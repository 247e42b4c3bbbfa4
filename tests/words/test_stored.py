"""Guards what an update stores: to the bit what the oracle makes of the same float32 results."""

from __future__ import annotations

from typing import Any

from bounded import assert_within
from cpu_oracle import expected, hyper
import numpy as np
import pytest
from update_contract.implementations import IMPLEMENTATIONS
import words
from words import Loaded, Stored, formats

SIZE = 50_000
NUMBER = 7.0
CONTRACTED = 0.04
"""Of params, those in whose sums XLA:CPU may contract otherwise beside other results."""

KINDS = ("float32", "nearest", "stochastic", "split")
OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "clip_value": {"clip_value": True},
    "nesterov": {"nesterov": True, "epsilon_root": True},
}
UNCONTRACTED = ("reference", "cpu kernel")
NAMES = [name for name in formats.NAMES if name in IMPLEMENTATIONS]


def leaf(kind: str) -> tuple[Any, Any]:
    """What is stored, of all sizes, and gradients: some 0, some as large as the state, some not."""
    rng = np.random.default_rng(3)
    size = np.exp2(rng.uniform(-40, 10, SIZE))
    g = (rng.standard_normal(SIZE) * size).astype(np.float32)
    g[rng.random(SIZE) < 0.2] = 0
    m = (rng.standard_normal(SIZE) * size / 3).astype(np.float32)
    v = (size * size * rng.chisquare(4, SIZE) / 4).astype(np.float32)
    packed = words.encode(m, v, rng.integers(0, 2**32, SIZE, dtype=np.uint32))
    packed[: SIZE // 20] = words.legal()[0, 0, 0]
    p = (rng.standard_normal(SIZE) * 0.1).astype(np.float32)
    p[::50] = 0
    params, rest = words.split(p)
    if kind == "float32":
        return Stored(p, packed), g
    return Stored(params, packed, rest if kind == "split" else None), g


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_stores_what_the_oracle_makes_of_its_results(
    name: str, kind: str, options: dict[str, bool]
) -> None:
    """The float32 results are those of the same update with float32 state."""
    implementation = IMPLEMENTATIONS[name]
    with implementation.there():
        old, g = leaf(kind)
        before = words.loaded(old)
        row = hyper(SALT=NUMBER, CLIP_VALUE=3.0)
        rest = None if old.remainders is None else [old.remainders]
        operands = {"params": [old.params], "grads": [g], "words": [old.words], "remainder": rest}
        tree = {kind: x for kind, x in operands.items() if x is not None}
        found = implementation.step(None, stochastic=kind == "stochastic", **options)(row, tree)
        wide = {"params": [before.params], "grads": [g], "m": [before.m], "v": [before.v]}
        result = implementation.step(None, **options)(row, wide)
        new = Loaded(*(np.asarray(x[0]) for x in (result.params, result.m, result.v)))
    want = words.stored(new, g, before.params, NUMBER, kind)
    np.testing.assert_array_equal(bits(found.words[0]), bits(want.words))
    if name in UNCONTRACTED:
        np.testing.assert_array_equal(bits(found.params[0]), bits(want.params))
        if rest:
            np.testing.assert_array_equal(bits(found.remainder[0]), bits(want.remainders))
    stored = Stored(found.params[0], found.words[0], found.remainder[0] if rest else None)
    got, at = (words.loaded(Stored(*map(nothing_or_array, x))).params for x in (stored, want))
    assert np.mean(got != at) < CONTRACTED
    if kind in ("float32", "split"):
        whole = {kind: x[0] for kind, x in wide.items()}
        assert_within(got, expected(row[0], whole, **options)["params"], "params")


def nothing_or_array(x: Any) -> Any:
    return None if x is None else np.asarray(x)


def bits(x: Any) -> Any:
    return np.asarray(x).view(np.uint8)
