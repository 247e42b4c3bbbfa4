"""``adamw_xla.hlo`` where the arguments' names do not tell params from moments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import adamw_xla as ax
from adamw_xla.hlo import report

OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "average": {"use_ema": True, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2, "global_clipnorm": 1.0},
    "skip": {"skip_nonfinite": True, "clipnorm": 1.0},
    "no decay": {"weight_decay": 0.0},
}


def twins(params: Any, x: jax.Array) -> jax.Array:
    """Two leaves of one size, whose gradients are made of each other, element by element."""
    loss = jnp.mean((jnp.tanh(x @ params["kernel"]) * params["scale"]) ** 2)
    return loss + jnp.sum(jnp.sin(params["scale"]) * params["twin"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "donated"), [("xla", True), ("native", True), ("native", False)]
)
@pytest.mark.parametrize("options", OPTIONS)
def test_leaves_by_what_depends_on_what(options, implementation, donated):
    if implementation == "native" and not ax.native_available():
        pytest.skip("the CPU kernel is not built")
    config = ax.AdamW(**OPTIONS[options])
    params = {"kernel": jnp.ones((64, 512)), "scale": jnp.ones(512), "twin": jnp.ones(512)}
    state = ax.adamw_init(params, config)
    structure = jax.tree.structure(state)

    def train_step(params: Any, numbered: Any, x: Any) -> Any:
        state = structure.unflatten(numbered)
        grads = jax.grad(twins)(params, x)
        params, state = ax.adamw_step(params, grads, state, config, implementation=implementation)
        return params, jax.tree.leaves(state)

    args = params, jax.tree.leaves(state), jnp.ones((8, 64))
    found = report(jax.jit(train_step, donate_argnums=(0, 1) * donated).lower(*args).compile())
    assert [leaf.name for leaf in found.leaves] == [
        "params['kernel']",
        "params['scale']",
        "params['twin']",
    ]
    assert found.parameters == 64 * 512 + 2 * 512
    assert all(leaf.in_place or not donated for leaf in found.leaves)
    assert all(leaf.kernels for leaf in found.leaves)
    assert {k for leaf in found.leaves for k in leaf.kernels} <= {
        kernel.name for kernel in found.update.kernels
    }


def test_no_leaves_where_one_is_ambiguous():
    config = ax.AdamW()

    def step(params: Any, numbered: Any, grads: Any) -> Any:
        # Halves of one buffer: no argument is the param.
        params = {"w": params[0] + params[1]}
        state = jax.tree.structure(ax.adamw_init(params, config)).unflatten(numbered)
        new, state = ax.adamw_step(params, grads, state, config, implementation="xla")
        return new, jax.tree.leaves(state)

    params = {"w": jnp.ones(64)}
    state = jax.tree.leaves(ax.adamw_init(params, config))
    halves = jnp.ones(64), jnp.ones(64)
    found = report(jax.jit(step).lower(halves, state, params).compile())
    assert found.leaves == ()
    assert found.parameters == 0
    assert "bytes per param" not in str(found)


KERAS_LEAVES = (8 * 16, 16, 16 * 4, 4)


@pytest.mark.parametrize("whose", ["ours", "stock"])
def test_keras_variables_are_leaves(whose):
    keras = pytest.importorskip("keras")
    from adamw_xla.keras import AdamW

    optimizer = {"ours": AdamW, "stock": keras.optimizers.AdamW}[whose](1e-3)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(4)])
    model.compile(optimizer=optimizer, loss="mse")
    x, y = jnp.ones((32, 8)), jnp.ones((32, 4))
    model.fit(x, y, verbose=0)
    groups = model.trainable_variables, model.non_trainable_variables
    groups = *groups, model.optimizer.variables, model.metrics_variables
    state = tuple([variable.value for variable in group] for group in groups)
    jitted = jax.jit(model.train_step, donate_argnums=0)
    found = report(jitted.lower(state, (x, y)).compile())
    assert [leaf.name for leaf in found.leaves] == [f"state[0][{i}]" for i in range(4)]
    assert tuple(leaf.elements for leaf in found.leaves) == KERAS_LEAVES
    assert all(leaf.in_place and leaf.kernels for leaf in found.leaves)
    # Behind the iteration and the learning rate a leaf's two moments stand together.
    names = [[found.inputs[n].name for n in leaf.moments] for leaf in found.leaves]
    assert names == [[f"state[2][{2 + 2 * i + k}]" for k in (0, 1)] for i in range(4)]
    assert found.state_bytes == 2 * found.param_bytes == 2 * 4 * sum(KERAS_LEAVES)
    said = "the update       none of this package;" in str(found)
    assert said == (whose == "stock") == (not found.update.kernels)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_keras_leaves_by_the_keys_of_its_variables(amsgrad):
    keras = pytest.importorskip("keras")
    layers = keras.layers.Dense(16, name="first"), keras.layers.Dense(1, name="last")
    model = keras.Sequential([keras.Input((8,)), *layers], name="net")
    optimizer = keras.optimizers.AdamW(1e-3, amsgrad=amsgrad, name="adam")
    optimizer.build(model.trainable_variables)
    params, state = (
        {x.path: x.value for x in group}
        for group in (model.trainable_variables, optimizer.variables)
    )
    keys, kept = list(params), list(state)

    def step(params: Any, state: Any, x: Any) -> Any:
        def loss(p: Any) -> jax.Array:
            return jnp.mean(model.stateless_call([p[key] for key in keys], [], x)[0] ** 2)

        grads = jax.grad(loss)(params)
        lists = ([tree[key] for key in keys] for tree in (grads, params))
        new, now = optimizer.stateless_apply([state[key] for key in kept], *lists)
        return dict(zip(keys, new, strict=True)), dict(zip(kept, now, strict=True))

    jitted = jax.jit(step, donate_argnums=(0, 1))
    found = report(jitted.lower(params, state, jnp.ones((4, 8))).compile())
    # The one of a single element too, which nothing but its name tells.
    assert [leaf.name for leaf in found.leaves] == [f"params['{key}']" for key in sorted(keys)]
    for leaf, key in zip(found.leaves, sorted(keys), strict=True):
        moments = {found.inputs[n].name for n in leaf.moments}
        stem = f"state['adam/{key.replace('/', '_')}"
        kinds = ("momentum", "velocity", "velocity_hat")[: 2 + amsgrad]
        assert moments == {f"{stem}_{kind}']" for kind in kinds}


def optax_step(optimizer: Any) -> Any:
    """A step whose state is a plain list."""
    import optax

    def loss(params: Any, x: Any) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ params["w"]) * params["s"]) ** 2)

    params = {"w": jnp.ones((64, 32)), "s": jnp.ones(32)}
    state = optimizer.init(params)
    structure = jax.tree.structure(state)

    def step(params: Any, numbered: Any, x: Any) -> Any:
        grads = jax.grad(loss)(params, x)
        updates, state = optimizer.update(grads, structure.unflatten(numbered), params)
        return optax.apply_updates(params, updates), jax.tree.leaves(state)

    args = params, jax.tree.leaves(state), jnp.ones((8, 64))
    return report(jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile())


def test_leaves_of_another_optimizer_by_what_depends_on_what():
    optax = pytest.importorskip("optax")
    found = optax_step(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    assert [leaf.name for leaf in found.leaves] == ["params['s']", "params['w']"]
    assert [leaf.elements for leaf in found.leaves] == [32, 64 * 32]
    assert [[found.inputs[n].shape for n in leaf.moments] for leaf in found.leaves] == [
        ["f32[32]"] * 2,
        ["f32[64,32]"] * 2,
    ]
    # XLA:CPU makes one loop each for the new param, m and v.
    assert [len(leaf.kernels) for leaf in found.leaves] == [3, 3]
    lines = str(found).splitlines()
    assert "  the update       none of this package; 6 kernels make the new leaves" in lines
    assert [sum(leaf.name in line for line in lines) for leaf in found.leaves] == [1, 1], lines


@pytest.mark.parametrize("name", ["sgd", "lion", "amsgrad"])
def test_what_is_not_known_is_said(name):
    optax = pytest.importorskip("optax")
    more = {"momentum": 0.9} if name == "sgd" else {}
    found = optax_step(getattr(optax, name)(1e-3, **more))
    assert found.leaves == ()
    said = "none of this package; which arguments are params and moments is not known"
    assert said in str(found)


def test_nnx_variables_are_leaves():
    nnx = pytest.importorskip("flax.nnx")
    from adamw_xla.optax import adamw

    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamw(1e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, x: Any) -> Any:
        optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model))

    found = report(train_step.lower(model, optimizer, jnp.ones((5, 8))).compile())
    assert sorted(leaf.elements for leaf in found.leaves) == [16, 8 * 16]
    assert all(leaf.name.startswith("model") for leaf in found.leaves)
