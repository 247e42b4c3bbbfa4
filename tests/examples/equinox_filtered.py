"""Equinox: ``eqx.filter_jit`` around it; what is no array is None and stays; Orbax keeps both."""

import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from adamw_xla.optax import adamw  # in place of: from optax import adamw

optimizer = adamw(0.01)


def create():
    model = eqx.nn.MLP(8, 1, width_size=16, depth=1, key=jax.random.key(0))
    return model, optimizer.init(eqx.filter(model, eqx.is_inexact_array))


def loss_fn(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


@eqx.filter_jit
def train_step(model, state, x, y):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, x, y)
    updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def train(model, state, x, y, steps):
    losses = []
    for _ in range(steps):
        model, state, loss = train_step(model, state, x, y)
        losses.append(float(loss))
    return (model, state), losses


x = jax.random.normal(jax.random.key(0), (256, 8))
y = jnp.sum(x, axis=1, keepdims=True)
trained, losses = train(*create(), x, y, 200)

with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
    arrays, rest = eqx.partition(trained, eqx.is_array)
    checkpointer.save(f"{directory}/step", arrays)
    checkpointer.wait_until_finished()
    template = eqx.filter(create(), eqx.is_array)
    restored = eqx.combine(checkpointer.restore(f"{directory}/step", template), rest)

_, went_on = train(*trained, x, y, 2)
_, resumed = train(*restored, x, y, 2)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.5f}; then {went_on[1]:.8f}, resumed {resumed[1]:.8f}")
