"""``bench.py keras``: time to the first step of ``model.fit``, and of the steps after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
import statistics
import time
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported

from benches.timing import no_gc
import jax
import keras
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import adamw_xla as ax
from adamw_xla.keras import AdamW

OURS, PEER = "adamw_xla.keras", "keras"
CLASSES: dict[str, Callable[[], Any]] = {OURS: AdamW, PEER: keras.optimizers.AdamW}
BATCH, STEPS = 32, 25


class Seconds(NamedTuple):
    """By class, one entry per round: to the first step, and per step after it."""

    first: dict[str, list[float]]
    later: dict[str, list[float]]


class Stopwatch(keras.callbacks.Callback):
    """When the first step of ``fit`` and its epoch ended, with all that was dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.last = 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 0:
            self.first = _after(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.last = _after(logs)


def _after(logs: Any) -> float:
    jax.block_until_ready(logs)
    return time.perf_counter()


def model_of(variables: int, width: int, optimizer: Any) -> keras.Model:
    """An MLP of so many trainable variables, compiled."""
    layers = [keras.layers.Dense(width, activation="tanh") for _ in range(variables // 2)]
    model = keras.Sequential([keras.layers.Input((width,)), *layers])
    model.compile(optimizer=optimizer, loss="mse")
    return model


def timed_fit(model: keras.Model, width: int) -> tuple[float, float]:
    """Seconds from the call of ``fit`` to the end of its first step, and of each later one."""
    x = np.zeros((STEPS * BATCH, width), np.float32)
    watch = Stopwatch()
    with no_gc():
        start = time.perf_counter()
        model.fit(x, x, batch_size=BATCH, verbose=0, callbacks=[watch])
    return watch.first - start, (watch.last - watch.first) / (STEPS - 1)


def measure(variables: int, width: int, rounds: int, tick: Callable[[], None]) -> Seconds:
    """Times both classes in turn: fresh models from cold caches, then two models warm."""
    first: dict[str, list[float]] = {name: [] for name in CLASSES}
    later: dict[str, list[float]] = {name: [] for name in CLASSES}
    for warm_up in (True, *[False] * rounds):
        models = {}
        for name, optimizer in CLASSES.items():
            jax.clear_caches()
            models[name] = model_of(variables, width, optimizer())
            seconds, _ = timed_fit(models[name], width)
            if not warm_up:
                first[name].append(seconds)
        tick()
    for _ in range(4 * rounds):
        for name, model in models.items():
            later[name].append(timed_fit(model, width)[1])
        tick()
    return Seconds(first, later)


def run(variables: int, width: int, rounds: int, path: Path | None, console: Console) -> None:
    """The command: measures, prints, and writes what was asked for."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("fit", total=1 + 5 * rounds)
        seconds = measure(variables, width, rounds, lambda: progress.advance(task))
    kernel = "ours by its CPU kernel" if ax.native_available() else "ours by StableHLO"
    cores = len(os.sched_getaffinity(0))
    table = Table(
        title=f"model.fit, {variables} variables, width {width}: medians (min..max)",
        caption=f"{cores} cores, jax {jax.__version__}, keras {keras.__version__}; {kernel}",
    )
    for heading in ("ms", *CLASSES, f"{PEER} / ours", "by round"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    table.add_row("to the first step", *_cells(seconds.first))
    table.add_row("each step after it", *_cells(seconds.later))
    console.print(table)
    if path is not None:
        path.write_text(json.dumps(seconds._asdict(), indent=1))


def _cells(seconds: Mapping[str, list[float]]) -> list[str]:
    shown = [
        f"{statistics.median(t) * 1e3:.1f} ({min(t) * 1e3:.1f}..{max(t) * 1e3:.1f})"
        for t in seconds.values()
    ]
    ours, peer = (np.asarray(seconds[name]) for name in (OURS, PEER))
    low, middle, high = np.quantile(peer / ours, [0.25, 0.5, 0.75])
    ratio = statistics.median(peer) / statistics.median(ours)
    return [*shown, f"{ratio:.2f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
