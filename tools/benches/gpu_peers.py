"""Who takes part in ``bench.py step --device gpu``, and what ``--sweep`` varies."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
from typing import Any

from benches import step_peers
from benches.step_peers import Build, Peer
import jax
import jax.numpy as jnp

from adamw_xla_lowering.gpu import kernel as gpu_kernel
from adamw_xla_lowering.gpu import merge
from adamw_xla_lowering.gpu.pieces import Launch

BLOCKS = (512, 1024, 2048, 4096)
WARPS = (2, 4, 8)
LIMITS = (16, 20, 23, 25, 40)
"""Powers of two: elements of the largest leaves that are merged."""


class Copy:
    """A copy on the device that reads and writes as many bytes as a step must."""

    def __init__(self, shapes: list[Any], dtype: str, grads: list[jax.Array], clip: bool) -> None:
        del grads, clip
        half = step_peers.bytes_moved(shapes, dtype) // 2
        self._source = jnp.ones(max(half // 4, 1), jnp.float32)
        self._copy = jax.jit(jnp.copy)

    def prepare(self) -> None:
        self._copy = self._copy.lower(self._source).compile()

    def run(self, steps: int) -> None:
        copy = None
        for _ in range(steps):
            copy = self._copy(self._source)  # one at a time: 20 are more than a device holds
        jax.block_until_ready(copy)


@contextlib.contextmanager
def setting(module: Any, name: str, value: Any) -> Iterator[None]:
    """A constant of this package with another value, while a program is lowered."""
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


def merged(limit: int, *case: Any, **call: Any) -> Peer:
    """StableHLO, where only leaves of at most so many elements are merged."""
    with setting(merge, "MAX_MERGED_ELEMENTS", limit):
        return step_peers.ours("xla", *case, **call)


def launched(launch: Launch, *case: Any, **call: Any) -> Peer:
    """The kernel, launched in this shape."""
    with setting(gpu_kernel, "LAUNCHES", dict.fromkeys(gpu_kernel.LAUNCHES, launch)):
        return step_peers.ours("native", *case, **call)


PEERS: dict[str, Build] = {
    **step_peers.JITTED,
    "by leaf": functools.partial(merged, 0),
    "torch": functools.partial(step_peers.TorchFused, device="cuda"),
    "identity": step_peers.identity,
    "bandwidth": Copy,
}
"""On GPUs; "by leaf" is one kernel for each leaf, as FlashOptim launches them."""

SWEEP: dict[str, Build] = {
    "native": step_peers.JITTED["native"],
    **{
        f"native {block}/{warps}": functools.partial(launched, Launch(block, warps))
        for block in BLOCKS
        for warps in WARPS
        if block >= 4 * 32 * warps  # at least one access of 128 bits for each thread
    },
    "by leaf": PEERS["by leaf"],
    **{f"merged 2^{limit}": functools.partial(merged, 1 << limit) for limit in LIMITS},
    "bandwidth": Copy,
}
"""This package's own choices: elements and warps per program, and what is merged."""
