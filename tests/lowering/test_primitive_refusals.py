"""Every mistake in a call of the primitive gets one error that names the operand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from adamw_xla.lowering import NUM_SLOTS, adamw_update


def bind(**changed: Any) -> Any:
    x = jnp.ones((2, 3))
    call = {
        "hyper": jnp.ones((1, NUM_SLOTS)),
        "params": [x, x],
        "grads": [x, x],
        "m": [x, x],
        "v": [x, x],
    }
    return adamw_update(**(call | changed))


X, Y = jnp.ones((2, 3)), jnp.ones((3, 2))


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        ({"grads": [X, Y]}, ["grads[1]", "(3, 2)", "(2, 3)"]),
        ({"m": [Y, X]}, ["m[0]", "(3, 2)"]),
        ({"v": [X, X.astype(int)]}, ["v[1]", "int32"]),
        ({"params": [X.astype(int), X]}, ["params[0]", "int32"]),
        ({"v_max": [X, Y]}, ["v_max[1]"]),
        ({"ema": [X, Y]}, ["ema[1]"]),
        ({"hyper": jnp.ones((1, NUM_SLOTS - 1))}, ["hyper", str(NUM_SLOTS)]),
        ({"hyper": jnp.ones(NUM_SLOTS)}, ["hyper"]),
        ({"hyper": jnp.ones((1, NUM_SLOTS), jnp.bfloat16)}, ["hyper", "bfloat16", "float32"]),
        ({"groups": [0, 1]}, ["hyper", "(2, "]),
        ({"leaf_scale": jnp.ones(3)}, ["leaf_scale", "(3,)", "(2,)"]),
        ({"grads": [X]}, ["grads", "1", "2"]),
        ({"groups": [0]}, ["groups", "1", "2"]),
        ({"implementation": "fast"}, ["implementation", "fast"]),
    ],
    ids=lambda x: str(list(x))[:40],
)
def test_primitive_names_the_operand(changed: Any, fragments: list[str]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        bind(**changed)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


THERE = jax.device_put(jnp.ones((2, 3)), jax.memory.Space.Host)


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        ({"m": [X, THERE]}, ["m[1]", "host memory", "offload=True"]),
        ({"params": [THERE, X]}, ["params[0]", "host memory", "jax.device_put"]),
        ({"grads": [X, THERE], "offload": True}, ["grads[1]", "host memory"]),
        ({"hyper": jax.device_put(jnp.ones((1, NUM_SLOTS)), jax.memory.Space.Host)}, ["hyper"]),
        ({kind: [THERE, THERE] for kind in ("params", "grads", "m", "v")}, ["params[0]"]),
    ],
    ids=lambda x: str(list(x))[:40],
)
def test_primitive_names_what_lies_in_host_memory(changed: Any, fragments: list[str]) -> None:
    with pytest.raises(TypeError) as caught:
        bind(**changed)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_float64_needs_float64_hyper() -> None:
    narrow = jnp.ones((1, NUM_SLOTS), jnp.float32)
    with jax.enable_x64(True):
        wide = [jnp.ones(2, jnp.float64)] * 2
        with pytest.raises(TypeError, match=r"hyper.*float64"):
            bind(params=wide, grads=wide, m=wide, v=wide, hyper=narrow)
