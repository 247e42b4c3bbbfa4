"""A state in host memory: the same numbers, the same places, and where the bytes are.

On CPUs "pinned_host" is a name alone, so what is in whose memory is asked of the compilers of a
TPU pod and a GPU that are not there. Run one by hand: ``PYTHONPATH=tests/helpers
XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/pod/test_offload.py NAME``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

from comparing import ATOL, RTOL, close, same
from cpu_oracle import require_native
from eight_devices import assert_passed, main
from elsewhere import target
import jax
from jax.extend.mlir import ir
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import shapes

import adamw_xla as ax
from adamw_xla_lowering import NUM_SLOTS, adamw_update
from adamw_xla_lowering.rules import streamed

HOST = jax.memory.Space.Host
SHAPES = {"w": (16, 8), "u": (24, 16), "b": (8,), "s": ()}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "global": {"global_clipnorm": 0.1, "skip_nonfinite": True},
    "leaf": {"clipnorm": 0.1, "amsgrad": True, "use_ema": True, "skip_spikes": ax.SpikeRule()},
    "mask": {"weight_decay_mask": lambda params: {k: x.ndim > 1 for k, x in params.items()}},
}


def tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}


def placed(kind: AxisType) -> tuple[Any, dict[str, Any]]:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    specs = {k: P("x") if s and s[0] % 8 == 0 else P() for k, s in SHAPES.items()}
    return mesh, {k: NamedSharding(mesh, spec) for k, spec in specs.items()}


# ------------------------------------------------------------------------------ on eight devices


def as_on_the_device() -> None:
    """Under each option, with automatic and with explicit axes, three donated steps.

    XLA:CPU rounds the product and the sum of a multiply-add once or twice, as its loops fall.
    """
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh, shardings = placed(kind)
        for options in OPTIONS.values():
            with jax.set_mesh(mesh):
                found = [trained(ax.AdamW(**options), shardings, x) for x in (False, True)]
            close(*found, rtol=3 * RTOL, atol=3 * ATOL)


def same_bits_by_the_kernel() -> None:
    """On one device, where the arithmetic is the CPU kernel's and nobody contracts it."""
    require_native()
    here = dict.fromkeys(SHAPES, SingleDeviceSharding(jax.devices()[0]))
    for options in OPTIONS.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streamed, "MIN_RUN_BYTES", 1)  # each leaf by itself
            same(*(trained(ax.AdamW(**options), here, x, "native") for x in (False, True)))


def trained(config: ax.AdamW, shardings: Any, offload: bool, implementation: Any = None) -> Any:
    params = jax.device_put(tree(0), shardings)
    kind = "pinned_host" if offload else None
    places = ax.sharding.state_shardings(shardings, config, memory_kind=kind)
    state = jax.device_put(ax.adamw_init(params, config), places)

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def step(params: Any, grads: Any, state: Any) -> Any:
        return ax.adamw_step(
            params, grads, state, config, offload=offload, implementation=implementation
        )

    for seed in (1, 2, 3):
        params, state = step(params, jax.device_put(tree(seed), shardings), state)
    lies = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, places)
    assert all(jax.tree.leaves(lies))
    for x in jax.tree.leaves((state.m, state.v)):
        assert x.sharding.memory_kind == (kind or "device")
    return params, state


def zero1_is_streamed_too() -> None:
    mesh, _ = placed(AxisType.Auto)
    params = jax.device_put(tree(0), NamedSharding(mesh, P()))
    config = ax.AdamW(global_clipnorm=0.1)
    cut = ax.sharding.zero1(mesh, "x", params, min_size=1, strict=False)
    found = []
    for kind in (None, "pinned_host"):
        places = ax.sharding.state_shardings(cut, config, memory_kind=kind)
        state = jax.device_put(ax.adamw_init(params, config), places)
        step = jax.jit(
            functools.partial(
                ax.adamw_step, config=config, state_shardings=places, offload=kind is not None
            )
        )
        found.append(step(params, jax.device_put(tree(1), NamedSharding(mesh, P())), state))
        assert found[-1][1].m["u"].sharding == places.m["u"]
    close(*found)
    inside = jax.make_jaxpr(step)(params, params, state).eqns[0].params["jaxpr"].eqns
    (update,) = [x for x in inside if x.primitive.name == "adamw_update"]
    given = [x.aval.memory_space for x in update.invars]
    assert given.count(HOST) == 2 * len(SHAPES)  # all of m and v: nothing was fetched before


