"""Which trees ``bench.py step`` and ``gpu_report.py`` time, and how: needs no package but JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import math
import os
import statistics
import time

from benches import step_peers
from benches.jitted import Call, Carry, Jitted
from benches.step_peers import Build, Peer
from benches.timing import no_gc
import jax
import shapes


@dataclasses.dataclass(frozen=True)
class Case:
    """One tree, dtype, clipping, and way to call the step."""

    name: str
    shapes: list[tuple[int, ...]]
    dtype: str = "float32"
    clip: bool = False
    call: Call = "donated"

    @property
    def least_bytes(self) -> int:
        """What a step must read and write."""
        return step_peers.bytes_moved(self.shapes, self.dtype)

    @property
    def label(self) -> str:
        call = "" if self.call == "donated" else f" {self.call}"
        return f"{self.name} {self.dtype}{' clip' if self.clip else ''}{call}"


CASES = {
    "cpu": ("16x4M", "16x32k", "gpt2-small", "400x64k", "1000x1k"),
    "gpu": ("gpt2-small", "resnet50", "400x64k", "1000x1k", "1x256M"),
}
"""By device, what is measured if nothing is asked for."""

STEPS = 20
"""Steps for each reading of the clock on GPUs; on CPUs see ``turns.TURN``."""


def trees() -> dict[str, list[tuple[int, ...]]]:
    """The trees that can be asked for, by name."""
    million, k = 1 << 20, 1 << 10
    return {
        "16x4M": [(4 * million,)] * 16,
        "16x32k": [(32 * k,)] * 16,  # stays in the cache, if few take part
        "gpt2-small": list(shapes.MODELS["gpt2-small"]().values()),
        "resnet50": list(shapes.MODELS["resnet50"]().values()),
        "400x64k": [(64 * k,)] * 400,
        "1000x1k": [(k,)] * 1000,
        "4x64M": [(64 * million,)] * 4,
        "1x256M": [(256 * million,)],
    }


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds per step of every peer, round by round."""

    case: Case
    seconds: dict[str, list[float]]

    def median(self, peer: str) -> float:
        return statistics.median(self.seconds[peer])

    def ratio(self, peer: str, ours: str, floor: str | None = None) -> tuple[float, float, float]:
        """Ratio of medians, and the quartiles of the rounds' own ratios."""
        off = self.seconds[floor] if floor else [0.0] * len(self.seconds[ours])
        rounds = [
            (theirs - base) / (mine - base)
            for theirs, mine, base in zip(self.seconds[peer], self.seconds[ours], off, strict=True)
            if mine > base
        ]
        base = statistics.median(off)
        low, _, high = statistics.quantiles(rounds, n=4)
        return (self.median(peer) - base) / (self.median(ours) - base), low, high


Failed = Callable[[str, Exception], None]
"""Told of a peer that could not be built or run, which is then left out."""


def _not_tolerated(peer: str, error: Exception) -> None:
    raise error


def build(
    case: Case,
    peers: Mapping[str, Build],
    failed: Failed = _not_tolerated,
    until: float = math.inf,
) -> dict[str, Peer]:
    """Builds and warms up every peer; compiles them side by side, the first first.

    Peers whose params and state are alike take turns on one set of arrays: a sweep of a
    dozen variants then needs the memory of one. Who is not compiled at ``until`` (of
    ``time.monotonic``) has failed; its compiler goes on, and the process waits for it to end.
    """
    grads = step_peers.make_grads(case.shapes, case.dtype)
    built: dict[str, Peer] = {}
    carries: dict[object, Carry] = {}
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    compiling: dict[str, Future[None]] = {}
    for name, make in peers.items():
        try:
            built[name] = peer = make(case.shapes, case.dtype, grads, case.clip)
        except Exception as error:
            failed(name, error)
            continue
        if isinstance(peer, Jitted):
            peer.carry = carries.setdefault(peer.carry.kind, peer.carry)
        compiling[name] = pool.submit(peer.prepare)
    for name, future in compiling.items():
        try:
            left = None if math.isinf(until) else max(until - time.monotonic(), 0)
            future.result(left)
            built[name].run(2)
        except TimeoutError:
            failed(name, TimeoutError("was not compiled in time"))
            del built[name]
        except Exception as error:
            failed(name, error)
            del built[name]
    pool.shutdown(wait=False, cancel_futures=True)
    return built


def time_rounds(
    case: Case,
    built: Mapping[str, Peer],
    rounds: int,
    steps: int,
    tick: Callable[[], None] = lambda: None,
) -> Result:
    """Times ``steps`` steps of every peer once per round, in an order that rotates."""
    names = list(built)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with no_gc():
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                start = time.perf_counter()
                built[name].run(steps)
                seconds[name].append((time.perf_counter() - start) / steps)
            tick()
    return Result(case, seconds)


def device_name() -> str:
    """What the default device calls itself."""
    return str(jax.devices()[0].device_kind)
