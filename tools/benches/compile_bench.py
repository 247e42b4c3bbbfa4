"""``bench.py compile``: XLA's compile time of a step, and the peak memory of a train step."""

from __future__ import annotations

import json
from pathlib import Path
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import peer_steps
from peer_steps import Init, Step
from rich.console import Console
from rich.progress import track
from rich.table import Table
import shapes

import adamw_xla as ax

LAYERS, WIDTH, BATCH = 24, 512, 64
OURS, PEER = "adamw_xla", "optax"


def optimizers() -> dict[str, tuple[Init, Step]]:
    """Who takes part: how each begins, and its step."""
    return {
        OURS: peer_steps.of_config(ax.AdamW()),
        PEER: peer_steps.of_optax(optax.adamw(1e-3)),
    }


def compile_seconds(leaves: int, repeats: int) -> dict[str, list[float]]:
    """Seconds that XLA takes for one step, interleaved."""
    params = shapes.structs(shapes.repeated(leaves))
    seconds: dict[str, list[float]] = {name: [] for name in optimizers()}
    for _ in track(range(repeats), "compile", transient=True):
        for name, (init, step) in optimizers().items():
            jax.clear_caches()
            state = jax.eval_shape(init, params)
            lowered = jax.jit(step, donate_argnums=(0, 2)).lower(params, params, state)
            start = time.perf_counter()
            lowered.compile()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes() -> dict[str, int]:
    """Peak memory of a train step, as the compiler plans it: donated arguments once."""
    params = {
        f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)}
        for i in range(LAYERS)
    }
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for i in range(LAYERS):
            x = x + jnp.tanh(x @ params[f"layer_{i}"]["kernel"])
        return jnp.mean(x**2)

    peaks = {}
    for name, (init, step) in optimizers().items():

        def train_step(params: Any, state: Any, x: Any, step: Step = step) -> Any:
            return step(params, jax.grad(loss)(params, x), state)

        state = jax.eval_shape(init, params)
        compiled = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, state, x).compile()
        memory = compiled.memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peaks[name] = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
    return peaks


def run(leaves: int, repeats: int, json_path: Path | None, console: Console) -> None:
    """The command: measures, prints, and writes what was asked for."""
    seconds, peaks = compile_seconds(leaves, repeats), peak_bytes()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    table = Table(title=f"jax {jax.__version__}, {jax.default_backend()}")
    for heading in ("", *seconds, "optax / ours"):
        table.add_column(heading, justify="right" if heading else "left")
    cells = [f"{medians[name]:.2f} s [{min(t):.2f}, {max(t):.2f}]" for name, t in seconds.items()]
    table.add_row(f"compile, {leaves} leaves", *cells, f"{medians[PEER] / medians[OURS]:.2f}")
    sizes = [f"{peak / 2**20:.2f} MiB" for peak in peaks.values()]
    table.add_row("peak of a train step", *sizes, f"{peaks[PEER] / peaks[OURS]:.4f}")
    console.print(table)
    if json_path is not None:
        figures = {"compile_seconds": seconds, "peak_bytes": peaks}
        json_path.write_text(json.dumps(figures, indent=1))
