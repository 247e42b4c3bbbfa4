"""Eight groups of leaves beside one: kernels of GPT-2 small's step, ahead of time.

The compilers are the extras gpu-compile and tpu-compile; without them these tests are skipped.
"""

from __future__ import annotations

import functools
from typing import Any

from elsewhere import target
from inspection import inspect_cases
from inspection.inspect_cases import Case
import jax
import peer_steps
import pytest
import shapes

WHERE = [("h100", "native"), ("v5e", None), ("cpu", "native")]


@functools.cache
def kernels(name: str, implementation: Any, who: str) -> int:
    init, step = {
        "one": lambda: peer_steps.ours(implementation=implementation),
        "eight": lambda: peer_steps.ours_grouped(implementation),
        "optax": peer_steps.optax_grouped,
    }[who]()
    model = shapes.gpt2_small()
    params = shapes.structs(model)
    args = params, params, jax.eval_shape(init, params)
    case = Case(who, step, args, donate=(0, 2), parameters=shapes.num_parameters(model))
    return inspect_cases.inspect(case, target(name)).report.program.count


@pytest.mark.parametrize(("name", "implementation"), WHERE)
def test_eight_groups_have_the_kernels_of_one(name: str, implementation: Any) -> None:
    target(name)
    leaves = len(shapes.gpt2_small())  # each is a kernel on a v5e, as test_compiled_kernels holds
    one = leaves if name == "v5e" else kernels(name, implementation, "one")
    assert kernels(name, implementation, "eight") <= one


def test_as_stablehlo_they_are_far_below_optax_own() -> None:
    """On an H100; XLA:GPU merges fewer leaves where they read other numbers: 20, and 16 of one."""
    target("h100")
    assert kernels("h100", "xla", "eight") <= 20
    assert kernels("h100", "xla", "optax") >= 8 * kernels("h100", "xla", "eight")
