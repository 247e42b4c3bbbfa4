"""``bench.py keras``: time to the first step of ``model.fit``, and of the steps after it."""

from __future__ import annotations

from collections.abc import Callable
import gc
import json
import os
from pathlib import Path
import statistics
import time
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported

import jax
import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adamw_xla.keras import AdamW

OURS, PEER = "adamw_xla.keras", "keras"
CLASSES: dict[str, Callable[..., Any]] = {OURS: AdamW, PEER: keras.optimizers.AdamW}
WIDTH, BATCH = 64, 32


class Stopwatch(keras.callbacks.Callback):
    """When each step ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.ends.append(time.perf_counter())


def model_of(variables: int) -> keras.Model:
    """A deep residual MLP of so many trainable variables."""
    inputs = x = keras.layers.Input((WIDTH,))
    for _ in range(variables // 2):
        x = x + keras.layers.Dense(WIDTH, activation="tanh")(x) * 0.1
    return keras.Model(inputs, x)


def measure(name: str, variables: int, steps: int) -> tuple[float, list[float]]:
    """Seconds from the call of ``fit`` to the end of its first step, and of each later one."""
    jax.clear_caches()
    keras.utils.clear_session()
    model = model_of(variables)
    model.compile(optimizer=CLASSES[name](), loss="mse")
    x = np.zeros((steps * BATCH, WIDTH), np.float32)
    watch = Stopwatch()
    gc.collect()
    start = time.perf_counter()
    model.fit(x, x, batch_size=BATCH, epochs=1, verbose=0, callbacks=[watch])
    return watch.ends[0] - start, list(np.diff(watch.ends))
