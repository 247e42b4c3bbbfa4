"""Where the state lies: beside its params, whoever makes it, and compiled for once.

Run one by hand: ``PYTHONPATH=tests/helpers XLA_FLAGS=--xla_force_host_platform_device_count=8
python tests/pod/test_placement.py NAME``.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

from eight_devices import assert_passed, main
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
from sharded.meshes import (
    AUTO,
    EXPLICIT,
    LAYOUTS,
    SHAPES,
    Compilations,
    batch_on,
    lies_as,
    loss,
    mesh_of,
    near,
    numbers,
    on,
    on_one_device,
    step_of,
    trained,
)

import adamw_xla as ax
import adamw_xla.optax as axo

FULL = ax.AdamW(
    amsgrad=True,
    use_ema=True,
    gradient_accumulation_steps=2,
    skip_nonfinite=True,
    state_dtype=None,
    skip_spikes=ax.SpikeRule(window=4),
)
MESHES = {"replicated": {"data": 8}, "fsdp": {"data": 8}, "tensor": {"data": 4, "model": 2}}


def init_of(config: ax.AdamW) -> Callable[[Any], ax.AdamWState]:
    return functools.partial(ax.adamw_init, config=config)


def wanted(params: Any, config: ax.AdamW) -> ax.AdamWState:
    """The shardings of a state, written down from those of its params."""
    beside = {k: p.sharding for k, p in params.items()}
    whole = NamedSharding(params["in"].sharding.mesh, P())
    fields = {
        "v_max": beside if config.amsgrad else None,
        "ema": beside if config.use_ema else None,
        "accumulated": beside if config.gradient_accumulation_steps else None,
        "micro_step": whole if config.gradient_accumulation_steps else None,
        "skipped": whole if config.skip_nonfinite else None,
        "norms": whole if config.skip_spikes else None,
    }
    return ax.AdamWState(count=whole, m=beside, v=beside, **fields)


# ------------------------------------------------------------------------ init's results


def an_eager_state_lies_beside_its_params() -> None:
    for kind in (AUTO, EXPLICIT):
        for layout, axes in MESHES.items():
            with mesh_of(kind, **axes) as mesh:
                params = on(mesh, layout)
                lies_as(ax.adamw_init(params, FULL), wanted(params, FULL))
                opt_state = axo.adamw(0.1, amsgrad=True, skip_nonfinite=True).init(params)
                assert opt_state.count.sharding == NamedSharding(mesh, P())
                assert opt_state.skipped.sharding == NamedSharding(mesh, P())


def counters_follow_what_is_committed() -> None:
    third = SingleDeviceSharding(jax.devices()[3])
    there = ax.adamw_init({"w": jax.device_put(jnp.ones(3), third)}, FULL)
    assert {x.sharding for x in jax.tree.leaves(there)} == {third}
    free = ax.adamw_init({"w": jnp.ones(3)}, FULL)
    assert not any(x.committed for x in jax.tree.leaves(free))
    with mesh_of(AUTO, data=8) as mesh:
        some = on(mesh, "fsdp") | {"free": jnp.ones(3)}
        assert ax.adamw_init(some, FULL).count.sharding == NamedSharding(mesh, P())
        host = jax.tree.map(
            lambda s: s.with_memory_kind("pinned_host"), wanted(on(mesh, "fsdp"), FULL).m
        )
        offloaded = ax.adamw_init(jax.device_put(on(mesh, "fsdp"), host), ax.AdamW())
        assert offloaded.count.sharding.memory_kind == "device"
        traced = jax.jit(lambda: ax.adamw_init(some, FULL))()  # closed over
        assert traced.count == 0


def a_jitted_state_lies_beside_its_params() -> None:
    narrow = {k: x.astype(jnp.bfloat16) for k, x in numbers().items()}
    for kind in (AUTO, EXPLICIT):
        for layout, axes in MESHES.items():
            for values in (None, narrow):
                with mesh_of(kind, **axes) as mesh:
                    params = on(mesh, layout, values)
                    state = jax.jit(init_of(FULL))(params)
                    lies_as(state, wanted(params, FULL))
                    for column in (state.m, state.v, state.v_max, state.accumulated):
                        assert not any(np.any(x) for x in jax.tree.leaves(column))
                    near(state.ema, params, 0.0)
    with mesh_of(AUTO, data=8) as mesh:
        params = on(mesh, "fsdp")
        opt_state = jax.jit(axo.adamw(0.1, use_ema=True).init)(params)
        lies_as((opt_state.mu, opt_state.nu, opt_state.ema), (wanted(params, FULL).m,) * 3)


def zeros_are_zeros_whatever_the_params_are() -> None:
    with mesh_of(AUTO, data=8) as mesh:
        bad = on(mesh, "fsdp", {k: np.full(s, np.nan, np.float32) for k, s in SHAPES.items()})
        assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(init_of(ax.AdamW()))(bad)))

        def stepped(params: Any) -> jax.Array:
            still = jax.lax.stop_gradient(params)
            state = ax.adamw_init(params, ax.AdamW())
            return jnp.sum(ax.adamw_step(still, still, state, ax.AdamW())[0]["bias"])

        # A step has no derivative, and needs none by what starts as zero.
        assert not np.any(jax.jit(jax.grad(stepped))(on(mesh, "fsdp"))["bias"])


def under_other_transformations() -> None:
    config = ax.AdamW(use_ema=True)
    with mesh_of(AUTO, data=4, model=2) as mesh:
        rows = NamedSharding(mesh, P("data", "model"))
        many = jax.device_put(jnp.ones((8, 4)), rows)
        for made in (jax.vmap(init_of(config))(many), jax.jit(jax.vmap(init_of(config)))(many)):
            lies_as((made.m, made.v, made.ema), (rows,) * 3)
        data = export.export(jax.jit(init_of(config)))(many).serialize()
        lies_as(jax.jit(export.deserialize(data).call)(many).v, rows)
        for axes, spec in (({"data", "model"}, P("data", "model")), ({"data"}, P("data"))):
            for check in (True, False):
                mapped = jax.shard_map(
                    lambda x: ax.adamw_init(x, config).m,
                    mesh=mesh,
                    in_specs=spec,
                    out_specs=spec,
                    axis_names=axes,
                    check_vma=check,
                )
                lies_as(jax.jit(mapped)(many), rows)
        other = ax.sharding.state_shardings(NamedSharding(mesh, P("model")), config)
        lies_as(jax.jit(init_of(config), out_shardings=other)(many), other)
        shapes = jax.eval_shape(init_of(config), many)
        assert (shapes.m.shape, shapes.count.dtype) == ((8, 4), np.int32)


# ------------------------------------------------------------------------- what it is for


def a_population_over_explicit_axes() -> None:
    """Constants of the step lie nowhere, and the members' numbers on the mesh."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(EXPLICIT,))
    many = jax.tree.map(lambda x: np.stack([x * (1 + i) for i in range(8)]), numbers())
    once = dataclasses.replace(FULL, gradient_accumulation_steps=None)
    for config in (ax.AdamW(clipnorm=0.1), ax.AdamW(global_clipnorm=0.1), once):
        step = jax.jit(jax.vmap(functools.partial(ax.adamw_step, config=config)))
        state = jax.vmap(init_of(config))(many)
        want = trained_on(step, many, state)
        for enter in (contextlib.nullcontext, jax.set_mesh):  # which sets it when it is called
            with enter(mesh):
                there = jax.device_put((many, state), NamedSharding(mesh, P("data")))
                got = trained_on(step, *there)
            assert all(x.sharding.spec[0] == "data" for x in jax.tree.leaves(got))
            near(got, want)


