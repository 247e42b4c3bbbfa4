"""Equinox' documented training loop: the whole model goes to ``update``, functions and all."""

import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from adamw_xla.optax import adamw  # in place of: from optax import adamw


class CNN(eqx.Module):
    layers: list

    def __init__(self, key):
        key1, key2, key3 = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Conv1d(1, 3, kernel_size=3, key=key1),
            eqx.nn.MaxPool1d(kernel_size=2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(9, 16, key=key2),
            jax.nn.tanh,
            eqx.nn.Linear(16, 1, key=key3),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


optim = adamw(0.002)


def create():
    model = CNN(jax.random.key(1))
    return model, optim.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def make_step(model, opt_state, x, y):
    loss_value, grads = eqx.filter_value_and_grad(loss)(model, x, y)
    updates, opt_state = optim.update(grads, opt_state, model)
    model = eqx.apply_updates(model, updates)
    return model, opt_state, loss_value


def train(model, opt_state, x, y, steps):
    losses = []
    for _ in range(steps):
        model, opt_state, loss_value = make_step(model, opt_state, x, y)
        losses.append(float(loss_value))
    return (model, opt_state), losses


x = jax.random.normal(jax.random.key(0), (256, 1, 6))
y = jnp.mean(x, axis=2)
trained, losses = train(*create(), x, y, 1400)

with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
    arrays, rest = eqx.partition(trained, eqx.is_array)
    checkpointer.save(f"{directory}/step", arrays)
    checkpointer.wait_until_finished()
    template = eqx.filter(create(), eqx.is_array)
    restored = eqx.combine(checkpointer.restore(f"{directory}/step", template), rest)

_, went_on = train(*trained, x, y, 2)
_, resumed = train(*restored, x, y, 2)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.5f}; then {went_on[1]:.8f}, resumed {resumed[1]:.8f}")