def one_equation_for_the_tree() -> None:
    params = jax.device_put(tree(0))
    config = ax.AdamW()
    state = jax.device_put(ax.adamw_init(params, config), HOST)
    step = functools.partial(ax.adamw_step, config=config, offload=True)
    assert str(jax.make_jaxpr(step)(params, params, state)).count("adamw_update[") == 1


def in_turn_is_the_same() -> None:
    """The loops that a TPU runs, here: bits, and what varies over which axes of ``shard_map``."""
    state: dict[str, Any] = {
        kind: [np.abs(x) for x in tree(k).values()]
        for k, kind in enumerate(("params", "grads", "m", "v"))
    }
    state["leaf_scale"] = np.linspace(0.5, 1.0, len(SHAPES), dtype=np.float32)
    hyper = np.linspace(0.1, 0.9, NUM_SLOTS, dtype=np.float32)[None]
    plain = jax.jit(adamw_update)(hyper, **state)
    lower = streamed.lower

    def looped(ctx: Any, *operands: Any, spec: Any, in_turn: bool) -> Any:
        assert not in_turn
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streamed, "MIN_RUN_BYTES", 1)
            return lower(ctx, *operands, spec=spec, in_turn=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "lower", looped)
        update = functools.partial(adamw_update, offload=True)
        text = jax.jit(update).lower(hyper, **state).as_text()
        assert text.count("stablehlo.while") == 3  # "w" and "u", which is the largest, and the rest
        got = jax.jit(update)(hyper, **state)
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
        varying = jax.shard_map(
            lambda h, s: update(h * (1 + 0 * jax.lax.axis_index("x")), **s).params[0][None],
            mesh=mesh, in_specs=(P(), P()), out_specs=P("x"),
        )  # fmt: skip
        many = jax.jit(varying)(hyper, state)
    close(plain, got)
    np.testing.assert_allclose(many, np.stack([plain.params[0]] * 8), rtol=1e-6)


def what_lies_elsewhere_is_refused() -> None:
    params = jax.tree.map(jnp.asarray, tree(0))
    config = ax.AdamW()
    state = ax.adamw_init(params, config)
    there = jax.device_put(state, HOST)
    summing = dataclasses.replace(config, gradient_accumulation_steps=2)
    cases: list[tuple[Any, Any, Any, dict[str, Any], list[str]]] = [
        (params, params, there, {},
         ["state.m['b']", "host memory", "offload=True", "jax.memory.Space.Device"]),
        (params, params, dataclasses.replace(state, count=there.count), {}, ["state.count"]),
        (params, params, dataclasses.replace(state, v=there.v), {}, ["state.v['b']"]),
        (jax.device_put(params, HOST), params, state, {}, ["params['b']", "Space.Device"]),
        (params, jax.device_put(params, HOST), there, {"offload": True}, ["grads['b']"]),
        (params, params, state, {"offload": True},
         ["state.m['b']", "device memory", "pinned_host"]),
        (params, params, there, {"offload": "pinned_host"}, ["offload", "True or False"]),
        (params, params, ax.adamw_init(params, summing), {"offload": True, "config": summing},
         ["gradient_accumulation_steps", "lax.scan"]),
        (params, params, there,
         {"offload": True, "state_shardings": ax.sharding.state_shardings(params, config)},
         ["state_shardings.m['b']", "device's memory", "pinned_host", "leave offload out"]),
    ]  # fmt: skip
    for p, g, s, options, fragments in cases:
        with pytest.raises((TypeError, ValueError)) as caught:
            jax.jit(functools.partial(ax.adamw_step, **{"config": config} | options))(p, g, s)
        text = str(caught.value)
        assert all(fragment in text for fragment in fragments), text


# ------------------------------------------------------------------------ whose memory it is


