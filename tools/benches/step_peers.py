"""Who takes part in ``bench.py step``: one class per way to make an AdamW step.

Every peer owns its params and state; the gradients are shared and never donated. ``run``
makes some steps and returns when the last is done: one on CPUs, some on GPUs, where launches
run ahead of the device.
"""

from __future__ import annotations

from collections.abc import Callable
import ctypes
import dataclasses
import functools
import os
from pathlib import Path
import subprocess
import tempfile
from typing import Any, Protocol, TypeAlias

from benches.jitted import Call, Form, Jitted, Looped
import jax
import jax.numpy as jnp
import numpy as np
import peer_steps
from peer_steps import BOUND, EPSILON, LEARNING_RATE, WEIGHT_DECAY

import adamw_xla as ax

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported

BYTES_PER_STATE = 4


class Peer(Protocol):
    """One contestant."""

    def prepare(self) -> None:
        """Compiles what there is to be compiled; may be called in a thread of its own."""

    def run(self, steps: int) -> None:
        """Makes so many steps and waits for the last."""


def bytes_moved(shapes: list[tuple[int, ...]], dtype: str) -> int:
    """The least that a step can move: read p, g, m, v; write p, m, v."""
    elements = sum(int(np.prod(shape)) for shape in shapes)
    return elements * (3 * np.dtype(jnp.dtype(dtype)).itemsize + 4 * BYTES_PER_STATE)


def make_grads(shapes: list[tuple[int, ...]], dtype: str) -> list[jax.Array]:
    """Gradients of the same values on every run."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1 << 16).astype(np.float32) * 1e-3
    return [jnp.asarray(np.resize(noise, shape), dtype) for shape in shapes]


def make_params(shapes: list[tuple[int, ...]], dtype: str) -> list[jax.Array]:
    return [jnp.full(shape, 0.5, dtype) for shape in shapes]


def _jitted(
    pair: tuple[peer_steps.Init, peer_steps.Step],
    shapes: list[Any],
    dtype: str,
    grads: list[jax.Array],
    call: Form,
) -> Peer:
    init, step = pair
    params = make_params(shapes, dtype)
    if call == "looped":
        return Looped(step, params, grads, init(params))
    return Jitted(step, params, grads, init(params), call)


def ours(
    implementation: Any,
    shapes: list[Any],
    dtype: str,
    grads: list[jax.Array],
    clip: bool,
    call: Form = "donated",
    words: bool = False,
) -> Peer:
    """This package; ``implementation`` as ``adamw_step`` takes it; perhaps with words."""
    options = dataclasses.replace(_options(clip), words=words)
    return _jitted(peer_steps.ours(options, implementation), shapes, dtype, grads, call)


def optax_adamw(
    shapes: list[Any], dtype: str, grads: list[jax.Array], clip: bool, call: Form = "donated"
) -> Peer:
    """``optax.adamw`` and ``apply_updates`` under one jit."""
    return _jitted(peer_steps.optax_adamw(_options(clip)), shapes, dtype, grads, call)


def keras_adamw(
    shapes: list[Any], dtype: str, grads: list[jax.Array], clip: bool, call: Form = "donated"
) -> Peer:
    """Keras' ``stateless_apply`` under a jit."""
    return _jitted(peer_steps.keras_adamw(_options(clip)), shapes, dtype, grads, call)


def _options(clip: bool) -> peer_steps.Options:
    return peer_steps.Options(clip="global" if clip else "none")


def identity(shapes: list[Any], dtype: str, grads: list[jax.Array], clip: bool) -> Peer:
    """JAX's own dispatch of the same buffers: the floor with many leaves."""
    del clip
    params = make_params(shapes, dtype)
    return Jitted(peer_steps.barrier, params, grads, ax.adamw_init(params, ax.AdamW()))


class TorchFused:
    """``torch.optim.AdamW(fused=True)``, on torch's device ``device``."""

    def __init__(
        self,
        shapes: list[Any],
        dtype: str,
        grads: list[jax.Array],
        clip: bool,
        device: str = "cpu",
    ) -> None:
        import torch

        self._torch, self._clip, self._device = torch, clip, device
        kind = getattr(torch, dtype)
        self._params = [torch.full(shape, 0.5, dtype=kind, device=device) for shape in shapes]
        for param, grad in zip(self._params, grads, strict=True):
            param.requires_grad_()
            param.grad = torch.from_numpy(np.array(grad, np.float32)).to(device, kind)
        self._optimizer = torch.optim.AdamW(
            self._params, LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
        )

    @property
    def state_bytes(self) -> int:
        """What torch keeps beside the params; nothing before the first step."""
        kept = self._optimizer.state.values()
        return sum(x.numel() * x.element_size() for row in kept for x in row.values())

    def prepare(self) -> None:
        pass

    def launch(self, steps: int) -> None:
        """Makes so many steps; on a GPU, without waiting for them."""
        for _ in range(steps):
            if self._clip:
                self._torch.nn.utils.clip_grad_norm_(self._params, BOUND, foreach=True)
            self._optimizer.step()

    def run(self, steps: int) -> None:
        self.launch(steps)
        if self._device != "cpu":
            self._torch.cuda.synchronize()


class Bandwidth:
    """A loop that reads p, g, m, v and writes p, m, v, and computes next to nothing."""

    def __init__(self, shapes: list[Any], dtype: str, grads: list[jax.Array], clip: bool) -> None:
        del grads, clip
        library = ctypes.CDLL(str(_compile_probe()))
        self._probe = (
            library.probe_16 if np.dtype(jnp.dtype(dtype)).itemsize == 2 else library.probe
        )
        element = np.uint16 if self._probe is library.probe_16 else np.float32
        self._leaves = []
        for shape in shapes:
            n = int(np.prod(shape))
            p, g = np.ones(n, element), np.ones(n, element)
            self._leaves.append((p, g, np.ones(n, np.float32), np.ones(n, np.float32)))
        n = len(self._leaves)
        pointers = ctypes.c_void_p * n
        self._columns = [
            pointers(*(leaf[k].ctypes.data for leaf in self._leaves)) for k in range(4)
        ]
        self._sizes = (ctypes.c_long * n)(*(leaf[0].size for leaf in self._leaves))

    def prepare(self) -> None:
        pass

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._probe(len(self._leaves), self._sizes, *self._columns)


def _compile_probe() -> Path:
    source = Path(__file__).with_name("bandwidth_probe.c")
    target = Path(tempfile.mkdtemp()) / "probe.so"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(source), "-o", str(target)], check=True)
    return target


Build: TypeAlias = Callable[..., Peer]
"""Called as (shapes, dtype, grads, clip)."""

JITTED: dict[str, Build] = {
    "native": functools.partial(ours, "native"),
    "xla": functools.partial(ours, "xla"),
    "optax": optax_adamw,
    "keras": keras_adamw,
    "native words": functools.partial(ours, "native", words=True),
    "xla words": functools.partial(ours, "xla", words=True),
}

PEERS: dict[str, Build] = {
    **JITTED,
    "torch": TorchFused,
    "identity": identity,
    "bandwidth": Bandwidth,
}
"""On CPUs: every peer, by the name that ``--peer`` takes; gpu_peers.py has those on GPUs."""


def peers(call: Call) -> dict[str, Build]:
    """Those on CPUs whose step can be called so: torch and the ceiling write in place."""
    if call == "donated":
        return PEERS
    return {name: functools.partial(build, call=call) for name, build in JITTED.items()}
