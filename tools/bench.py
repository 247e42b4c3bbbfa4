"""Benchmarks of adamw_xla beside its peers, interleaved in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
import trace_bench
import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Benchmarks of adamw_xla beside its peers, interleaved in one process."""


@app.command()
def trace(
    leaves: Annotated[list[int], typer.Option(min=1, help="Leaves in the tree.")] = [100, 1000],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=2, help="Timed rounds per tree.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Also write all times here.")] = None,
) -> None:
    """Time to trace and lower one optimizer step, from cold caches.

    Beside our step stand optax.adamw with apply_updates, and an identity on
    the same buffers: what jax.jit itself takes for so many leaves.
    """
    trace_bench.run(leaves, repeats, json, Console())


if __name__ == "__main__":
    app()
