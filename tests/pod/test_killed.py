"""A training that is killed in the middle of its saves, again and again, and loses nothing.

As a program, ``test_killed.py FOLDER STEPS``, it is that training: it saves each step, and goes
on from the last save that is complete.
"""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from comparing import same
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
from places import python_path
import processes
import pytest

import adamw_xla as ax

ocp = pytest.importorskip("orbax.checkpoint")
DEVICES = 4
CONFIG = ax.AdamW(learning_rate=0.01, amsgrad=True, use_ema=True, global_clipnorm=1.0)
SHAPES = {"w": (16, 64), "a": (64,), "v": (64, 1), "b": (1,)}


def initial_params() -> Any:
    rng = np.random.default_rng(0)
    return {k: np.float32(rng.standard_normal(s) / 4) for k, s in SHAPES.items()}


def shardings(devices: int = DEVICES) -> Any:
    """Cut along the first dimension, where there is enough of it."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    return {
        k: NamedSharding(mesh, P("data") if s[0] % devices == 0 else P()) for k, s in SHAPES.items()
    }


def loss_of(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w"] + params["a"])
    return jnp.mean((hidden @ params["v"] + params["b"] - x[:, :1]) ** 2)


@jax.jit
def train_step(params: Any, state: ax.AdamWState, x: Any) -> Any:
    return ax.adamw_step(params, jax.grad(loss_of)(params, x), state, CONFIG)


def train(manager: Any, steps: int) -> None:
    params = jax.device_put(initial_params(), shardings())
    state = ax.adamw_init(params, CONFIG)
    begin = 0
    if (last := manager.latest_step()) is not None:
        template = params, ax.sharding.abstract_state(params, CONFIG)
        params, state = manager.restore(last, args=ocp.args.StandardRestore(template))
        assert state.count == last
        begin = last
    for step in range(begin + 1, steps + 1):
        x = np.float32(np.random.default_rng(step).standard_normal((32, 16)))
        params, state = train_step(params, state, x)
        manager.save(step, args=ocp.args.StandardSave((params, state)))
    manager.wait_until_finished()


# ---------------------------------------------------------------------- killing it

KILLS, FOREVER = 10, 1_000_000


def start(folder: Path, steps: int = FOREVER) -> subprocess.Popen[bytes]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()}
    env.pop("XLA_FLAGS", None)
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, str(folder), str(steps)]
    with (folder.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def ended(process: subprocess.Popen[bytes]) -> None:
    try:
        assert process.wait(processes.PATIENCE) == 0
    finally:
        processes.kill(process)


def unfinished(folder: Path) -> list[int]:
    """The steps of which a part is written."""
    names = [path.name.partition(".") for path in folder.iterdir()]
    return [int(step) for step, _, rest in names if "tmp" in rest]


def killed(folder: Path, step: int, delay: float) -> None:
    """Trains, and is killed so many seconds after it was seen to write this step or a later."""
    process = start(folder)
    end = time.monotonic() + processes.PATIENCE
    try:
        while process.poll() is None and max(unfinished(folder), default=0) < step:
            assert time.monotonic() < end
            time.sleep(0.002)
        assert process.poll() is None, (folder.parent / "log.txt").read_text()[-3000:]
        time.sleep(delay)
    finally:
        processes.kill(process)


def last_complete(folder: Path) -> int:
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        return manager.latest_step() or 0


def at_step(folder: Path, step: int) -> Any:
    """What is saved of four devices, on this process' one."""
    params = jax.device_put(initial_params(), jax.devices()[0])
    template = params, ax.sharding.abstract_state(params, CONFIG)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / str(step) / "default", template)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """At moments of all kinds: what is complete is whole, and goes on bit for bit."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    rng = np.random.default_rng(14)
    last = in_the_middle = 0
    found = {}
    for _ in range(KILLS):
        killed(folder, last + int(rng.integers(1, 4)), rng.choice([0.0, rng.uniform(0.0, 0.1)]))
        in_the_middle += bool(unfinished(folder))
        before, last = last, last_complete(folder)
        assert last >= before
        if last > before:
            found[last] = at_step(folder, last)
    assert in_the_middle > KILLS // 2
    end = last + 2
    ended(start(folder, end))
    assert last_complete(folder) == end
    found[end] = at_step(folder, end)
    ended(start(whole, end))
    for step, (params, state) in found.items():
        assert state.count == step
        same((params, state), at_step(whole, step))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    with ocp.CheckpointManager(
        Path(sys.argv[1]), options=ocp.CheckpointManagerOptions()
    ) as manager:
        train(manager, int(sys.argv[2]))
