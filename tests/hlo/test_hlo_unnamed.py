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


def test_keras_variables_are_leaves():
    keras = pytest.importorskip("keras")
    from adamw_xla.keras import AdamW

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(4)])
    model.compile(optimizer=AdamW(1e-3), loss="mse")
    x, y = jnp.ones((32, 8)), jnp.ones((32, 4))
    model.fit(x, y, verbose=0)
    groups = model.trainable_variables, model.non_trainable_variables
    groups = *groups, model.optimizer.variables, model.metrics_variables
    state = tuple([variable.value for variable in group] for group in groups)
    jitted = jax.jit(model.train_step, donate_argnums=0)
    found = report(jitted.lower(state, (x, y)).compile())
    assert [leaf.name for leaf in found.leaves] == [f"state[0][{i}]" for i in range(4)]
    assert found.parameters == 8 * 16 + 16 + 16 * 4 + 4
    assert all(leaf.in_place for leaf in found.leaves)


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
