"""Flax NNX: ``nnx.Optimizer`` takes the transformation; Orbax keeps model and optimizer."""

import tempfile

from flax import nnx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from adamw_xla.optax import adamw  # in place of: from optax import adamw


def create():
    model = nnx.Sequential(
        nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 1, rngs=nnx.Rngs(1))
    )
    return model, nnx.Optimizer(model, adamw(0.01), wrt=nnx.Param)


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


x = jax.random.normal(jax.random.key(0), (256, 8))
y = jnp.sum(x, axis=1, keepdims=True)
model, optimizer = create()
losses = [float(train_step(model, optimizer, x, y)) for _ in range(200)]

with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(f"{directory}/step", nnx.state((model, optimizer)))
    checkpointer.wait_until_finished()
    restored = create()
    nnx.update(restored, checkpointer.restore(f"{directory}/step", nnx.state(restored)))

went_on = float(train_step(model, optimizer, x, y)), float(train_step(model, optimizer, x, y))
resumed = float(train_step(*restored, x, y)), float(train_step(*restored, x, y))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.5f}; then {went_on[1]:.8f}, resumed {resumed[1]:.8f}")
