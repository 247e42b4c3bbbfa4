"""The GPU's kernel with words and 16-bit params: to the bit what float32 NumPy makes."""

from __future__ import annotations

from collections.abc import Iterator

from checks import stored
import jax
import pytest
from triton_interpreter import Interpreted

from adamw_xla_lowering.gpu import kernel as gpu_kernel
from adamw_xla_lowering.gpu.pieces import Launch


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu_kernel, "LAUNCHES", {80: Launch(block=64, num_warps=1)})
    Interpreted().install(monkeypatch)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("params", stored.FORMATS)
def test_every_bit_is_that_of_the_formulas(params: str) -> None:
    stored.check("native", params, exact=True)
