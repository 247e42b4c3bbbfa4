"""``bench.py trace``: how long one optimizer step takes to trace and to lower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
from pathlib import Path
import statistics
import time
from typing import Any

from benches.timing import no_gc, processor
import jax
import optax
import peer_steps
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
import shapes

import adamw_xla as ax

OURS, PEER, FLOOR = "adamw_xla", "optax", "barrier"
PHASES = ("trace", "lower")


@dataclasses.dataclass(frozen=True)
class Program:
    """A step ``fn(params, grads, state)`` and the avals that it is traced on."""

    fn: Callable[..., Any]
    args: tuple[Any, Any, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of every round, by program and phase."""

    leaves: int
    seconds: dict[str, dict[str, list[float]]]

    def total(self, program: str) -> list[float]:
        """Trace and lower together, round by round."""
        return [sum(phases) for phases in zip(*self.seconds[program].values(), strict=True)]

    def ratio(self, *, above_floor: bool) -> float:
        """How many times as long optax takes, by medians."""
        floor = statistics.median(self.total(FLOOR)) if above_floor else 0.0
        peer, ours = (statistics.median(self.total(name)) - floor for name in (PEER, OURS))
        return peer / ours


def programs(leaves: int) -> dict[str, Program]:
    """Who takes part, on the same tree; no memory is allocated."""
    params = shapes.structs(shapes.repeated(leaves))
    init, ours = peer_steps.of_config(ax.AdamW(learning_rate=1e-3, weight_decay=4e-3))
    peer_init, peer = peer_steps.of_optax(optax.adamw(1e-3, weight_decay=4e-3))
    state = jax.eval_shape(init, params)
    return {
        OURS: Program(ours, (params, params, state)),
        PEER: Program(peer, (params, params, jax.eval_shape(peer_init, params))),
        FLOOR: Program(peer_steps.barrier, (params, params, state)),
    }


def measure(leaves: int, repeats: int, tick: Callable[[], None]) -> Result:
    """Times every program once per round, in an order that rotates."""
    contestants = programs(leaves)
    names = list(contestants)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {phase: [] for phase in PHASES} for name in names
    }
    for name in names:  # once for imports and the like, not counted
        _trace_and_lower(contestants[name])
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            for phase, spent in zip(PHASES, _trace_and_lower(contestants[name]), strict=True):
                seconds[name][phase].append(spent)
        tick()
    return Result(leaves, seconds)


def _trace_and_lower(program: Program) -> tuple[float, float]:
    jax.clear_caches()
    jitted = jax.jit(program.fn, donate_argnums=(0, 2))
    with no_gc():
        start = time.perf_counter()
        traced = jitted.trace(*program.args)
        middle = time.perf_counter()
        traced.lower()
        end = time.perf_counter()
    return middle - start, end - middle


# ------------------------------------------------------------------------------- report


def run(leaves: Sequence[int], repeats: int, path: Path | None, console: Console) -> None:
    """Measures, prints the table, and writes the times if a path is given."""
    with Progress(console=console, transient=True) as progress:
        results = []
        for count in leaves:
            task = progress.add_task(f"{count} leaves", total=repeats)
            results.append(measure(count, repeats, lambda task=task: progress.advance(task)))
    console.print(table(results, repeats))
    for result in results:
        console.print(ratios(result), highlight=False)
    if path is not None:
        path.write_text(json.dumps(as_json(results), indent=2) + "\n")


def table(results: Sequence[Result], repeats: int) -> Table:
    """One row per tree and program, milliseconds."""
    out = Table(
        title=f"ms to trace and lower one step: median of {repeats} (min..max)",
        caption=machine(),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    out.add_column("leaves", justify="right")
    out.add_column("program", no_wrap=True)
    for column in (*PHASES, "both"):
        out.add_column(column, justify="right", no_wrap=True)
    for result in results:
        for name, phases in result.seconds.items():
            leaves = str(result.leaves) if name == OURS else ""
            times = [phases[phase] for phase in PHASES]
            out.add_row(leaves, name, *map(_spread, [*times, result.total(name)]))
        out.add_section()
    return out


def ratios(result: Result) -> str:
    """How many times as long optax takes, in one line."""
    plain, above = (result.ratio(above_floor=x) for x in (False, True))
    return f"{result.leaves} leaves: optax / {OURS} = {plain:.1f}; {above:.1f} above the barrier"


def _spread(seconds: Sequence[float]) -> str:
    middle, low, high = (_ms(f(seconds)) for f in (statistics.median, min, max))
    return f"{middle} ({low}..{high})"


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Every round's seconds, for who wants to look closer."""
    return {
        "machine": machine(),
        "trees": [
            {
                "leaves": result.leaves,
                "seconds": result.seconds,
                "optax_over_ours": result.ratio(above_floor=False),
                "optax_over_ours_above_floor": result.ratio(above_floor=True),
            }
            for result in results
        ],
    }


def machine() -> str:
    """What the figures were taken on."""
    return f"{processor()}, jax {jax.__version__}, optax {optax.__version__}"
