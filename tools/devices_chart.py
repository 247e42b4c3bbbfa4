"""Draws what a train step costs each device, on more and more of them that are not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, NoReturn

import cli

with cli.extra("devices_chart", "inspect,train"):
    from inspection import aot, demo_step, growth
    from inspection.inspect_cases import CaseError
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    import typer

COUNTS, TARGETS = (1, 4, 8, 16, 32, 64, 128, 256, 512), ("v5e", "v5p")
SIZES = {name: n for name, n in demo_step.SIZES.items() if n}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
output = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


@app.command()
def main(
    plot: Annotated[Path, typer.Option(help="Draw into this file, PNG or SVG.")] = Path(
        "devices.png"
    ),
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers into this file.")
    ] = None,
    devices: Annotated[str, typer.Option(help="How many, as a list such as 1,16,256.")] = ",".join(
        map(str, COUNTS)
    ),
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help=f"What to compile for, of: {', '.join(aot.TARGETS)}. Given several times, each "
            "number of devices is of the first that has so many. Without it "
            f"{' and '.join(TARGETS)}, which has 512.",
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Of the transformer, such as layers=24,width=2048; without it "
            f"{','.join(f'{name}={n}' for name, n in SIZES.items())}."
        ),
    ] = None,
) -> None:
    """Draw what a train step costs each device, against the number of devices.

    Compiles the train step of tools/train_lm.py's transformer with its params whole on each
    device (data-parallel), its state cut (ZeRO-1), and both cut (FSDP): what a device holds,
    moves and exchanges in a step, and how long XLA compiles. Each device has 8 windows of text,
    however many there are. Nothing is run and no TPU is needed: bytes are the compiler's, and
    seconds are measured here. All numbers of devices take a quarter of an hour of one processor.

    pip install -e '.\\[inspect,train,tpu-compile]'

    Examples:

    devices_chart.py --plot devices.png --json devices.json

    devices_chart.py --devices 8,64,256 --sizes layers=24,width=2048
    """
    for option, path in (("--plot", plot), ("--json", json_path)):
        if path is not None and (problem := cli.file_problem(path)):
            _fail(f"{option} {path}: cannot be written: {problem}.")
    if plot.suffix not in (".png", ".svg"):
        _fail(f"--plot {plot}: must end in .png or .svg.")
    counts = _counts(devices)
    names = list(dict.fromkeys(targets or TARGETS))
    for name in names:
        if name not in aot.TARGETS:
            _fail(f"--target {name}: must be one of {', '.join(aot.TARGETS)}.")
    try:
        jobs = growth.jobs(growth.targets(names, counts), sizes)
    except (CaseError, aot.UnavailableError) as error:
        _fail(str(error))
    found: list[growth.Point] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=errors) as progress:
        task = progress.add_task("", total=len(jobs))
        for layout, target, count, case in jobs:
            what = f"{layout} on {count} x {target.name}"
            progress.update(task, description=what)
            found += growth.points(layout, target, count, case)
            progress.advance(task)
    output.print(growth.table(found))
    growth.draw(plot, found, _model(sizes))
    errors.print(f"wrote {plot}")
    if json_path is not None:
        json_path.write_text(json.dumps([dataclasses.asdict(x) for x in found], indent=1) + "\n")
        errors.print(f"wrote {json_path}")


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        _fail(f"--devices {text}: must be numbers of devices, such as 1,16,256.")
    return sorted(set(map(int, parts)))


def _model(sizes: str | None) -> str:
    given = dict(part.split("=") for part in sizes.split(",")) if sizes else {}
    shown = {**SIZES, **given}
    return f"a transformer ({', '.join(f'{name} {n}' for name, n in shown.items())})"


def _fail(message: str, code: int = 2) -> NoReturn:
    errors.print(f"devices_chart: {message}", style="red")
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
