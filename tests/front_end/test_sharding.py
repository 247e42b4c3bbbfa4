"""Automatic, explicit and manual sharding on eight (virtual) devices.

Run one by hand: ``PYTHONPATH=tests/helpers XLA_FLAGS=--xla_force_host_platform_device_count=8
python tests/front_end/test_sharding.py NAME``.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
import re
from typing import Any

from comparing import close
from eight_devices import assert_passed, main
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import adamw_xla as ax

CONFIG = ax.AdamW(learning_rate=0.01, amsgrad=True, use_ema=True)
SPECS = {"w": P("x", "y"), "u": P(None, "x"), "b": P("y"), "s": P()}
SHAPES = {"w": (8, 16), "u": (3, 8), "b": (4,), "s": ()}
COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def mesh(kind: AxisType) -> Any:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}


def put(values: Any, where: Any, specs: Any = SPECS) -> Any:
    return {k: jax.device_put(x, NamedSharding(where, specs[k])) for k, x in values.items()}


def varying_axes(x: Any) -> frozenset[str]:
    """Manual axes that ``x`` varies over; has no public reader in jax 0.10."""
    return jax.typeof(x).mat.varying


def expected(params: Any, grads: Any, config: ax.AdamW = CONFIG) -> Any:
    state = ax.adamw_init(params, config)
    return ax.adamw_step(params, grads, state, config)


def fields(state: ax.AdamWState) -> list[Any]:
    return [x for x in (state.m, state.v, state.v_max, state.ema) if x is not None]


def auto() -> None:
    where = mesh(AxisType.Auto)
    params, grads = put(tree(0), where), put(tree(1), where)
    state = jax.jit(functools.partial(ax.adamw_init, config=CONFIG))(params)
    state = jax.device_put(state, state_shardings(where))
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, CONFIG), donate_argnums=(0, 2))
    text = step.lower(params, grads, state).compile().as_text()
    assert not re.search(COLLECTIVES, text), re.findall(COLLECTIVES, text)
    want = {k: x.sharding for k, x in params.items()}
    new, new_state = step(params, grads, state)
    for kept in (new, *fields(new_state)):
        for k, x in kept.items():
            assert x.sharding.is_equivalent_to(want[k], x.ndim), (k, x.sharding)
    close((new, new_state), expected(tree(0), tree(1)))


def state_shardings(where: Any) -> Any:
    """The params' tree of shardings serves for the state's."""
    shardings = {k: NamedSharding(where, spec) for k, spec in SPECS.items()}
    whole = NamedSharding(where, P())
    return ax.AdamWState(whole, shardings, shardings, shardings, shardings)


def state_takes_the_params_shardings() -> None:
    where = mesh(AxisType.Auto)
    params = put(tree(0), where)
    state = ax.adamw_init(params, CONFIG)
    for field in fields(state):
        for k, x in field.items():
            assert x.sharding.is_equivalent_to(params[k].sharding, x.ndim), (k, x.sharding)
    out = jax.jit(
        functools.partial(ax.adamw_init, config=CONFIG), out_shardings=state_shardings(where)
    )(params)
    assert all(f["w"].sharding.spec == P("x", "y") for f in fields(out))


def global_norm_reduces_scalars_only() -> None:
    where = mesh(AxisType.Auto)
    config = ax.AdamW(global_clipnorm=0.5)
    params, grads = put(tree(0), where), put(tree(1), where)
    state = ax.adamw_init(params, config)
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config))
    text = step.lower(params, grads, state).compile().as_text()
    assert not re.search(r"all-gather|all-to-all", text)
    close(step(params, grads, state), expected(tree(0), tree(1), config))


def explicit() -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)) as _:
        where = jax.sharding.get_mesh()
        params, grads = put(tree(0), where), put(tree(1), where)

        @jax.jit
        def step(params: Any, grads: Any) -> Any:
            state = ax.adamw_init(params, CONFIG)
            new, state = ax.adamw_step(params, grads, state, CONFIG)
            for kept in (new, *fields(state)):
                for k, x in kept.items():
                    assert jax.typeof(x).sharding == jax.typeof(params[k]).sharding, k
            return new, state

        new, state = step(params, grads)
        assert new["w"].sharding.spec == P("x", "y")
        close((new, state), expected(tree(0), tree(1)))
        lowered = step.lower(params, grads)
        assert not re.search(COLLECTIVES, lowered.compile().as_text())
        # in this mode the shardings are types: they are written, not left to propagation
        written = re.findall(r"sharding_constraint.*x.*y.* : tensor<8x16xf32>", lowered.as_text())
        assert len(written) >= 5, written


def explicit_vmap() -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)) as _:
        where = jax.sharding.get_mesh()
        many = jax.device_put(np.ones((4, 8), np.float32), NamedSharding(where, P("x", "y")))
        one = jax.device_put(np.ones(8, np.float32), NamedSharding(where, P("y")))
        config = ax.AdamW()

        def f(p: Any, g: Any) -> Any:
            return ax.adamw_step(p, g, ax.adamw_init(p, config), config)[0]

        new = jax.jit(jax.vmap(f))(many, many)
        assert jax.typeof(new).sharding.spec == P("x", "y"), jax.typeof(new)
        shared = jax.jit(jax.vmap(f, in_axes=(None, 0)))(one, many)
        assert jax.typeof(shared).sharding.spec == P("x", "y"), jax.typeof(shared)


def explicit_gradients_that_are_cut_less() -> None:
    """They are cut as their params are, which moves nothing; optax takes them too."""
    for spec in (P(), P("x"), P(None, "y")):
        with jax.set_mesh(mesh(AxisType.Explicit)) as _:
            where = jax.sharding.get_mesh()
            params, grads = put(tree(0), where), put(tree(1), where, SPECS | {"w": spec})
            state = ax.adamw_init(params, CONFIG)
            step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, CONFIG))
            text = step.lower(params, grads, state).compile().as_text()
            assert not re.search(COLLECTIVES, text), (spec, re.findall(COLLECTIVES, text))
            new, state = step(params, grads, state)
            assert new["w"].sharding.spec == state.m["w"].sharding.spec == P("x", "y")
            close((new, state), expected(tree(0), tree(1)))
            close(ax.adamw_step(params, grads, ax.adamw_init(params, CONFIG), CONFIG)[0], new)


def explicit_mismatches_name_the_leaf() -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)) as _:
        where = jax.sharding.get_mesh()
        params = put(tree(0), where)
        grads = put(tree(1), where)
        state = ax.adamw_init(params, CONFIG)
        moved = dataclasses.replace(state, v=put(state.v, where, SPECS | {"w": P("x")}))
        step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, CONFIG))
        for g, s, fragments in (
            (put(tree(1), where, SPECS | {"w": P("y", "x")}), state,
             [r"grads['w']", "P('y', 'x')", "params['w']", "P('x', 'y')", "jax.sharding.reshard"]),
            (put(tree(1), where, SPECS | {"s": P(), "u": P(None, "y")}), state, ["grads['u']"]),
            (grads, moved, ["state.v['w']", "P('x', None)", "state_shardings"]),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="is sharded as") as caught:
                step(params, g, s)
            assert all(x in str(caught.value) for x in fragments), caught.value

        def pending(p: Any, x: jax.Array) -> Any:
            g = jax.lax.dot(x.T, x, out_sharding=P(unreduced={"x"}))
            return ax.adamw_step({"q": p}, {"q": g}, ax.adamw_init({"q": p}, CONFIG), CONFIG)

        with pytest.raises(ValueError, match=r"grads\['q'\]: is a sum pending over \['x'\]"):
            jax.jit(pending)(
                jnp.ones((4, 4)), put({"w": jnp.ones((8, 4))}, where, {"w": P("x")})["w"]
            )


def manual(varying: bool) -> None:
    """``shard_map(check_vma=True)``: each result varies as its operands do."""
    where = mesh(AxisType.Auto)
    spec = P("x") if varying else P()
    params, grads = np.linspace(-1, 1, 16, dtype=np.float32), np.ones(16, np.float32)
    config = ax.AdamW(learning_rate=0.1)

    def step(p: Any, g: Any) -> Any:
        state = ax.adamw_init(p, config)
        new, state = ax.adamw_step(p, g, state, config)
        want = {"x"} if varying else set()
        assert varying_axes(new) == want, jax.typeof(new)
        assert varying_axes(state.m) == want
        assert varying_axes(state.count) == set()
        return new, state.m

    mapped = jax.shard_map(step, mesh=where, in_specs=(spec, spec), out_specs=(spec, spec))
    new, m = jax.jit(mapped)(params, grads)
    want, state = expected(params, grads, config)
    close((new, m), (want, state.m))


def manual_sharded() -> None:
    manual(varying=True)


def manual_replicated() -> None:
    manual(varying=False)


def manual_union() -> None:
    """A replicated param with a gradient that varies: the results vary over both axes."""
    where = mesh(AxisType.Auto)
    config = ax.AdamW(learning_rate=0.1)

    def step(p: Any, g: Any) -> Any:
        new, state = ax.adamw_step(p, g, ax.adamw_init(p, config), config)
        assert varying_axes(new) == {"x", "y"}, jax.typeof(new)
        assert varying_axes(state.v) == {"x", "y"}
        return new

    mapped = jax.shard_map(step, mesh=where, in_specs=(P("x"), P("y")), out_specs=P(("x", "y")))
    new = jax.jit(mapped)(np.ones(8, np.float32), np.ones(4, np.float32))
    assert new.shape == (16,)

    def claims_too_little(p: Any, g: Any) -> Any:
        return ax.adamw_step(p, g, ax.adamw_init(p, config), config)[0]

    wrong = jax.shard_map(claims_too_little, mesh=where, in_specs=(P(), P("y")), out_specs=P())
    with pytest.raises(ValueError, match="y"):
        jax.jit(wrong)(np.ones(4, np.float32), np.ones(8, np.float32))


def manual_options() -> None:
    """All options together type-check, in the branches of accumulation too."""
    where = mesh(AxisType.Auto)
    config = ax.AdamW(
        amsgrad=True,
        use_ema=True,
        ema_overwrite_frequency=2,
        clipvalue=1.0,
        gradient_accumulation_steps=2,
        loss_scale_factor=2.0,
    )

    def step(p: Any, g: Any) -> Any:
        state = ax.adamw_init(p, config)
        for _ in range(2):
            p, state = ax.adamw_step(p, g, state, config)
        return p

    mapped = jax.shard_map(step, mesh=where, in_specs=(P("x"), P("x")), out_specs=P("x"))
    ones = np.ones(8, np.float32)
    want = jax.jit(step)(ones, ones)
    close(jax.jit(mapped)(ones, ones), want)


def manual_branches() -> None:
    """Where devices differ on whether to update, all that an update changes differs too."""
    step, reference = ax.adamw_step, ax.reference.adamw_step
    auto, explicit = AxisType.Auto, AxisType.Explicit
    for make, skip, varying, kind, check in (
        (step, True, True, auto, True),
        (reference, True, True, auto, True),
        (step, True, False, auto, True),
        (step, False, False, auto, True),
        (reference, True, True, explicit, True),
        (step, True, True, explicit, False),
    ):
        differing(make, skip, varying, kind, check)


def differing(make: Any, skip: bool, varying: bool, kind: AxisType, check: bool) -> None:
    """Three calls with accumulation; the second is given an infinity on one device of four."""
    config = ax.AdamW(
        gradient_accumulation_steps=2, skip_nonfinite=skip, use_ema=True, axis_names=()
    )

    def run(p: Any, grads: Any) -> Any:
        state = ax.adamw_init(p, config)
        for k in range(3):
            p, state = make(p, grads[k], state, config)
        return p, state.m, jnp.broadcast_to(state.micro_step, p.shape)

    params = np.linspace(-1, 1, 8 if varying else 2, dtype=np.float32)
    grads = np.ones((3, 8), np.float32)
    grads[1, 2] = np.inf if skip else 1.0
    specs = (P("x") if varying else P(), P(None, "x"))
    with jax.set_mesh(mesh(kind)) as _:
        where = jax.sharding.get_mesh()
        mapped = jax.shard_map(run, mesh=where, in_specs=specs, out_specs=P("x"), check_vma=check)
        operands = zip((params, grads), specs, strict=True)
        got = jax.jit(mapped)(*(jax.device_put(x, NamedSharding(where, s)) for x, s in operands))
    pairs = zip(
        np.split(params, 4) if varying else [params] * 4, np.split(grads, 4, 1), strict=True
    )
    want = [jax.jit(run)(*pair) for pair in pairs]
    done = [int(micro_step[0]) for _, _, micro_step in want]
    assert done == ([1, 0, 1, 1] if skip else [1] * 4)
    for x, *y in zip(got, *want, strict=True):
        close(x, np.concatenate(y))


def gpu_leaves_keep_their_shapes() -> None:
    """Flattened, a sharded leaf would be moved; on one device, or inside shard_map, it is not."""
    where = mesh(AxisType.Auto)
    params = [jnp.ones((8, 2)), jnp.ones((4, 4))]
    state = ax.adamw_init(params, ax.AdamW())

    def step(p: Any, g: Any) -> Any:
        return ax.adamw_step(p, g, state, ax.AdamW())[0]

    def composites(f: Any) -> list[str]:
        text = f.trace(params, params).lower(lowering_platforms=("cuda",)).as_text()
        return [line for line in text.splitlines() if '"adamw_xla.update"' in line]

    sharded = NamedSharding(where, P("x"))
    partitioned = composites(jax.jit(step, in_shardings=(sharded, sharded)))
    assert "tensor<8x2xf32>" in partitioned[0], partitioned
    assert "tensor<4x4xf32>" in partitioned[1], partitioned
    manual = jax.shard_map(step, mesh=where, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    for line in (*composites(jax.jit(step)), *composites(jax.jit(manual))):
        assert "tensor<16xf32>" in line, line


def groups() -> None:
    kinds = ax.Group("^[wu]$", beta_1=0.5, scale=2.0), ax.Group("s", frozen=True)
    config = ax.AdamW(0.01, global_clipnorm=0.5, groups=kinds)

    @jax.jit
    def step(params: Any, grads: Any, rate: Any) -> Any:
        state = ax.adamw_init(params, config)
        return ax.adamw_step(params, grads, state, config, learning_rate=rate)

    for kind in (AxisType.Auto, AxisType.Explicit):
        where = mesh(kind)
        with jax.set_mesh(where):
            params, grads = put(tree(0), where), put(tree(1), where)
            new, state = step(params, grads, 0.01)
            assert all(new[k].sharding.spec == spec for k, spec in SPECS.items())
            many = jax.device_put(
                np.array([0.01, 0.02] * 4, np.float32), NamedSharding(where, P("x"))
            )
            if kind == AxisType.Explicit:  # rates lie on the mesh, constants nowhere
                whole = put(tree(0), where, dict.fromkeys(SPECS, P()))
                batched, _ = jax.jit(jax.vmap(step, (None, None, 0)))(whole, whole, many)
                assert batched["w"].shape == (8, 8, 16)
        close((new, state), expected(tree(0), tree(1), config))


CHECKS = {
    f.__name__: f
    for f in (
        auto,
        state_takes_the_params_shardings,
        global_norm_reduces_scalars_only,
        explicit,
        explicit_vmap,
        groups,
        explicit_gradients_that_are_cut_less,
        explicit_mismatches_name_the_leaf,
        manual_sharded,
        manual_replicated,
        manual_union,
        manual_options,
        manual_branches,
        gpu_leaves_keep_their_shapes,
    )
}


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__))


if __name__ == "__main__":
    main(CHECKS)
