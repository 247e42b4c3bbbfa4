"""Small Keras models on the digits: shared by the tests of ``adamw_xla.keras``."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import digits
import jax
import keras
import numpy as np

EPOCHS, BATCH = 3, 64
BOUND = 1e-5


@functools.cache
def data() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images [22 * BATCH, 64] and labels."""
    train, _ = digits.load()
    n = len(train.labels) // BATCH * BATCH
    return train.images[:n].reshape(n, -1), train.labels[:n]


def mlp(dtype: str | None = None, width: int = 32) -> keras.Model:
    """The same weights each time, whatever was made before.

    Smooth: where a relu switches by a rounding error, trainings part by whole steps.
    """
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(width, activation="tanh", name="hidden", dtype=dtype),
            keras.layers.Dense(10, name="scores", dtype=dtype),
        ]
    )


def fit(
    optimizer: Any,
    make: Callable[[], keras.Model] = mlp,
    *,
    epochs: int = EPOCHS,
    **options: Any,
) -> keras.Model:
    """Trains a fresh model with ``model.fit``, on the same batches each time."""
    model = make()
    compiled(model, optimizer)
    x, y = data()
    model.fit(x, y, epochs=epochs, batch_size=BATCH, shuffle=False, verbose=0, **options)
    return model


def compiled(model: keras.Model, optimizer: Any) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    return model


def off(ours: Any, theirs: Any) -> dict[str, float]:
    """For each weight max|ours - theirs| / max|theirs|."""
    found = {}
    for a, b in zip(ours, theirs, strict=True):
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        found[b.path] = float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30))
    return found


def close(ours: Any, theirs: Any, bound: float = BOUND) -> None:
    far = {path: f"{x:.1e}" for path, x in off(ours, theirs).items() if x > bound}
    assert not far, f"more than {bound:.0e} off, relative: {far}"


def train_step_jaxpr(model: keras.Model) -> Any:
    """The jaxpr of one train step of a compiled model."""
    x, y = data()
    model._symbolic_build(data_batch=(x[:BATCH], y[:BATCH]))
    model.optimizer.build(model.trainable_variables)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    return jax.make_jaxpr(model.train_step)(state, (x[:BATCH], y[:BATCH]))


def varied() -> keras.Model:
    """A model with a frozen layer, a constraint, a variable without a gradient and a norm."""
    keras.utils.set_random_seed(7)
    frozen = keras.layers.Dense(48, activation="tanh", name="frozen", trainable=False)
    bounded = keras.layers.Dense(
        32, activation="tanh", name="bounded", kernel_constraint=keras.constraints.MaxNorm(0.5)
    )
    layers = [frozen, bounded, keras.layers.LayerNormalization(name="norm")]
    return keras.Sequential(
        [keras.layers.Input((64,)), *layers, keras.layers.Dense(10, name="scores")]
    )
