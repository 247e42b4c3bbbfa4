"""Each example trains, and goes on from its checkpoint as if it had not stopped."""

from pathlib import Path
import runpy

import pytest

import adamw_xla.optax

EXAMPLES = Path(__file__).parent / "examples"
NEEDS = {
    "plain_jax": ["orbax.checkpoint"],
    "flax_nnx": ["flax", "orbax.checkpoint"],
    "flax_linen": ["flax", "orbax.checkpoint"],
    "equinox_filtered": ["equinox", "orbax.checkpoint"],
    "equinox_documented": ["equinox", "orbax.checkpoint"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str) -> None:
    for module in NEEDS[name]:
        pytest.importorskip(module)
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert names.get("adamw", adamw_xla.optax.adamw) is adamw_xla.optax.adamw
    assert names["losses"][-1] < names["losses"][0] / 100
    assert names["went_on"] == names["resumed"]
    assert names["went_on"][1] < names["went_on"][0] < names["losses"][-1]


def test_all_examples_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys()
