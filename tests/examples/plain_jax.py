"""Plain JAX: the native API, params and state donated; Orbax keeps both."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import adamw_xla as ax

config = ax.AdamW(learning_rate=0.01, weight_decay=1e-4)


def create():
    w, v = jax.random.key(0), jax.random.key(1)
    params = {
        "w": jax.random.normal(w, (8, 16)) / 4,
        "a": jnp.zeros(16),
        "v": jax.random.normal(v, (16, 1)) / 4,
        "b": jnp.zeros(1),
    }
    return params, ax.adamw_init(params, config)


def loss_fn(params, x, y):
    hidden = jax.nn.relu(x @ params["w"] + params["a"])
    return jnp.mean((hidden @ params["v"] + params["b"] - y) ** 2)


@functools.partial(jax.jit, donate_argnames=("params", "state"))
def train_step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    params, state = ax.adamw_step(params, grads, state, config)
    return params, state, loss


def train(params, state, x, y, steps):
    losses = []
    for _ in range(steps):
        params, state, loss = train_step(params, state, x, y)
        losses.append(float(loss))
    return (params, state), losses


x = jax.random.normal(jax.random.key(2), (256, 8))
y = jnp.sum(x, axis=1, keepdims=True)
trained, losses = train(*create(), x, y, 200)

with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(f"{directory}/step", trained)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(f"{directory}/step", jax.eval_shape(create))

_, went_on = train(*trained, x, y, 2)
_, resumed = train(*restored, x, y, 2)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.5f}; then {went_on[1]:.8f}, resumed {resumed[1]:.8f}")
