"""Benchmarks of adamw_xla beside its peers, interleaved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cli

with cli.extra("bench", "bench"):
    from benches import compile_bench, gpu_peers, jitted, step_bench, step_peers, trace_bench
    from rich.console import Console
    import typer

CASES_HELP = f"Tree(s), of: {', '.join(step_bench.trees())}. Five of them, if none is named."
DTYPES_HELP = "Dtype(s) of the params: float32 (default), bfloat16."
PEERS_HELP = (
    f"Who takes part, of: {', '.join(step_peers.PEERS)}; with --device gpu, of: "
    f"{', '.join(gpu_peers.PEERS)}. All that can, if none is named."
)

CALL_HELP = (
    "How the step is called: with params and state donated or kept, or not jitted. CPUs only."
)
SWEEP_HELP = "Time our own choices instead: launch shapes of the kernel, what is merged. GPUs only."

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Benchmarks of adamw_xla beside its peers, interleaved."""


@app.command()
def trace(
    leaves: Annotated[list[int], typer.Option(min=1, help="Leaves in the tree.")] = [100, 1000],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=2, help="Timed rounds per tree.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Also write all times here.")] = None,
) -> None:
    """Time to trace and lower one optimizer step, from cold caches.

    Beside our step stand optax.adamw with apply_updates, and one barrier on
    the same buffers: what jax.jit itself takes for so many leaves.
    """
    _check_writable(json)
    trace_bench.run(leaves, repeats, json, Console())


@app.command()
def step(
    device: Annotated[step_bench.Device, typer.Option(help="Where to run.")] = "cpu",
    sweep: Annotated[bool, typer.Option(help=SWEEP_HELP)] = False,
    cases: Annotated[list[str] | None, typer.Option("--case", help=CASES_HELP)] = None,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help=DTYPES_HELP)] = None,
    clip: Annotated[bool, typer.Option(help="Clip by the global norm too.")] = False,
    call: Annotated[jitted.Call, typer.Option(help=CALL_HELP)] = "donated",
    peers: Annotated[list[str] | None, typer.Option("--peer", help=PEERS_HELP)] = None,
    rounds: Annotated[int, typer.Option(min=4, help="Timed rounds per case.")] = 15,
    json: Annotated[Path | None, typer.Option(help="Also write all times here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw bars into this PNG.")] = None,
) -> None:
    """Time of one optimizer step, ours beside the peers'.

    Ratios are of medians, with the quartiles of the rounds' own ratios in brackets. The
    identity is what JAX takes to dispatch the same buffers; bandwidth is the ceiling: a plain
    loop that reads and writes what AdamW does, on GPUs a copy of as many bytes. On CPUs each
    peer has a process of its own, with nothing set but what it sets itself; one has its turn
    while the others sleep, of one untimed step and then some. On GPUs 20 steps are timed together.
    """
    _check_writable(json, plot)
    console, kinds = Console(), dtypes or ["float32"]
    step_bench.run(device, sweep, cases, kinds, clip, call, peers, rounds, json, plot, console)


@app.command()
def compile(
    leaves: Annotated[int, typer.Option(min=1, help="Leaves in the tree.")] = 1000,
    repeats: Annotated[int, typer.Option(min=2, help="Timed rounds.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Also write all figures here.")] = None,
) -> None:
    """Time that XLA takes to compile one step, and the peak memory of a train step.

    The train step is a residual MLP of 24 layers that are not scanned, so that every
    gradient is a leaf of its own.
    """
    _check_writable(json)
    compile_bench.run(leaves, repeats, json, Console())


@app.command()
def keras(
    variables: Annotated[int, typer.Option(min=2, help="Trainable variables.")] = 300,
    width: Annotated[int, typer.Option(min=1, help="Width of each layer.")] = 256,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Also write all times here.")] = None,
) -> None:
    """Time to the first step of model.fit, and of each step after it.

    adamw_xla.keras.AdamW beside keras.optimizers.AdamW on the same deep MLP, in turn: fresh
    models from cold caches, then the last two models, step by step.
    """
    _check_writable(json)
    with cli.extra("bench", "bench,keras"):
        from benches import keras_bench  # only here: Keras takes seconds to import

    keras_bench.run(variables, width, rounds, json, Console())


def _check_writable(*paths: Path | None) -> None:
    """Refuses what cannot be written before anything is timed."""
    for path in paths:
        if path is not None and (problem := cli.file_problem(path)):
            raise SystemExit(f"bench: cannot write {path}: {problem}")


if __name__ == "__main__":
    app()
