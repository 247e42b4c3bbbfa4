"""What a train step on many devices sends between them, from the compiled text.

On eight (virtual) devices, and on sixteen chips of a TPU pod that is not there. Run one by hand:
``PYTHONPATH=tests/helpers XLA_FLAGS=--xla_force_host_platform_device_count=8 python
tests/pod/test_collectives.py NAME``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import functools
import math
from pathlib import Path
import re
from typing import Any

from eight_devices import assert_passed, main
from elsewhere import target
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import adamw_xla as ax

WIDTH, LAYERS = 128, 2
LAYER = {
    "up": (WIDTH, 4 * WIDTH),
    "bias": (4 * WIDTH,),
    "down": (4 * WIDTH, WIDTH),
    "scale": (WIDTH,),
}
SHAPES = {f"{i}.{k}": s for i in range(LAYERS) for k, s in LAYER.items()} | {"gain": ()}
WHOLE = sum(map(math.prod, SHAPES.values()))
CUT = [s for s in SHAPES.values() if len(s) == 2]
BOTH = ("data", "model")
SPECS: dict[str, dict[str, Any]] = {
    "data": {},
    "zero1": {},
    "fsdp": {"up": P(BOTH), "down": P(BOTH)},
    "tensor": {"up": P("data", "model"), "bias": P("model"), "down": P("model", "data")},
}
"""For each way to train how params are cut; what is not here is whole everywhere."""

COLLECTIVE = re.compile(
    r" = (\S.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def loss(params: Any, x: jax.Array) -> jax.Array:
    for i in range(LAYERS):
        up, bias, down, scale = (params[f"{i}.{name}"] for name in LAYER)
        x = x + jnp.tanh((x * scale) @ up + bias) @ down
    return params["gain"] * jnp.mean(x * x)


def sent(devices: Sequence[Any], how: str, **options: Any) -> Counter[tuple[str, int]]:
    """The collectives of a train step, each with how many elements it makes."""
    return _sent(tuple(devices), how, True, tuple(options.items()))


def sent_by_the_model(devices: Sequence[Any], how: str) -> Counter[tuple[str, int]]:
    """Those of the loss and its gradients, which come out as the params lie."""
    return _sent(tuple(devices), how, False, ())


@functools.cache
def _sent(
    devices: tuple[Any, ...], how: str, train: bool, options: tuple[tuple[str, Any], ...]
) -> Counter[tuple[str, int]]:
    mesh = Mesh(np.array(devices).reshape(-1, 2), BOTH)
    config = ax.AdamW(**dict(options))
    shardings = {k: NamedSharding(mesh, SPECS[how].get(k.split(".")[-1], P())) for k in SHAPES}
    params = {
        k: jax.ShapeDtypeStruct(s, np.float32, sharding=shardings[k]) for k, s in SHAPES.items()
    }
    where = ax.sharding.zero1(mesh, BOTH, params, strict=False) if how == "zero1" else params
    places = ax.sharding.state_shardings(where, config)
    state = ax.sharding.abstract_state(params, config, state_shardings=places)
    rows = NamedSharding(mesh, P("data" if how == "tensor" else BOTH))
    batch = jax.ShapeDtypeStruct((4 * len(devices), WIDTH), np.float32, sharding=rows)

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x)
        if not train:
            return value, grads, state
        cut = {"state_shardings": places} if how == "zero1" else {}
        return value, *ax.adamw_step(params, grads, state, config, **cut)

    out = (NamedSharding(mesh, P()), shardings, places)
    jitted = jax.jit(step, out_shardings=out, donate_argnums=(0, 1) if train else ())
    platform = "tpu" if "TPU" in devices[0].device_kind else "cpu"
    text = (
        jitted.trace(params, state, batch).lower(lowering_platforms=(platform,)).compile().as_text()
    )
    return Counter((kind, elements(made)) for made, kind in COLLECTIVE.findall(text))


def elements(types: str) -> int:
    """How many numbers arrays of these types have together."""
    shapes = (dims.split(",") for dims in re.findall(r"\w+\[([\d,]*)\]", types))
    return sum(math.prod(int(n) for n in shape if n) for shape in shapes)


def kinds(found: Counter[tuple[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for (kind, _), times in found.items():
        total[kind] += times
    return total


# ------------------------------------------------------------------------------ on eight devices


def data_parallel_adds_nothing() -> None:
    devices = jax.devices()
    model = sent_by_the_model(devices, "data")
    assert model == {("all-reduce", WHOLE): 1}, model  # the gradients; the loss is gain's
    assert sent(devices, "data") == model
    assert sent(devices, "data", global_clipnorm=1.0, skip_nonfinite=True) == model


def what_is_cut_adds_one_sum(how: str, **options: Any) -> None:
    """FSDP and tensor parallelism: without a norm nothing, with one a sum of two numbers."""
    devices = jax.devices()
    model = sent_by_the_model(devices, how)
    assert sent(devices, how) == model, sent(devices, how) - model
    numbers = 2 * (len(SHAPES) if "clipnorm" in options else 1)
    added = sent(devices, how, **options)
    assert added == model + Counter({("all-reduce", numbers): 1}), added - model


def fsdp_adds_one_sum() -> None:
    what_is_cut_adds_one_sum("fsdp", global_clipnorm=1.0)


def tensor_parallelism_adds_one_sum() -> None:
    what_is_cut_adds_one_sum("tensor", global_clipnorm=1.0, skip_nonfinite=True)


def norms_of_leaves_are_one_sum() -> None:
    what_is_cut_adds_one_sum("tensor", clipnorm=1.0)


def zero1_gathers_params_alone() -> None:
    """XLA:CPU knows no reduce-scatter: it sums gradients everywhere, and cuts."""
    devices = jax.devices()
    gathers = Counter(("all-gather", math.prod(s)) for s in CUT)
    model = Counter({("all-reduce", WHOLE): 1})
    assert sent(devices, "zero1") == model + gathers
    norm = Counter({("all-reduce", 2): 1})
    assert sent(devices, "zero1", global_clipnorm=1.0) == model + gathers + norm


# ----------------------------------------------------------------------------- on sixteen chips


@functools.cache
def pod() -> Sequence[Any]:
    """The chips' descriptions; skips without their compiler."""
    from inspection import aot

    return aot.devices(target("v5e"), 16)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 1.0}], ids=["plain", "clip"])
