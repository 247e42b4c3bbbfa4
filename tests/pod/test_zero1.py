"""ZeRO-1: the state cut over the data axis, of params that are whole (or cut over another).

Run one by hand: ``PYTHONPATH=tests/helpers XLA_FLAGS=--xla_force_host_platform_device_count=8
python tests/pod/test_zero1.py NAME``.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from pathlib import Path
from typing import Any

from eight_devices import assert_passed, main
from elsewhere import target
from inspection import aot
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
import shapes
from sharded.meshes import (
    AUTO,
    EXPLICIT,
    SHAPES,
    Compilations,
    batch_on,
    gathered,
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

MESHES = {"replicated": {"data": 8}, "tensor": {"data": 4, "model": 2}}
ACCUMULATING = ax.AdamW(
    amsgrad=True, use_ema=True, gradient_accumulation_steps=2, skip_nonfinite=True
)


def places_of(mesh: Any, params: Any, config: ax.AdamW, **kwargs: Any) -> ax.AdamWState:
    cut = ax.sharding.zero1(mesh, "data", params, min_size=0)
    return ax.sharding.state_shardings(cut, config, **kwargs)


def state_at(params: Any, config: ax.AdamW, places: ax.AdamWState) -> ax.AdamWState:
    return jax.jit(functools.partial(ax.adamw_init, config=config), out_shardings=places)(params)


def whole_shapes(layout: str) -> list[tuple[int, ...]]:
    """What each device holds of the params: what all-gathers of them make."""
    parts = {"in": (1, 2), "out": (2, 1), "bias": (1,)} if layout == "tensor" else {}
    found = (
        tuple(n // k for n, k in zip(s, parts.get(name, (1,) * len(s)), strict=True))
        for name, s in SHAPES.items()
    )
    return sorted(found)


# ---------------------------------------------------------------------------- the program


def only_new_params_are_gathered(kind: Any, layout: str, config: ax.AdamW) -> None:
    with mesh_of(kind, **MESHES[layout]) as mesh:
        params, x = on(mesh, layout), batch_on(mesh)
        places = places_of(mesh, params, config)
        state = state_at(params, config, places)
        step = jax.jit(step_of(config, state_shardings=places), donate_argnums=(0, 1))
        compiled = step.lower(params, state, x).compile()
        assert gathered(compiled) == whole_shapes(layout), gathered(compiled)
        where = jax.tree.map(lambda p: p.sharding, params)
        made = trained(step, params, state, x, 2)
        lies_as(made, (where, places))


def the_calls_between_updates_gather_nothing() -> None:
    with mesh_of(AUTO, data=8) as mesh:
        params = on(mesh, "replicated")
        places = places_of(mesh, params, ACCUMULATING)
        state = ax.sharding.abstract_state(params, ACCUMULATING, state_shardings=places)
        step = jax.jit(step_of(ACCUMULATING, state_shardings=places))
        text = step.lower(params, state, batch_on(mesh)).compile().as_text()
    bodies = {name for line in text.splitlines() for name in after(line, "body=%")}
    inside, here = [], ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            here = line.split()[0].lstrip("%")
        if " all-gather(" in line:
            inside.append(here in bodies)
    assert inside == [True] * 3, inside


def after(line: str, mark: str) -> list[str]:
    return [part.split(",")[0].split(" ")[0] for part in line.split(mark)[1:]]


def in_loops_and_nested_functions() -> None:
    config = ax.AdamW()
    for kind in (AUTO, EXPLICIT):
        for layout, axes in MESHES.items():
            with mesh_of(kind, **axes) as mesh:
                params, x = on(mesh, layout), batch_on(mesh)
                places = places_of(mesh, params, config)
                one = jax.jit(step_of(config, state_shardings=places))

                def scanned(params: Any, state: Any, x: Any, one: Any = one) -> Any:
                    def body(carry: Any, _: Any) -> Any:
                        return one(*carry, x), None

                    return jax.lax.scan(body, (params, state), None, length=2)[0]

                def unrolled(params: Any, state: Any, x: Any, one: Any = one) -> Any:
                    return one(*one(params, state, x), x)

                start = params, state_at(params, config, places), x
                want = trained(one, *start, 2)
                where = jax.tree.map(lambda p: p.sharding, params)
                for two in (scanned, unrolled):
                    got = jax.block_until_ready(jax.jit(two)(*start))
                    lies_as(got, (where, places))
                    near(got, want)


def a_frozen_leaf_stays() -> None:
    config = ax.AdamW()
    with mesh_of(AUTO, data=8) as mesh:
        params = on(mesh, "replicated")
        places = places_of(mesh, params, config)
        state = state_at(params, config, places)

        def step(params: Any, state: Any) -> Any:
            grads = jax.tree.map(jnp.cos, params) | {"bias": None}
            return ax.adamw_step(params, grads, state, config, state_shardings=places)

        new, after = jax.jit(step)(params, state)
        lies_as((new, after), (jax.tree.map(lambda p: p.sharding, params), places))
        near((new["bias"], after.m["bias"]), (params["bias"], state.m["bias"]), 0.0)


def leaves_of_one_shape() -> None:
    """Each is sharded as its own param, whatever others of its shape are."""
    config, specs = ax.AdamW(), {"a": P(), "b": P(None, "model"), "c": P("model"), "d": P()}
    with mesh_of(AUTO, data=4, model=2) as mesh:
        ones = np.ones((16, 16), np.float32)
        params = {k: jax.device_put(ones, NamedSharding(mesh, s)) for k, s in specs.items()}
        places = places_of(mesh, params, config)

        def step(params: Any, state: Any) -> Any:
            grads = jax.tree.map(jnp.cos, params)
            return ax.adamw_step(params, grads, state, config, state_shardings=places)

        got = jax.jit(step)(params, state_at(params, config, places))
        lies_as(got, (jax.tree.map(lambda p: p.sharding, params), places))


def a_state_in_host_memory() -> None:
    with mesh_of(AUTO, data=8) as mesh:
        params, x = on(mesh, "replicated"), batch_on(mesh)
        for config in (ax.AdamW(global_clipnorm=0.1), ACCUMULATING):
            places = places_of(mesh, params, config, memory_kind="pinned_host")
            state = jax.device_put(ax.adamw_init(params, config), places)
            got = trained(jax.jit(step_of(config, state_shardings=places)), params, state, x, 4)
            lies_as(got[1], places)
            assert got[1].m["in"].sharding.memory_kind == "pinned_host"
            near(got[0], on_one_device(config, 4)[0])


def a_population() -> None:
    rates = jnp.array([1e-3, 1e-2])
    with mesh_of(AUTO, data=8) as mesh:
        params = on(mesh, "replicated")
        places = places_of(mesh, params, ax.AdamW())
        state = state_at(params, ax.AdamW(), places)

        def step(params: Any, state: Any, rate: Any, **kwargs: Any) -> Any:
            grads = jax.tree.map(jnp.cos, params)
            return ax.adamw_step(params, grads, state, ax.AdamW(rate), **kwargs)

        many = jax.vmap(functools.partial(step, state_shardings=places), (None, None, 0))
        got = jax.jit(many)(params, state, rates)
        near(got, jax.jit(jax.vmap(step, in_axes=(None, None, 0)))(params, state, rates))
        assert (got[0]["in"].is_fully_replicated, got[1].m["in"].sharding.spec[-1]) == (1, "data")


def an_exported_step() -> None:
    config = ax.AdamW()
    with mesh_of(AUTO, data=4, model=2) as mesh:
        params, x = on(mesh, "tensor"), batch_on(mesh)
        places = places_of(mesh, params, config)
        state = state_at(params, config, places)
        step = jax.jit(step_of(config, state_shardings=places, implementation="xla"))
        loaded = export.deserialize(export.export(step)(params, state, x).serialize())
        got = jax.block_until_ready(jax.jit(loaded.call)(params, state, x))
        lies_as(got, (jax.tree.map(lambda p: p.sharding, params), places))
        # Shardings are numbered anew in each module: the same program is the same text.
        again = jax.jit(step_of(config, state_shardings=places, implementation="xla"))
        texts = [f.lower(params, state, x).as_text() for f in (step, again)]
        assert texts[0] == texts[1]


def outside_of_jit() -> None:
    config = ax.AdamW(global_clipnorm=0.1)
    with mesh_of(AUTO, data=8) as mesh:
        params = on(mesh, "replicated")
        places = places_of(mesh, params, config)
        eager = step_of(config, state_shardings=places)
        x = batch_on(mesh)
        got = trained(eager, params, ax.adamw_init(params, config), x, 2)
        lies_as(got, (jax.tree.map(lambda p: p.sharding, params), places))
        near(got, trained(jax.jit(step_of(config)), params, ax.adamw_init(params, config), x, 2))
        free = jax.tree.map(jnp.asarray, numbers())  # JAX may move them: as under jit, to all
        for step in (eager, jax.jit(eager)):
            lies_as(trained(step, free, state_at(params, config, places), x, 2), got)


def the_drop_in() -> None:
    for kind in (AUTO, EXPLICIT):
        with mesh_of(kind, data=8) as mesh:
            params, x = on(mesh, "replicated"), batch_on(mesh)
            cut = ax.sharding.zero1(mesh, "data", params, min_size=0)
            optimizer = axo.adamw(1e-3, weight_decay=0.004, state_shardings=cut)

            def step(params: Any, state: Any, x: Any, optimizer: Any = optimizer) -> Any:
                updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
                return optax.apply_updates(params, updates), state

            state = optimizer.init(params)
            lies_as(jax.jit(optimizer.init)(params), state)
            assert state.mu["in"].sharding == cut["in"]
            compiled = jax.jit(step).lower(params, state, x).compile()
            assert gathered(compiled) == whole_shapes("replicated")
            lies_as(trained(jax.jit(step), params, state, x, 2), (params, state))


# ----------------------------------------------------------------------------- the numbers


def near_one_device(kind: Any, layout: str, config: ax.AdamW, steps: int, **kwargs: Any) -> None:
    with mesh_of(kind, **MESHES[layout]) as mesh:
        params = on(mesh, layout)
        places = places_of(mesh, params, config)
        step = jax.jit(step_of(config, state_shardings=places, **kwargs), donate_argnums=(0, 1))
        state = state_at(params, config, places)
        with Compilations() as xla:
            got = trained(step, params, state, batch_on(mesh), steps)
        assert xla.count == 1, xla.count
    near(got[0], on_one_device(config, steps)[0])


CHECKS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (the_calls_between_updates_gather_nothing, a_frozen_leaf_stays)
}
SLOW: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        in_loops_and_nested_functions,
        leaves_of_one_shape,
        a_state_in_host_memory,
        a_population,
        an_exported_step,
        outside_of_jit,
        the_drop_in,
    )
}
for layout in MESHES:
    for mode, kind in (("automatic", AUTO), ("explicit", EXPLICIT)):
        for words, config in {
            "": ax.AdamW(),
            "_clipped": ax.AdamW(global_clipnorm=0.1),
            "_accumulating": ACCUMULATING,
        }.items():
            name = f"{layout}_{mode}{words}"
            moves = functools.partial(only_new_params_are_gathered, kind, layout, config)
            here = CHECKS if name == "tensor_automatic_clipped" else SLOW
            here[f"only_new_params_are_gathered_{name}"] = moves
            SLOW[name] = functools.partial(near_one_device, kind, layout, config, 50)


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__), *CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW)
def test_slowly_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__), *SLOW)


# -------------------------------------------------------------------- which dimension is cut

DATA, BOTH = AbstractMesh((4,), ("data",)), AbstractMesh((4, 2), ("data", "model"))
SPECS: dict[str, tuple[Any, tuple[int, ...], P, dict[str, Any], P]] = {
    "the largest": (DATA, (64, 128), P(), {}, P(None, "data")),
    "the largest that it divides": (DATA, (64, 130), P(), {}, P("data")),
    "the first of two": (DATA, (64, 64), P(), {}, P("data")),
    "not the param's own": (BOTH, (64, 128), P(None, "model"), {}, P("data", "model")),
    "the param's own too": (BOTH, (7, 4096), P(None, "model"), {}, P(None, ("model", "data"))),
    "no further than it goes": (
        BOTH,
        (7, 4100),
        P(None, "model"),
        {"strict": False},
        P(None, "model"),
    ),
    "a param of the same axis": (DATA, (64, 128), P("data"), {}, P("data")),
    "small": (DATA, (4, 16), P(), {"min_size": 65}, P()),
    "small, and cut": (BOTH, (4, 16), P("model"), {"min_size": 65}, P("model")),
    "large enough": (DATA, (4, 16), P(), {"min_size": 64}, P(None, "data")),
    "indivisible": (DATA, (4099,), P(), {"strict": False}, P()),
    "a scalar": (DATA, (), P(), {"min_size": 0}, P()),
    "over two axes": (
        BOTH,
        (64, 128),
        P(),
        {"axis": ("data", "model")},
        P(None, ("data", "model")),
    ),
}


@pytest.mark.parametrize("case", SPECS.values(), ids=SPECS)
def test_which_dimension_is_cut(case: Any) -> None:
    mesh, shape, own, options, want = case
    param = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, own))
    axis = options.pop("axis", "data") if "axis" in options else "data"
    options = {"min_size": 1} | options
    cut = ax.sharding.zero1(mesh, axis, {"w": param}, **options)
    assert cut == {"w": NamedSharding(mesh, want)}


def test_params_that_lie_nowhere_count_as_whole() -> None:
    params = {"w": jax.ShapeDtypeStruct((64, 128), "float32"), "b": jnp.ones((64, 64))}
    cut = ax.sharding.zero1(DATA, "data", params)
    assert {k: s.spec for k, s in cut.items()} == {"w": P(None, "data"), "b": P("data")}


# --------------------------------------------------------------------- on 64 chips of a pod


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 1.0])
def test_llama_1b_on_64_chips(clip: float | None) -> None:
    """The state's bytes on each chip are those of the whole divided by 64, within 5 %."""
    chips = aot.devices(target("v5e"), 64)
    mesh = Mesh(np.array(chips), ("data",), axis_types=(AUTO,))
    config, model = ax.AdamW(global_clipnorm=clip), shapes.llama_1b()
    whole = NamedSharding(mesh, P())
    params = {k: jax.ShapeDtypeStruct(s, "float32", sharding=whole) for k, s in model.items()}
    places = ax.sharding.state_shardings(ax.sharding.zero1(mesh, "data", params), config)
    state = ax.sharding.abstract_state(params, config, state_shardings=places)

    def step(params: Any, grads: Any, state: Any) -> Any:
        return ax.adamw_step(params, grads, state, config, state_shardings=places)

    jitted = jax.jit(step, donate_argnums=(0, 2))
    traced = jitted.trace(params, params, state)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    model_bytes = 4 * shapes.num_parameters(model)
    state_bytes = memory.argument_size_in_bytes - 2 * model_bytes
    assert 1 <= state_bytes / (2 * model_bytes / 64) <= 1.05
    assert memory.alias_size_in_bytes >= model_bytes + 2 * model_bytes / 64  # all in place
    # Only new params are gathered, each once; the norms are tiny, and summed in place of that.
    cut = [s for s in model.values() if math.prod(s) > 100_000]
    assert sorted(map(math.prod, gathered(compiled))) == sorted(map(math.prod, cut))
    lies_as_structs(compiled.output_shardings, (dict.fromkeys(params, whole), places), state)


def lies_as_structs(found: Any, wanted: Any, state: Any) -> None:
    ranks = [x.ndim for x in jax.tree.leaves((state.m, state))]
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), ranks, strict=True)
    assert all(x.is_equivalent_to(y, rank) for x, y, rank in pairs)


if __name__ == "__main__":
    main(CHECKS | SLOW)
