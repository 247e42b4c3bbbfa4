"""``adamw_xla.hlo`` on programs that are compiled here, for the CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamw_xla as ax
from adamw_xla.hlo import Report, report
from adamw_xla_lowering.cpu import kernel as cpu

SCALARS = 1024
"""More bytes than the numbers of a step have."""


def params_and_state(config: ax.AdamW) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    params = {
        "dense": {"kernel": jnp.asarray(rng.standard_normal((64, 512)), jnp.float32)},
        "scale": jnp.ones(512),
    }
    return params, ax.adamw_init(params, config)


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ params["dense"]["kernel"]) * params["scale"]) ** 2)


def train(config: ax.AdamW, donate: tuple[int, ...], **options: Any) -> Report:
    def train_step(params: Any, state: Any, x: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        return *ax.adamw_step(params, grads, state, config, **options), loss

    params, state = params_and_state(config)
    jitted = jax.jit(train_step, donate_argnums=donate)
    return report(jitted.lower(params, state, jnp.ones((8, 64))).compile())


def test_a_train_step():
    found = train(ax.AdamW(global_clipnorm=1.0), (0, 1), implementation="xla")
    # XLA:CPU makes one loop for each result.
    assert found.update.count == 6
    assert found.norm.count >= 2
    assert found.program.count > found.update.count + found.norm.count
    assert [leaf.name for leaf in found.leaves] == ["params['dense']['kernel']", "params['scale']"]
    assert [len(leaf.kernels) for leaf in found.leaves] == [3, 3]
    assert found.undonated == ()
    assert {x.name for x in found.inputs if not x.donated} == {"x"}
    assert found.temporary_bytes is not None
    params = 64 * 512 + 512
    assert found.peak_bytes > 12 * params
    # One loop reads m and g, one v and g, one p and both results: 40 bytes where 28 suffice.
    moved = found.update.read + found.update.written
    assert 40 * params <= moved <= 40 * params + SCALARS
    assert 28 * params <= found.update.least_bytes <= 28 * params + SCALARS
    assert found.parameters == params


@pytest.mark.skipif(not ax.native_available(), reason="the CPU kernel is not built")
def test_a_train_step_on_the_cpu_kernel():
    found = train(ax.AdamW(), (0, 1), implementation="native")
    calls = {kernel.name for kernel in found.update.kernels if kernel.kind == "custom-call"}
    copies = [kernel for kernel in found.update.kernels if kernel.name not in calls]
    assert all(x.kind == "copy" and x.read < cpu.MIN_WITNESSED_BYTES for x in copies), copies
    landed = {name for leaf in found.leaves for name in leaf.kernels}
    assert calls <= landed <= calls | {kernel.name for kernel in copies}
    assert found.undonated == ()
    large = [leaf for leaf in found.leaves if 4 * leaf.elements >= cpu.MIN_WITNESSED_BYTES]
    assert large
    assert all(leaf.in_place for leaf in large)


def test_nothing_donated():
    found = train(ax.AdamW(), (), implementation="xla")
    assert found.in_place == found.undonated == ()
    assert not any(leaf.in_place for leaf in found.leaves)
    assert len(found.leaves) == 2


def test_names_donated_inputs_that_are_not_in_place():
    config = ax.AdamW()

    def step(params: Any, grads: Any, state: Any, unused: Any, kept: Any, scale: Any) -> Any:
        params, new = ax.adamw_step(params, grads, state, config, implementation="xla")
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), new.m, scale + kept[0]

    params, state = params_and_state(config)
    jitted = jax.jit(step, donate_argnums=(0, 2, 3, 5))
    others = jnp.ones(5), jnp.ones(7), jnp.ones(3)
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        compiled = jitted.lower(params, params, state, *others).compile()
    found = report(compiled)
    # Of param, m and v, one finds a float32 result of its size, for each leaf.
    names = [x.name for x in found.undonated]
    assert len(names) == 2 * 2 + 1
    assert "state.count" in names
    assert "scale" not in names
    assert "unused" not in {x.name for x in found.inputs}
    assert {x.name for x in found.inputs if not x.donated} == {
        "grads['dense']['kernel']",
        "grads['scale']",
        "kept",
    }
    assert all(name in str(found) for name in names)
    # The text alone knows those that jax told the compiler of: one for each other result.
    told = {x.name for x in report(compiled.as_text()).undonated}
    assert told == {"state.m['dense']['kernel']", "state.m['scale']"}


def test_says_nothing_where_an_unused_argument_could_be_another():
    def step(unused: Any, used: Any) -> Any:
        return jnp.sum(used)

    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        compiled = jax.jit(step, donate_argnums=1).lower(jnp.ones(3), jnp.ones(3)).compile()
    (found,) = report(compiled).inputs
    assert found.donated is None


def test_steps_in_a_loop():
    config = ax.AdamW()
    params, state = params_and_state(config)

    def train_steps(carry: Any, xs: Any) -> Any:
        def one(carry: Any, x: Any) -> Any:
            params, state = carry
            grads = jax.grad(loss_fn)(params, x)
            return ax.adamw_step(params, grads, state, config, implementation="xla"), None

        return jax.lax.scan(one, carry, xs)[0]

    jitted = jax.jit(train_steps, donate_argnums=0)
    found = report(jitted.lower((params, state), jnp.ones((5, 8, 64))).compile())
    assert found.update.count >= 2
    assert all(kernel.times == 5 for kernel in found.update.kernels)
    assert found.update.launches == 5 * found.update.count
    assert [leaf.name for leaf in found.leaves] == [
        "carry[0]['dense']['kernel']",
        "carry[0]['scale']",
    ]


def test_a_program_without_an_update():
    found = report(jax.jit(lambda x: jnp.sum(x * 2)).lower(jnp.ones((100, 100))).compile())
    assert found.update.kernels == found.norm.kernels == ()
    assert found.leaves == ()
    assert found.program.count >= 1
    assert found.per_parameter(found.program.read) is None
    assert "the update" not in str(found)


def test_optax_moments_are_leaves_too():
    optax = pytest.importorskip("optax")
    optimizer = optax.adamw(1e-3)

    def step(params: Any, grads: Any, state: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, _ = params_and_state(ax.AdamW())
    compiled = jax.jit(step, donate_argnums=(0, 2)).lower(params, params, optimizer.init(params))
    found = report(compiled.compile())
    assert [leaf.name for leaf in found.leaves] == ["params['dense']['kernel']", "params['scale']"]
    assert found.update.kernels == ()


@pytest.mark.parametrize("chained", [False, True])
def test_gradients_that_optax_adds_up_are_state(chained):
    optax = pytest.importorskip("optax")
    optimizer = optax.MultiSteps(optax.adamw(1e-3), 4)
    if chained:
        clip = optax.clip_by_global_norm(1.0)
        optimizer = optax.chain(clip, optimizer.gradient_transformation())

    # The state comes first: its gradients have the path and the size of params.
    def train_step(state: Any, params: Any, x: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss_fn)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    params, _ = params_and_state(ax.AdamW())
    args = optimizer.init(params), params, jnp.ones((8, 64))
    found = report(jax.jit(train_step, donate_argnums=(0, 1)).lower(*args).compile())
    assert [leaf.name for leaf in found.leaves] == ["params['dense']['kernel']", "params['scale']"]
    assert found.state_bytes == 3 * found.param_bytes == 3 * 4 * (64 * 512 + 512)


def test_who_only_reads_a_leaf_does_not_update_it():
    optax = pytest.importorskip("optax")
    optimizer = optax.adamw(1e-3)

    def loss(params: Any, tokens: Any) -> jax.Array:
        return jnp.mean((jnp.tanh(params["embed"][tokens]) @ params["out"]) ** 2)

    def train_step(params: Any, state: Any, tokens: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    params = {"embed": jnp.ones((32, 8)), "out": jnp.ones((8, 4))}
    jitted = jax.jit(train_step, donate_argnums=(0, 1))
    args = params, optimizer.init(params), jnp.zeros(5, jnp.int32)
    found = report(jitted.lower(*args).compile())
    # XLA:CPU makes one loop each for the new param, m and v.
    assert [len(leaf.kernels) for leaf in found.leaves] == [3, 3]
    kernels = {kernel.name: kernel for kernel in found.program.kernels}
    names = [kernels[name].op_name for leaf in found.leaves for name in leaf.kernels]
    assert not [name for name in names if "jvp" in name], names


def test_a_constant_that_the_update_shares_makes_no_kernel_its_own():
    config = ax.AdamW()

    def train_step(params: Any, state: Any, x: Any) -> Any:
        grads = jax.grad(lambda p: jnp.sum((x @ p["w"] + p["b"]) ** 2) * 0.05)(params)
        return ax.adamw_step(params, grads, state, config, implementation="xla")

    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    args = params, ax.adamw_init(params, config), jnp.ones((5, 8))
    found = report(jax.jit(train_step, donate_argnums=(0, 1)).lower(*args).compile())
    # The gradient is multiplied by 0.1, which is 1 - beta_1.
    assert found.update.count == 6
    assert [len(leaf.kernels) for leaf in found.leaves] == [3, 3]