def trained_on(step: Any, params: Any, state: Any) -> Any:
    for _ in range(2):
        params, state = step(params, params, state)
    return params, state


def a_train_step_is_compiled_once() -> None:
    for kind in (AUTO, EXPLICIT):
        for layout, axes in MESHES.items():
            with mesh_of(kind, **axes) as mesh:
                params, x = on(mesh, layout), batch_on(mesh)
                places = ax.sharding.state_shardings(params, FULL)
                fresh = ax.adamw_init(params, FULL)
                restored = jax.device_put(jax.device_get(fresh), places)
                like_fresh = jax.tree.map(
                    lambda x, like: jax.device_put(np.asarray(x), like.sharding), fresh, fresh
                )
                for state in (fresh, jax.jit(init_of(FULL))(params), restored, like_fresh):
                    step = jax.jit(step_of(FULL))
                    with Compilations() as xla:
                        _, last = trained(step, params, state, x, 3)
                    assert xla.count == 1, (kind, layout, xla.count)
                    lies_as(last, places)


def so_is_that_of_the_drop_in() -> None:
    with mesh_of(AUTO, data=8) as mesh:
        params, x = on(mesh, "fsdp"), batch_on(mesh)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), axo.adamw(0.1, skip_nonfinite=True))

        for init in (optimizer.init, jax.jit(optimizer.init)):

            def step(params: Any, state: Any, x: Any) -> Any:
                updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
                return optax.apply_updates(params, updates), state

            state = init(params)
            with Compilations() as xla:
                trained(jax.jit(step), params, state, x, 3)
            assert xla.count == 1, xla.count


