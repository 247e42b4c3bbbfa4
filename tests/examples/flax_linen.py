"""Flax Linen: ``TrainState`` takes the transformation; Orbax keeps the state."""

import functools
import tempfile

from flax import linen as nn
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from adamw_xla.optax import adamw  # in place of: from optax import adamw


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(16)(x)))


def create():
    model = Model()
    params = model.init(jax.random.key(0), jnp.zeros((1, 8)))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=adamw(0.01))


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state, x, y):
    def loss_fn(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(state, x, y, steps):
    losses = []
    for _ in range(steps):
        state, loss = train_step(state, x, y)
        losses.append(float(loss))
    return state, losses


x = jax.random.normal(jax.random.key(0), (256, 8))
y = jnp.sum(x, axis=1, keepdims=True)
state, losses = train(create(), x, y, 200)

with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(f"{directory}/step", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(f"{directory}/step", create())

state, went_on = train(state, x, y, 2)
restored, resumed = train(restored, x, y, 2)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.5f}; then {went_on[1]:.8f}, resumed {resumed[1]:.8f}")
