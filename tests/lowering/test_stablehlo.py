"""The numbers of the update in StableHLO, on the CPU: against the formulas in float64."""

from collections.abc import Iterator

from cpu_oracle import DTYPES, OPTIONS, check, hyper, leaves, split
import jax
import numpy as np
import pytest

from adamw_xla_lowering import adamw_update

SHAPES = [(0,), (1,), (17,), (), (3, 5), (2, 0, 4), (4, 3, 7), (4000,)]


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("param", DTYPES)
def test_matches_the_formulas(param: str, options: dict[str, bool]) -> None:
    operands, flags = split(options)
    tree = leaves(SHAPES, param, **operands)
    h = hyper(dtype=np.float64 if param == "float64" else np.float32)
    step = jax.jit(lambda h, tree: adamw_update(h, **tree, implementation="xla", **flags))
    check(step(h, tree), h, tree, **flags)