MODEL = {name: math.prod(shape) * 4 for name, shape in shapes.llama_1b().items()}
LARGEST, STATE = 2 * max(MODEL.values()), 2 * sum(MODEL.values())
"""Bytes of m and v: of the largest leaf, and of all."""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "zero1"])
def test_memory_of_a_pod(how: str) -> None:
    """Llama 3.2 1B on 64 chips: what each of them holds of the state, and where."""
    from inspection import aot

    devices = aot.devices(target("v5e"), 64)
    mesh = Mesh(np.array(devices), ("x",))
    whole = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
        for k, x in shapes.structs(shapes.llama_1b()).items()
    }
    config = ax.AdamW(global_clipnorm=1.0)
    cut = ax.sharding.zero1(mesh, "x", whole)
    params = whole
    if how == "fsdp":
        params = {k: x.update(sharding=cut[k]) for k, x in whole.items()}
    places = ax.sharding.state_shardings(cut, config, memory_kind="pinned_host")
    state = ax.sharding.abstract_state(params, config, state_shardings=places)
    step = functools.partial(ax.adamw_step, config=config, offload=True)
    if how == "zero1":
        step = functools.partial(step, state_shardings=places)
    jitted = jax.jit(step, donate_argnums=(0, 2))
    compiled = jitted.trace(params, params, state).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    for there in (memory.host_argument_size_in_bytes, memory.host_alias_size_in_bytes):
        assert abs(there / (STATE / 64) - 1) < 0.05
    beside = memory.argument_size_in_bytes / (2 * sum(MODEL.values()))  # params and gradients
    assert abs(beside * (64 if how == "fsdp" else 1) - 1) < 0.05
    if how == "fsdp":  # the largest leaf's old and new m and v
        assert memory.temp_size_in_bytes <= 2.25 * LARGEST / 64


TREES = {"8x1M": [(1 << 20,)] * 8, "llama-1b": list(shapes.llama_1b().values())}


@pytest.mark.parametrize("name", ["8x1M", pytest.param("llama-1b", marks=pytest.mark.slow)])
def test_memory_of_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on one H100: the old and the new state of one leaf, and of no other."""
    from inspection import aot

    monkeypatch.setattr(streamed, "MIN_RUN_BYTES", 1)
    device = aot.device(target("h100"))
    here, there = (SingleDeviceSharding(device, memory_kind=kind) for kind in (None, "pinned_host"))
    hyper = jax.ShapeDtypeStruct((1, NUM_SLOTS), np.float32, sharding=here)
    params, state = (
        [jax.ShapeDtypeStruct(shape, np.float32, sharding=where) for shape in TREES[name]]
        for where in (here, there)
    )
    update = functools.partial(adamw_update, offload=True)
    traced = jax.jit(update, donate_argnums=(1, 3, 4)).trace(hyper, params, params, state, state)
    lowered = traced.lower(lowering_platforms=("cuda",))
    say_where_arguments_lie(lowered.compiler_ir(), range(1 + 2 * len(params), 1 + 4 * len(params)))
    memory = lowered.compile().memory_analysis()
    sizes = [2 * 4 * math.prod(shape) for shape in TREES[name]]
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == sum(sizes)
    assert memory.temp_size_in_bytes <= 2.01 * max(sizes)


def say_where_arguments_lie(module: ir.Module, in_host_memory: range) -> None:
    """As JAX does where there is a GPU: it cannot describe one's memories ahead of time.

    Without, nothing is copied to the device, and the program is not the one that a GPU runs.
    """
    (main,) = (
        x for x in module.body.operations
        if "sym_name" in x.attributes and x.attributes["sym_name"].value == "main"
    )  # fmt: skip
    with module.context:
        there = ir.StringAttr.get("pinned_host")
        every = []
        for i, given in enumerate(main.attributes["arg_attrs"]):
            said = {x.name: x.attr for x in given}
            said |= {"mhlo.memory_kind": there} if i in in_host_memory else {}
            every.append(ir.DictAttr.get(said))
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(every)


CHECKS = {
    f.__name__: f
    for f in (
        as_on_the_device,
        same_bits_by_the_kernel,
        zero1_is_streamed_too,
        one_equation_for_the_tree,
        in_turn_is_the_same,
        what_lies_elsewhere_is_refused,
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__))


if __name__ == "__main__":
    main(CHECKS)