@pytest.mark.parametrize("how", SPECS)
def test_on_a_pod(how: str, options: dict[str, Any]) -> None:
    """XLA:TPU joins the sums over the same devices: one for each way to cut leaves."""
    model, found = kinds(sent_by_the_model(pod(), how)), kinds(sent(pod(), how, **options))
    assert model["all-reduce"], model  # or nothing was read
    sums = {"data": 0, "zero1": 1, "fsdp": 1, "tensor": 3}[how] if options else 0
    gathers = len(CUT) if how == "zero1" else 0
    assert found["all-reduce"] - model["all-reduce"] <= sums
    assert found["all-gather"] - model["all-gather"] <= gathers
    rest = {"reduce-scatter", "all-to-all", "collective-permute"}
    assert all(found[kind] <= model[kind] for kind in rest), (found, model)
    if how == "zero1":
        assert {x for x in sent(pod(), how, **options) if x[0] == "all-gather"} == {
            ("all-gather", math.prod(s)) for s in CUT
        }


CHECKS = {
    f.__name__: f
    for f in (
        data_parallel_adds_nothing,
        fsdp_adds_one_sum,
        tensor_parallelism_adds_one_sum,
        norms_of_leaves_are_one_sum,
        zero1_gathers_params_alone,
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__))


if __name__ == "__main__":
    main(CHECKS)
