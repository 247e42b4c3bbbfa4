"""What compilers make of states in words: bytes that a step moves, kernels, and the TPU's estimate.

The compilers are the extras gpu-compile and tpu-compile. Nothing is run.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from elsewhere import target
from inspection import inspect_cases
from inspection.inspect_cases import Case, Inspected
import jax
import jax.numpy as jnp
import pytest

import adamw_xla as ax

BYTES = {"moments": (8, 28), "word16": (2, 16), "bfloat16": (2, 10)}
"""Of the state of a param, and that a step moves for it: gradients have the params' dtype."""

LAYERS = ((768, 768),) * 12
LARGE = ((8192, 8192),)
MAX_ESTIMATE = 0.62
"""With words, of that with moments. By bytes it would be 16/28 = 0.57."""


@functools.cache
def inspected(kind: str, name: str, shapes: tuple[tuple[int, ...], ...]) -> Inspected:
    options: dict[str, Any] = {} if kind == "moments" else {"state_format": "word16"}
    if kind == "bfloat16":
        options["params_rounding"] = "stochastic"
    config = ax.AdamW(**options)
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    state = jax.eval_shape(functools.partial(ax.adamw_init, config=config), params)
    step = functools.partial(ax.adamw_step, config=config)
    case = Case(kind, step, (params, params, state), donate=(0, 2))
    return inspect_cases.inspect(case, target(name))


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("name", ["h100", "v5e", "v6e"])
def test_bytes_of_state_and_step(name: str, kind: str) -> None:
    found, count = inspected(kind, name, LAYERS), sum(map(math.prod, LAYERS))
    state, moved = BYTES[kind]
    numbers = [n for leaf in found.report.leaves for n in leaf.moments]
    arguments = {x.number: x for x in found.report.inputs}
    assert sum(arguments[n].bytes for n in numbers) == state * count
    update = found.report.update
    assert update.read + update.written == pytest.approx(moved * count, rel=1e-3)
    assert all(leaf.in_place for leaf in found.report.leaves)
    moments = inspected("moments", name, LAYERS).report
    assert found.report.program.count <= moments.program.count


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_the_estimate_falls_as_the_bytes_do(name: str) -> None:
    words, moments = (inspected(kind, name, LARGE).report.program for kind in ("word16", "moments"))
    assert words.count == moments.count
    assert words.estimated_cycles <= MAX_ESTIMATE * moments.estimated_cycles
