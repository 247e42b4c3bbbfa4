"""What is checked on a device, by name: for the tests (``test_on_gpu.py``) and the GPU report.

XLA:GPU makes ``div.full.f32``, ``sqrt.approx.f32`` and contracted sums of StableHLO, so "xla"
is judged there by what PTX promises of these; the kernel's operations are IEEE's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
import contextlib
import dataclasses
import functools
import itertools
import math
import time
import traceback
from typing import Any

import bounded
from cpu_oracle import OPTIONS
import jax
import jax.numpy as jnp
import numpy as np

import adamw_xla as ax
from checks import norms, steps, stored, updates
from checks.tables import BATCHES

DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float64", "float64"),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
]
"""Of params and gradients."""

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "global clip": {"global_clipnorm": 0.75, "skip_nonfinite": True},
    "clip by leaf": {"clipnorm": 0.5},
    "everything": {
        "amsgrad": True,
        "clipvalue": 0.25,
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 3,
        "nesterov": True,
        "epsilon_root": 1e-3,
        "weight_decay_mask": [True, False, True, False, True, False],
    },
    "accumulation": {"gradient_accumulation_steps": 3, "loss_scale_factor": 24.0},
    "cautious": {"cautious_decay": True, "maximize": True, "decay_times_lr": False},
}

BIG_BYTES = 2**31 * 20
"""What ``beyond_32_bits`` needs, with room to spare."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing to check; ``run`` raises AssertionError where it does not hold.

    ``alone``: it needs the device's memory for itself.
    """

    name: str
    run: Callable[[], None]
    alone: bool = False

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a check went: what was wrong, or nothing."""

    name: str
    seconds: float
    problem: str | None = None


def all_checks(implementation: str, platform: str, quick: bool = False) -> list[Check]:
    """Everything that is checked of an implementation on a platform; ``quick``: some of it."""
    found = list(_checks(implementation, platform))
    return found if not quick else [check for check in found[::16] if not check.alone]


def _checks(implementation: str, platform: str) -> Iterator[Check]:
    exact = implementation == "native" or platform != "gpu"
    machine = bounded.IEEE if exact else bounded.PTX
    slack = steps.PTX if platform == "gpu" else steps.NONE  # the step's numbers are XLA's

    def update(name: str, f: Callable[..., None], *args: Any, alone: bool = False) -> Check:
        run = functools.partial(f, implementation, machine, *args)
        return Check(f"{implementation}: {name}", run, alone)

    def norm(name: str, f: Callable[..., None], *args: Any) -> Check:
        return Check(f"{implementation}: {name}", functools.partial(f, implementation, *args))

    for chosen, (param, grad) in itertools.product(OPTIONS, DTYPES):
        what = "+".join(chosen) or "plain"
        yield update(f"{what}, {param}, {grad}", updates.options, chosen, param, grad)
    for param in ("float32", "bfloat16"):
        yield update(f"equal sizes, {param}", updates.alike, param)
        yield update(f"large leaves, {param}", updates.large, param)
        yield update(f"in place, {param}", updates.in_place, param)
        yield update(f"skipped, {param}", updates.skipped, param)
    for params in stored.FORMATS:
        run = functools.partial(stored.check, implementation, params, implementation == "native")
        yield Check(f"{implementation}: words, {params}", run)
    for seed in range(12):
        yield update(f"random tree {seed}", updates.random, seed)
    for case, shape in itertools.product(BATCHES, [(5, 7), (64,), (65,)]):
        yield update(f"vmap of {case}, {shape}", updates.batched, case, shape)
    yield update("three vmaps", updates.batched_thrice)
    yield update("NaN and infinity", updates.nan_and_infinity)
    yield update("float64 beside bfloat16", updates.float64_beside_bfloat16)
    yield update("the same bits twice", updates.deterministic)
    kinds = [np.float32, jnp.bfloat16, np.float16, np.float64]
    for dtype, per_leaf in itertools.product(kinds, [False, True]):
        where = "leaf" if per_leaf else "tree"
        yield norm(f"norm by {where}, {np.dtype(dtype)}", norms.sums, dtype, per_leaf)
    for per_leaf in (False, True):
        yield norm(f"norm under vmap{', by leaf' * per_leaf}", norms.batched, per_leaf)
    yield norm("norm of whole numbers", norms.whole_numbers)
    yield norm("norm: the same bits twice", norms.deterministic)
    yield norm("norm: one bad element", norms.one_bad_element)
    for name, arguments in CONFIGS.items():
        run = functools.partial(_steps, implementation, arguments, slack)
        yield Check(f"{implementation}: six steps, {name}", run)
    if platform == "gpu" and _memory() > BIG_BYTES:
        yield update("a leaf of more than 2^31 elements", updates.beyond_32_bits, alone=True)


def _steps(implementation: Any, arguments: dict[str, Any], slack: steps.Slack) -> None:
    config = ax.AdamW(**arguments)
    step = jax.jit(lambda p, g, s, _: ax.adamw_step(p, g, s, config, implementation=implementation))
    names = ("skip",) if config.skip_nonfinite else ()
    steps.check_run(names, config, step, steps.TREE, 6, 3, slack)


def _memory() -> int:
    """Bytes that this process may have of the first device."""
    return int((jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0))


def run_all(checks: Iterable[Check], threads: int, until: float) -> Iterator[Outcome]:
    """Runs checks side by side, for the compiler's sake, and yields how each went.

    Those that are not made at ``until`` (of ``time.monotonic``) are left out; what runs then
    goes on, and keeps the process from ending.
    """
    found = list(checks)
    pool = ThreadPoolExecutor(threads)
    running = [pool.submit(_run, check, until) for check in found if not check.alone]
    left = None if until == math.inf else max(until - time.monotonic(), 0)
    with contextlib.suppress(TimeoutError):
        for future in as_completed(running, left):
            if (outcome := future.result()) is not None:
                yield outcome
    pool.shutdown(wait=False, cancel_futures=True)
    for check in found:
        if check.alone and (outcome := _run(check, until)) is not None:
            yield outcome


def _run(check: Check, until: float) -> Outcome | None:
    start = time.monotonic()
    if start >= until:
        return None
    problem = None
    try:
        check.run()
    except Exception as error:  # whatever it is, the others have their turn
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        problem = f"{type(error).__name__} at {where}: {str(error)[:600]}"
    return Outcome(check.name, time.monotonic() - start, problem)
