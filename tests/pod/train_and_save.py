"""Trains, saves each step, and goes on from the last save: ``train_and_save.py FOLDER STEPS``.

``test_checkpoints.py`` kills it, again and again.
"""

from __future__ import annotations

from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import orbax.checkpoint as ocp

import adamw_xla as ax

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


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    with ocp.CheckpointManager(
        Path(sys.argv[1]), options=ocp.CheckpointManagerOptions()
    ) as manager:
        train(manager, int(sys.argv[2]))