def its_own_shardings_are_in_shardings() -> None:
    for kind in (AUTO, EXPLICIT):
        with mesh_of(kind, data=4, model=2) as mesh:
            params, x = on(mesh, "tensor"), batch_on(mesh)
            state = ax.adamw_init(params, FULL)
            places = jax.tree.map(lambda x: x.sharding, (params, state))
            given = jax.jit(step_of(FULL), in_shardings=(*places, x.sharding), out_shardings=places)
            lies_as(trained(given, params, state, x, 2), places)


# ----------------------------------------------------------------------------- the helpers


def an_abstract_state_is_what_init_makes() -> None:
    for kind in (AUTO, EXPLICIT):
        for layout, axes in MESHES.items():
            with mesh_of(kind, **axes) as mesh:
                params = on(mesh, layout)
                real = ax.adamw_init(params, FULL)
                shapes = jax.tree.map(
                    lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
                )
                for given in (params, shapes):
                    abstract = ax.sharding.abstract_state(given, FULL)
                    assert jax.tree.structure(abstract) == jax.tree.structure(real)
                    lies_as(real, abstract)
                    for x, like in zip(
                        jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True
                    ):
                        assert (x.shape, x.dtype) == (like.shape, like.dtype)


def and_it_compiles_ahead_of_time() -> None:
    with mesh_of(AUTO, data=8) as mesh:
        params, x = on(mesh, "fsdp"), batch_on(mesh)
        abstract = ax.sharding.abstract_state(params, FULL)
        compiled = jax.jit(step_of(FULL)).lower(params, abstract, x).compile()
        _, state = compiled(params, ax.adamw_init(params, FULL), x)
        lies_as(state, abstract)


def shardings_of_a_state() -> None:
    with mesh_of(AUTO, data=4, model=2) as mesh:
        params = on(mesh, "tensor")
        want = wanted(params, FULL)
        for given in (params, want.m, ax.sharding.abstract_state(params, FULL).m):
            assert ax.sharding.state_shardings(given, FULL) == want
        on_host = ax.sharding.state_shardings(params, FULL, memory_kind="pinned_host")
        state = jax.device_put(ax.adamw_init(params, FULL), on_host)
        lies_as(state, on_host)
        kinds = {k: x.sharding.memory_kind for k, x in vars(state).items() if hasattr(x, "dtype")}
        assert kinds == dict.fromkeys(("count", "micro_step", "skipped", "norms"), "device")
        assert {x.sharding.memory_kind for x in state.m.values()} == {"pinned_host"}


