"""Who takes part where the device alone is timed: many steps are queued there before it begins."""

from __future__ import annotations

import functools
import time
from typing import Any, Protocol

from benches import gpu_peers, step_peers
from benches.jitted import LOOP, Looped
from benches.step_cases import Case, Result
from benches.step_peers import Build, TorchFused
from benches.timing import no_gc
import jax
import jax.numpy as jnp

SLEEP = 20_000_000, 2_000_000_000
"""Cycles for which torch's device sleeps while steps are queued: at first, and at most (1 s)."""

QUEUED = 8
"""Steps of torch's that wait for the device: a queue holds about a thousand launches."""

MOST = 4096
"""Steps of JAX' in one reading."""


class Queued(Protocol):
    """One contestant."""

    def prepare(self) -> None:
        """Compiles what there is to be compiled; may be called in a thread of its own."""

    def run(self, steps: int) -> None:
        """Makes at least so many steps and waits for the last."""

    def step_seconds(self, steps: int) -> float:
        """What a step takes on the device, from about so many, whatever launching them takes."""


class TorchQueued(TorchFused):
    """``torch.optim.AdamW(fused=True)``, whose device begins when all steps are queued."""

    _cycles = SLEEP[0]

    def step_seconds(self, steps: int) -> float:
        """By CUDA's own events, from ``QUEUED`` steps at most.

        Raises:
          RuntimeError: even they do not wait for the device in its queue.
        """
        steps = min(steps, QUEUED)
        cuda = self._torch.cuda
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            cuda._sleep(self._cycles)
            begin.record()
            self.launch(steps)
            late = begin.query()
            end.record()
            cuda.synchronize()
            if not late:
                return float(begin.elapsed_time(end)) / 1e3 / steps
            if self._cycles >= SLEEP[1]:
                raise RuntimeError("torch's launches do not run ahead of the device")
            self._cycles *= 4


def copied(shapes: list[Any], dtype: str, grads: list[jax.Array], clip: bool) -> Looped:
    """Reads and writes as many bytes as a step must, in place."""
    del grads, clip
    half = step_peers.bytes_moved(shapes, dtype) // 2
    return Looped(
        lambda params, _, state: ([-x for x in params], state),
        [jnp.ones(max(half // 4, 1), jnp.float32)],
        [],
        (),
    )


def time_rounds(
    case: Case, built: dict[str, Any], reading: float, seconds: float, rounds: tuple[int, int]
) -> Result:
    """Times every peer once per round, in an order that rotates.

    Args:
      case: what was built.
      built: the peers.
      reading: seconds for which a peer's steps should keep the device busy each time.
      seconds: for all of it, about.
      rounds: at least, and at most.

    Returns:
      Seconds per step on the device.
    """
    steps: dict[str, int] = {}
    start = time.monotonic()
    for name, peer in built.items():
        once = max(peer.step_seconds(2 * LOOP), reading / MOST)  # of which dispatch is not all
        steps[name] = max(int(reading / once), 1)
        peer.step_seconds(steps[name])
    spent = time.monotonic() - start
    count = min(max(int(seconds / spent), rounds[0]), rounds[1])
    names = list(built)
    found: dict[str, list[float]] = {name: [] for name in names}
    with no_gc():
        for i in range(count):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                found[name].append(built[name].step_seconds(steps[name]))
    return Result(case, found)


def _looped(peers: dict[str, Build]) -> dict[str, Build]:
    return {name: functools.partial(build, call="looped") for name, build in peers.items()}


PEERS: dict[str, Build] = {
    **_looped(
        {
            "native": functools.partial(step_peers.ours, "native"),
            "xla": functools.partial(step_peers.ours, "xla"),
            "optax": step_peers.optax_adamw,
            "native words": functools.partial(step_peers.ours, "native", words=True),
            "xla words": functools.partial(step_peers.ours, "xla", words=True),
            "by leaf": functools.partial(gpu_peers.merged, 0),
        }
    ),
    "torch": functools.partial(TorchQueued, device="cuda"),
    "bandwidth": copied,
}
"""In order of worth: the first are compiled first."""

SWEEP: dict[str, Build] = {
    **_looped({k: v for k, v in gpu_peers.SWEEP.items() if k != "bandwidth"}),
    "bandwidth": copied,
}
"""As ``gpu_peers.SWEEP``."""
