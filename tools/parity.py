"""Whether training with 16 bits of optimizer state per param is as good as with float32 state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
import sys
import time
from typing import Annotated, NoReturn

import cli

with cli.extra("parity", "demo,train"):
    from parity_runs import page
    from parity_runs.arms import ARMS, CONTROL, Arm
    from parity_runs.stress import PARTS, Check
    from parity_runs.table import Size, cells, train, verdict
    from parity_runs.tasks import TASKS, Task
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    import typer

FULL, QUICK, QUICK_TASK = Size(seeds=5), Size(seeds=3, share=0.05), "digits"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the plots and the JSON.")] = Path("out"),
    task: Annotated[
        list[str] | None, typer.Option(help=f"Of: {', '.join(TASKS)}. All, if none is named.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Beside float32, of: {'; '.join(list(ARMS)[1:])}. All, if none is named."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Of params and batches: 5, or 3 if quick.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One task, few steps, no peers: that it runs, no more.")
    ] = False,
    stress: Annotated[
        bool, typer.Option("--stress", help="Instead: 20,000 steps, and gradients of all kinds.")
    ] = False,
) -> None:
    """Show whether training with 16 bits of optimizer state is as good as with float32.

    Trains small models on data that packages ship, from random params and as in fine-tuning, at
    beta_2 0.999 and 0.95, with the state held in several ways; seeds are paired. An arm is "no
    worse" in a cell if the 95 % limit of what it loses on float32 is below a margin that was set
    beforehand, from float32 alone. Exits with 1 if an arm of this package is worse, or
    if a check of --stress fails.
    """
    tasks = [TASKS[x] for x in _known("--task", task, TASKS, [QUICK_TASK] if quick else None)]
    shortest = [x.name for x in ARMS.values() if x.kind != "peer"]
    arms = [ARMS[x] for x in _known("--arm", arm, ARMS, shortest if quick else None)]
    if stress and (task or arm or seeds):
        _fail("--stress takes no --task, --arm or --seeds: it has its own")
    if problem := cli.folder_problem(out):
        _fail(f"cannot write to {out}: {problem}")
    if stress:
        _stress(out, quick)
        return
    size = QUICK if quick else FULL
    size = dataclasses.replace(size, seeds=seeds or size.seeds)
    _table(out, tasks, [CONTROL, *(x for x in arms if x is not CONTROL)], size)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"parity: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _known(
    option: str, given: list[str] | None, there: dict[str, object], default: list[str] | None
) -> list[str]:
    names = given or default or list(there)
    for name in names:
        if name not in there:
            _fail(f"{option}: {name!r} is none of {', '.join(there)}")
    return list(dict.fromkeys(names))


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _table(out: Path, tasks: list[Task], arms: list[Arm], size: Size) -> None:
    since, found = time.perf_counter(), {}
    with _progress() as progress:
        for task in tasks:
            bar = progress.add_task(task.name, total=(len(arms) + 1) * size.steps(task))

            def tick(arm: str, steps: int, name: str = task.name, bar: object = bar) -> None:
                progress.update(bar, advance=steps, description=f"{name}, {arm}")

            found[task.name] = train(task, arms, size, tick)
            progress.update(bar, description=task.name)
    seconds = time.perf_counter() - since
    by_task = {task.name: cells(task, found[task.name]) for task in tasks}
    all_cells = {x.name: [c for task in tasks for c in by_task[task.name][x.name]] for x in arms}
    for task in tasks:
        page.show(console, page.task_table(task, size.steps(task), by_task[task.name]))
    spent = {x.name: sum(found[task.name][x.name].seconds for task in tasks) for x in arms}
    page.show(console, page.summary_table(arms, all_cells, spent))
    settings = {"seeds": size.seeds, "share of the steps": size.share, "seconds": seconds}
    page.draw(out / "parity_losses.svg", tasks, found, beyond=False)
    page.draw(out / "parity_differences.svg", tasks, found, beyond=True)
    page.write_json(out / "parity.json", page.numbers(settings, tasks, found, all_cells))
    names = "parity_losses.svg, parity_differences.svg, parity.json"
    console.print(f"{seconds:.0f} s; wrote {names} in {escape(str(out))}", soft_wrap=True)
    if worse := [
        x.name for x in arms if x.kind == "ours" and verdict(all_cells[x.name]) == "worse"
    ]:
        _fail(f"worse than float32: {'; '.join(worse)}", code=1)


def _stress(out: Path, quick: bool) -> None:
    checks: list[Check] = []
    with _progress() as progress:
        bar = progress.add_task("stress", total=len(PARTS))
        for name, part in PARTS.items():
            progress.update(bar, description=name)
            checks += part(quick)
            progress.advance(bar)
    page.show(console, page.stress_table(checks))
    page.write_json(out / "parity_stress.json", [check.as_dict() for check in checks])
    console.print(f"wrote {escape(str(out / 'parity_stress.json'))}", soft_wrap=True)
    if failed := [check.name for check in checks if not check.passed]:
        _fail(f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}", code=1)


if __name__ == "__main__":
    app()