# ----------------------------------------------------------------------------- the numbers


def near_one_device(kind: Any, layout: str, clip: float | None) -> None:
    config = ax.AdamW(global_clipnorm=clip)
    with mesh_of(kind, **MESHES[layout]) as mesh:
        params = on(mesh, layout)
        step = jax.jit(step_of(config), donate_argnums=(0, 1))
        got = trained(step, params, jax.jit(init_of(config))(params), batch_on(mesh), 50)
    near(got[0], on_one_device(config, 50)[0])


def manual(layout: str) -> None:
    """Inside of ``shard_map`` each device updates its shards, of gradients that are reduced."""
    config, specs = ax.AdamW(), LAYOUTS[layout]

    def local_loss(params: Any, x: Any) -> jax.Array:
        whole = dict(params)
        for k, spec in specs.items():
            if "data" in spec:
                dim = [*spec].index("data")
                whole[k] = jax.lax.all_gather(params[k], "data", axis=dim, tiled=True)
        return jax.lax.pmean(loss(whole, x), "data")

    def step(params: Any, state: Any, x: Any) -> Any:
        return ax.adamw_step(params, jax.grad(local_loss)(params, x), state, config)

    with mesh_of(AUTO, data=8) as mesh:
        states = ax.AdamWState(count=P(), m=specs, v=specs)
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, states, P("data")), out_specs=(specs, states)
        )
        params = on(mesh, layout)
        with Compilations() as xla:
            got = trained(
                jax.jit(mapped), params, ax.adamw_init(params, config), batch_on(mesh), 50
            )
        assert xla.count == 1, xla.count
    near(got[0], on_one_device(config, 50)[0])


CHECKS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        counters_follow_what_is_committed,
        zeros_are_zeros_whatever_the_params_are,
        shardings_of_a_state,
    )
}
SLOW: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        an_eager_state_lies_beside_its_params,
        a_jitted_state_lies_beside_its_params,
        under_other_transformations,
        a_population_over_explicit_axes,
        a_train_step_is_compiled_once,
        so_is_that_of_the_drop_in,
        its_own_shardings_are_in_shardings,
        an_abstract_state_is_what_init_makes,
        and_it_compiles_ahead_of_time,
    )
}
for layout in MESHES:
    for mode, kind in (("automatic", AUTO), ("explicit", EXPLICIT)):
        for clip in (None, 0.1):
            name = f"{layout}_{mode}{'_clipped' if clip else ''}"
            SLOW[name] = functools.partial(near_one_device, kind, layout, clip)
SLOW |= {f"{layout}_manual": functools.partial(manual, layout) for layout in ("replicated", "fsdp")}


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__), *CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW)
def test_slowly_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__), *SLOW)


# ------------------------------------------------------------------------- on one device


def test_an_abstract_state_allocates_nothing() -> None:
    huge = {"w": jax.ShapeDtypeStruct((1 << 20, 1 << 20, 1 << 10), "bfloat16")}
    before = jax.live_arrays()
    state = ax.sharding.abstract_state(huge, FULL)
    assert not {*map(id, jax.live_arrays())} - {*map(id, before)}
    assert (state.m["w"].dtype, state.ema["w"].shape) == (np.float32, huge["w"].shape)
    assert state.m["w"].sharding is None


def test_on_one_device_shardings_are_its_own() -> None:
    params = {"w": jnp.ones((4, 2))}
    places = ax.sharding.state_shardings(params, FULL)
    assert set(jax.tree.leaves(places)) == {SingleDeviceSharding(jax.devices()[0])}
    step = jax.jit(lambda p, s: ax.adamw_step(p, p, s, FULL, state_shardings=places))
    plain = jax.jit(lambda p, s: ax.adamw_step(p, p, s, FULL))
    state = ax.adamw_init(params, FULL)
    near(step(params, state), plain(params, state), 0.0)


if __name__ == "__main__":
    main(CHECKS | SLOW)
