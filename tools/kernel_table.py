"""Prints the README's table of kernels: this package beside optax and keras, ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import cli

with cli.extra("kernel_table", "inspect,peers,gpu-compile,tpu-compile"):
    from inspection import aot, inspect_cases
    from inspection.inspect_cases import OURS, DoesNotFitError, Inspected
    import jax
    import jax.numpy as jnp
    import peer_steps
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    import shapes
    import typer

    from adamw_xla.hlo import size

TARGETS = ["h100", "a100", "b200", "v5e", "v6e"]
CLIPS = ("none", "global")
WHO = (OURS, "optax", "keras")
HEADS = (
    "model",
    "target",
    "kernels",
    "clipped",
    "temporaries",
    "clipped",
    "undonated",
    "compile, s",
    "clipped",
    "M cycles",
    "clipped",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
messages = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the table says about one program."""

    kernels: int
    temporaries: int
    undonated: int
    seconds: float
    cycles: int | None

    @classmethod
    def of(cls, found: Inspected) -> Cell:
        report = found.report
        return cls(
            report.program.count,
            report.temporary_bytes or 0,
            len(report.undonated),
            found.program.compile_seconds,
            report.program.estimated_cycles,
        )


Cells = dict[tuple[str, str], Cell | None]
"""Whose step, and how it clips -> what became of it; None where it does not fit."""


@app.command()
def main(
    targets: Annotated[list[str], typer.Option("--target", help="Which; all.")] = TARGETS,
    models: Annotated[list[str], typer.Option("--model", help="Which; all.")] = [*shapes.MODELS],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="Of params and gradients.")] = "float32",
    repeats: Annotated[
        int, typer.Option(min=1, help="Compile so often; the fewest seconds count.")
    ] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
) -> None:
    """Print the README's table: kernels, temporaries, undonated inputs, compile seconds, cycles.

    Each figure stands for this package / optax / keras. Compiled, not run: cycles are TPU's
    compilers' own estimate. Needs: pip install -e '.\\[inspect,peers,gpu-compile,tpu-compile]'.
    """
    if json_path is not None and (problem := cli.file_problem(json_path)):
        _fail(f"--json {json_path}: cannot be written: {problem}.")
    if unknown := [name for name in targets if name not in aot.TARGETS]:
        _fail(f"--target {unknown[0]}: must be one of {', '.join(aot.TARGETS)}.")
    try:
        for name in targets:
            aot.check(aot.TARGETS[name])
        print("\n".join(markdown({})))
        figures = {}
        for place, cells in _measure(targets, models, dtype, repeats):
            figures[place] = cells
            print(markdown({place: cells})[-1], flush=True)
    except (aot.UnavailableError, inspect_cases.CaseError) as error:
        _fail(str(error))
    if json_path is not None:
        json_path.write_text(json.dumps(_plain(figures), indent=1))


def _fail(message: str) -> NoReturn:
    messages.print(f"kernel_table: {message}", style="red")
    raise typer.Exit(2)


def markdown(figures: dict[tuple[str, str], Cells]) -> list[str]:
    """The table's lines."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for (model, target), cells in figures.items():
        texts = [model, target]
        texts += [_triple(cells, clip, lambda c: str(c.kernels)) for clip in CLIPS]
        texts += [_triple(cells, clip, lambda c: size(c.temporaries)) for clip in CLIPS]
        texts += [_undonated(cells)]
        texts += [_triple(cells, clip, lambda c: f"{c.seconds:.1f}") for clip in CLIPS]
        texts += [_triple(cells, clip, _cycles) for clip in CLIPS]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def _triple(cells: Cells, clip: str, text: Any) -> str:
    found = [cells[who, clip] for who in WHO]
    if not any(found):
        return "does not fit"
    texts = ["–" if cell is None else text(cell) for cell in found]
    return " / ".join(texts) if any(texts) else ""


def _undonated(cells: Cells) -> str:
    found = [[cells[who, clip] for clip in CLIPS] for who in WHO]
    if not any(cell for pair in found for cell in pair):
        return ""
    return " / ".join(str(sum(cell.undonated for cell in pair if cell)) for pair in found)


def _cycles(cell: Cell) -> str:
    return "" if cell.cycles is None else f"{cell.cycles / 1e6:.2f}"


def _measure(
    targets: list[str], models: list[str], dtype: str, repeats: int
) -> Iterator[tuple[tuple[str, str], Cells]]:
    """Yields the cells of each model on each target as soon as they are there."""
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn())
    # The table goes to stdout while the bar stands on stderr.
    options: dict[str, Any] = {"console": messages, "transient": True, "redirect_stdout": False}
    with Progress(*columns, TimeElapsedColumn(), **options) as progress:
        total = len(models) * len(targets) * len(WHO) * len(CLIPS)
        task = progress.add_task("", total=total)
        for target in targets:  # what is loaded at the first use is nobody's time
            aot.compile_for(aot.TARGETS[target], jnp.negative, [jnp.zeros(8)])
        for model, target in itertools.product(models, targets):
            model_shapes = inspect_cases.load_shapes(model)
            cells: Cells = {}
            for clip, who in itertools.product(CLIPS, WHO):
                progress.update(task, description=f"{model} {target} {who} {clip}")
                step = peer_steps.Options(clip=clip)
                case = inspect_cases.optimizer_step(who, model_shapes, dtype, step)
                cells[who, clip] = _cell(case, aot.TARGETS[target], repeats)
                progress.advance(task)
            yield (model, target), cells


def _cell(case: inspect_cases.Case, target: aot.Target, repeats: int) -> Cell | None:
    try:
        cells = []
        for _ in range(repeats):
            jax.clear_caches()  # a program that was compiled already takes no time
            cells.append(Cell.of(inspect_cases.inspect(case, target)))
    except DoesNotFitError as error:
        messages.print(str(error))
        return None
    return min(cells, key=lambda cell: cell.seconds)


def _plain(figures: dict[tuple[str, str], Cells]) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "target": target,
            "who": who,
            "clip": clip,
            **(dataclasses.asdict(cell) if cell else {"fits": False}),
        }
        for (model, target), cells in figures.items()
        for (who, clip), cell in cells.items()
    ]


if __name__ == "__main__":
    app()
