"""One of several processes that train the demo's model together, or do a part of it.

    python train_process.py JOB PROCESS PROCESSES PORT FOLDER

Each process has an equal part of four CPU devices; they meet at ``127.0.0.1:PORT``, and their
collectives are Gloo's, on the loopback. ``test_processes.py`` starts them.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import os
from pathlib import Path
import sys
from typing import Any

from comparing import same
import digits
import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import orbax.checkpoint as ocp

import adamw_xla as ax

DEVICES = 4
STEPS = 50
WIDTHS = (32,)
# Warmed up and averaged; the norms of its gradients are about 0.5, so that each is clipped.
CONFIG = dataclasses.replace(digits.make_config(STEPS), global_clipnorm=0.25)

Specs = Callable[[Any], Any]


def replicated(params: Any) -> Any:
    return jax.tree.map(lambda _: P(), params)


def divided(params: Any) -> Any:
    """Each leaf over all devices, by the first dimension that they divide."""

    def spec(x: Any) -> P:
        divisible = [i for i, size in enumerate(x.shape) if size % DEVICES == 0]
        return P(*[None] * divisible[0], "data") if divisible else P()

    return jax.tree.map(spec, params)


def by_columns_and_rows(params: Any) -> Any:
    """Of each pair of layers the first by columns, the second by rows."""
    kinds = [{"w": P(None, "model"), "b": P("model")}, {"w": P("model"), "b": P()}]
    return [kinds[i % 2] for i in range(len(params))]


MODES: dict[str, tuple[tuple[int, ...], Specs]] = {
    "data parallel": ((4,), replicated),
    "ZeRO-1": ((4,), replicated),
    "FSDP": ((4,), divided),
    "tensor parallel": ((2, 2), by_columns_and_rows),
}
"""For each way the sizes of the mesh and how params lie on it."""


def initial_params() -> Any:
    return jax.tree.map(np.asarray, digits.init_mlp(jax.random.key(0), WIDTHS))


def batches(steps: int = STEPS) -> list[digits.Batch]:
    train, _ = digits.load()
    cuts = [slice(k * digits.BATCH, (k + 1) * digits.BATCH) for k in range(20)]
    return [digits.Batch(*(part[cuts[k % 20]] for part in train)) for k in range(steps)]


def train_step(params: Any, state: ax.AdamWState, batch: digits.Batch, **where: Any) -> Any:
    grads = jax.grad(digits.loss_of)(params, batch)
    return ax.adamw_step(params, grads, state, CONFIG, **where)


# ------------------------------------------------------------------------ on a mesh


def put(tree: Any, shardings: Any) -> Any:
    """Arrays over all processes, of which each has the whole."""

    def one(x: Any, sharding: Any) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)


def whole(tree: Any) -> Any:
    """Arrays over all processes, as NumPy's, in each of them."""
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


class Training:
    """Params and state on the mesh of a mode, and its step."""

    def __init__(self, mode: str) -> None:
        sizes, specs_of = MODES[mode]
        names = ("data", "model")[: len(sizes)]
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
        host = initial_params()
        self.batch = NamedSharding(mesh, P("data"))
        self.shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs_of(host),
            is_leaf=lambda x: isinstance(x, P),
        )
        self.params = put(host, self.shardings)
        lies, where, init = self.shardings, {}, ax.adamw_init
        if mode == "ZeRO-1":
            lies = ax.sharding.zero1(mesh, "data", self.params, min_size=1, strict=False)
        self.state_shardings = ax.sharding.state_shardings(lies, CONFIG)
        if mode == "ZeRO-1":
            where = {"state_shardings": self.state_shardings}
            init = jax.jit(init, static_argnames="config", out_shardings=self.state_shardings)
        self.state = init(self.params, config=CONFIG)
        self.step = jax.jit(functools.partial(train_step, **where), donate_argnums=(0, 1))
        self.assert_placed()

    def train(self, data: list[digits.Batch]) -> None:
        for batch in data:
            placed = put(batch, digits.Batch(self.batch, self.batch))
            stepped = self.step(self.params, self.state, placed)
            # With steps in flight, two processes were seen to wait for ever (jax 0.10.2 on CPUs).
            self.params, self.state = jax.block_until_ready(stepped)
        self.assert_placed()

    def assert_placed(self) -> None:
        lies = jax.tree.leaves((self.shardings, self.state_shardings))
        for x, sharding in zip(jax.tree.leaves((self.params, self.state)), lies, strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)


# ------------------------------------------------------------------------------ jobs


def train(folder: Path) -> None:
    """Trains in each mode; the first process writes what came of it."""
    data = batches()
    for mode in MODES:
        training = Training(mode)
        training.train(data)
        found = whole((training.params, training.state))
        if jax.process_index() == 0:
            np.savez(folder / f"{mode}.npz", *jax.tree.leaves(found))


OTHERS: dict[str, dict[str, Any]] = {
    "the same": {},
    "a number": {"beta_2": 0.99},
    "a dtype of a number": {"weight_decay": np.float32(0.05)},
    "a clip": {"global_clipnorm": None, "clipnorm": 1.0},
    "a schedule": {"learning_rate": lambda count: 1e-3 / (1 + count)},
    "a schedule, late": {
        "learning_rate": lambda count: CONFIG.learning_rate(count) + 0.125 * (count == 1_000_000)
    },
    "a choice": {"nesterov": True},
    "a mask": {"weight_decay_mask": [{"w": True, "b": False}] * 2},
    "a function for a mask": {
        "weight_decay_mask": lambda params: jax.tree.map(lambda p: np.ndim(p) > 1, params)
    },
}
"""What the last process has otherwise."""


def disagree(folder: Path) -> None:
    """Says what each process is told where the last has another config."""
    del folder
    for name, options in OTHERS.items():
        is_last = jax.process_index() == jax.process_count() - 1
        config = dataclasses.replace(
            CONFIG, name=f"of {jax.process_index()}", **(options if is_last else {})
        )
        try:
            ax.sharding.check_same_config(config)
        except ValueError as error:
            print(f"{name}: {error}")
        else:
            print(f"{name}: agreed")


def fail(folder: Path) -> None:
    """The last process fails, while the others wait for it."""
    del folder
    if jax.process_index() == jax.process_count() - 1:
        print("this one fails", flush=True)
        os._exit(1)  # an exception would wait for the others first
    multihost_utils.sync_global_devices("never")


def checkpoint(folder: Path) -> None:
    """Saves in mid-training, restores onto each mode's mesh, and goes on bit for bit."""
    data = batches(6)
    for mode in MODES:
        training = Training(mode)
        training.train(data[:3])
        kept = training.params, training.state
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / mode, kept)
            checkpointer.wait_until_finished()
            state = ax.sharding.abstract_state(
                training.params, CONFIG, state_shardings=training.state_shardings
            )
            restored = checkpointer.restore(folder / mode, (training.params, state))
        same(whole(restored), whole(kept))
        training.train(data[3:])
        wanted = whole((training.params, training.state))
        training.params, training.state = restored
        training.train(data[3:])
        same(whole((training.params, training.state)), wanted)
        assert training.step._cache_size() == 1


JOBS = {"train": train, "disagree": disagree, "fail": fail, "checkpoint": checkpoint}


def main() -> None:
    job, process, processes, port, folder = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", DEVICES // int(processes))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    assert jax.device_count() == DEVICES
    JOBS[job](Path(folder))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
