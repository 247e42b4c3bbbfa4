"""What it costs that a step tells its norms: kernels, bytes and estimates of GPT-2 small's step.

The compilers are the extras gpu-compile and tpu-compile. Nothing is run.
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

from adamw_xla.hlo import Report

CASES = {("h100", "xla"): 4, ("h100", "native"): 2, ("v5e", None): 0, ("v6e", None): 0}
"""How many kernels it may have more, with global clipping and all norms."""

MAX_ESTIMATE = 1.05
"""Of the TPU's estimate without."""

FEW_BYTES = 5e6
"""So much more than the 4 GB of the step may be moved: partial sums."""


@functools.cache
def report(name: str, who: str, implementation: Any = None, clip: str = "global") -> Report:
    options = peer_steps.Options(clip=clip)
    init, step = {
        "ours": lambda: peer_steps.ours(options, implementation),
        "told": lambda: peer_steps.ours_told(options, implementation),
        "told by leaf": lambda: peer_steps.ours_told(options, implementation, "per_leaf"),
        "optax told": lambda: peer_steps.optax_told(options),
    }[who]()
    model = shapes.gpt2_small()
    params = shapes.structs(model)
    args = params, params, jax.eval_shape(init, params)
    case = Case(who, step, args, donate=(0, 2), parameters=shapes.num_parameters(model))
    return inspect_cases.inspect(case, target(name)).report


@pytest.mark.parametrize("clip", ["global", "none"])
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_norms_cost_a_few_small_kernels(name: str, implementation: Any, clip: str) -> None:
    target(name)
    without, told = (report(name, who, implementation, clip) for who in ("ours", "told"))
    most = CASES[name, implementation]
    assert told.program.count <= without.program.count + most
    moved = [x.program.read + x.program.written for x in (told, without)]
    assert moved[0] <= moved[1] + FEW_BYTES
    assert not told.undonated
    if (cycles := without.program.estimated_cycles) is not None:
        assert told.program.estimated_cycles is not None
        assert told.program.estimated_cycles <= MAX_ESTIMATE * cycles


@pytest.mark.parametrize(
    ("name", "implementation", "most"), [("h100", "xla", 220), ("h100", "native", 15)]
)
def test_norms_of_leaves_pass_over_memory_once(name: str, implementation: Any, most: int) -> None:
    """As StableHLO on GPUs, a leaf is a kernel of its own then."""
    target(name)
    without, told = (
        report(name, "ours", implementation),
        report(name, "told by leaf", implementation),
    )
    moved = [x.program.read + x.program.written for x in (told, without)]
    assert moved[0] <= moved[1] + 2 * FEW_BYTES
    assert told.program.count <= most


def test_optax_norms_are_passes_of_their_own() -> None:
    """They read gradients, params and updates again."""
    target("h100")
    theirs, ours = report("h100", "optax told"), report("h100", "told", "xla")
    assert theirs.program.count >= 20 * ours.program.count
    moved = [x.program.read + x.program.written for x in (theirs, ours)]
    assert moved[0] > 1.2 * moved[1]
