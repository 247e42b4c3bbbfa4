"""Words, random rounding and remainders on meshes: the bits of one device, wherever they lie.

Gradients are given: sums over devices, whose order a mesh changes, are none of the update's.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from eight_devices import assert_passed, main
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from sharded.meshes import AUTO, EXPLICIT, LAYOUTS, lies_as, mesh_of, numbers, on

import adamw_xla as ax

CONFIGS = {
    "word": ax.AdamW(0.01, state_format="word16", params_rounding="stochastic"),
    "split": ax.AdamW(0.01, state_format="word16", master="split"),
}
MESHES = {"replicated": {"data": 8}, "fsdp": {"data": 8}, "tensor": {"data": 4, "model": 2}}
STEPS = 3


def narrow(values: Any) -> Any:
    """Of bfloat16 but for the bias: a tree of both."""
    return {
        k: jnp.asarray(x, np.float32 if k == "bias" else jnp.bfloat16) for k, x in values.items()
    }


def grads(step: int) -> Any:
    return narrow(numbers(10 + step))


def step_of(config: ax.AdamW, **how: Any) -> Any:
    return jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config, implementation="xla", **how))


@functools.cache
def alone(name: str) -> Any:
    config, params = CONFIGS[name], narrow(numbers())
    state, step = ax.adamw_init(params, config), step_of(config)
    for i in range(STEPS):
        params, state = step(params, grads(i), state)
    return params, state


def same_bits(got: Any, want: Any) -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        assert x.tobytes() == y.tobytes(), (path, np.mean(x != y))


def same_but_for_contraction(got: Any, want: Any) -> None:
    """XLA:CPU contracts products and sums as each loop of a program suits it.

    So a master may differ in its last bit, and with it the random number of its next step: a
    few words. If all random numbers were others, a third of the words would be.
    """
    for a, b in zip(*(jax.tree.leaves(s.words) for _, s in (got, want)), strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) < 0.03
    for a, b in zip(*(jax.tree.leaves(ax.master_params(*x)) for x in (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def laid_out(name: str, kind: Any, layout: str) -> None:
    config = CONFIGS[name]
    with mesh_of(kind, **MESHES[layout]) as mesh:
        params = on(mesh, layout, narrow(numbers()))
        state, step = ax.adamw_init(params, config), step_of(config)
        where = params
        for i in range(STEPS):
            params, state = step(params, on(mesh, layout, grads(i)), state)
        lies_as(state.words, where)
        same_bits((params, state), alone(name))


def zero1(name: str, memory: str | None) -> None:
    config = CONFIGS[name]
    with mesh_of(AUTO, data=8) as mesh:
        params = on(mesh, "replicated", narrow(numbers()))
        cut = ax.sharding.zero1(mesh, "data", params, min_size=100, strict=False)
        places = ax.sharding.state_shardings(cut, config, memory_kind=memory)
        state = jax.device_put(ax.adamw_init(params, config), places)
        step = step_of(config, state_shardings=places, offload=memory is not None)
        for i in range(STEPS):
            params, state = step(params, on(mesh, "replicated", grads(i)), state)
        lies_as(state, places)
        same = same_but_for_contraction if config.master else same_bits
        same((params, state), alone(name))


def by_hand(name: str) -> None:
    config, specs = CONFIGS[name], LAYOUTS["fsdp"]
    with mesh_of(AUTO, data=8) as mesh:
        params = on(mesh, "fsdp", narrow(numbers()))
        state = ax.adamw_init(params, config)
        placed = ax.AdamWState(count=P(), words=specs, remainder=specs if config.master else None)
        step = jax.jit(
            jax.shard_map(
                lambda p, g, s: ax.adamw_step(p, g, s, config, implementation="xla"),
                mesh=mesh,
                in_specs=(specs, specs, placed),
                out_specs=(specs, placed),
            )
        )
        for i in range(STEPS):
            params, state = step(params, on(mesh, "fsdp", grads(i)), state)
        same_bits((params, state), alone(name))


CHECKS = {
    **{
        f"{name}_{kind.name}_{layout}": functools.partial(laid_out, name, kind, layout)
        for name in CONFIGS
        for kind in (AUTO, EXPLICIT)
        for layout in MESHES
    },
    **{f"{name}_zero1": functools.partial(zero1, name, None) for name in CONFIGS},
    **{f"{name}_zero1_on_host": functools.partial(zero1, name, "pinned_host") for name in CONFIGS},
    **{f"{name}_shard_map": functools.partial(by_hand, name) for name in CONFIGS},
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_bits_are_those_of_one_device(check: str) -> None:
    """All checks run in one process of their own; ``FAILED`` lines say what differs."""
    assert_passed(check, Path(__file__))


if __name__ == "__main__":
    main(CHECKS)
