"""What people see of the table: text, two plots, and all numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
import numpy as np
from rich.console import Console
from rich.table import Table

from parity_runs.arms import CONTROL, LONGER, Arm
from parity_runs.judge import Finding, points
from parity_runs.stress import Check
from parity_runs.table import BEGINNINGS, BETAS, Cell, Trained, verdict
from parity_runs.tasks import Task

Findings = Mapping[str, Sequence[Cell]]
COLORS = {"no worse": "green", "unclear": "yellow", "worse": "red"}


def task_table(task: Task, steps: int, found: Findings) -> Table:
    """One task: of each arm and cell the difference from float32 and its upper limit."""
    made = Table(
        title=f"{task.name}: {steps:,} steps, nats x 1000 beyond float32, "
        "mean over seeds (95 % limit from above)"
    )
    made.add_column("arm")
    control = found[CONTROL.name]
    for cell in control:
        made.add_column(f"{BEGINNINGS[cell.beginning]}\nbeta_2 {cell.beta_2}", justify="right")
    means = [(np.mean(cell.losses), np.std(cell.losses, ddof=1)) for cell in control]
    made.add_row("float32: loss ± over seeds", *(f"{m:.4f} ± {sd:.4f}" for m, sd in means))
    margins = [f"{1e3 * task.margins[cell.beginning]:.1f}" for cell in control]
    made.add_row("margin", *margins, end_section=True)
    for name, cells in found.items():
        if name != CONTROL.name:
            made.add_row(name, *(_colored(cell.against) for cell in cells))
    return made


def _colored(found: Finding) -> str:
    color = COLORS[found.verdict]
    return f"[{color}]{1e3 * found.mean:+.2f} ({1e3 * found.high:+.2f})[/]"


def summary_table(arms: Sequence[Arm], found: Findings, seconds: Mapping[str, float]) -> Table:
    """All tasks: how often each arm was no worse, and how long a step its loss is like."""
    made = Table(title="All tasks")
    for name in ("arm", "state, B/param", "no worse in", "than 1.05 x in"):
        made.add_column(name, justify="left" if name == "arm" else "right")
    made.add_column("as float32 with a rate of", justify="right")
    made.add_column("seconds", justify="right")
    made.add_column("verdict")
    for arm in arms:
        cells, judged = found[arm.name], arm.name != CONTROL.name
        steps = [cell.step for cell in cells if cell.step is not None]
        longer = [cell.against_longer for cell in cells if cell.against_longer]
        color = COLORS[verdict(cells)]
        made.add_row(
            arm.name,
            f"{arm.state:.3g}",
            f"{_no_worse([c.against for c in cells])}/{len(cells)}" if judged else "",
            f"{_no_worse(longer)}/{len(longer)}" if judged and longer else "",
            f"{np.median(steps):.3f}" if judged and steps else "",
            f"{seconds[arm.name]:.0f}",
            f"[{color}]{verdict(cells)}[/]" if judged else "",
        )
    return made


def _no_worse(findings: Sequence[Finding]) -> int:
    return sum(x.verdict == "no worse" for x in findings)


# --------------------------------------------------------------------------------- plots


def draw(
    path: Path, tasks: Sequence[Task], found: Mapping[str, Mapping[str, Trained]], beyond: bool
) -> None:
    """A panel for each cell: mean losses, or what they are beyond float32's, with the margin."""
    columns = len(BEGINNINGS) * len(BETAS)
    figure = Figure(figsize=(3.6 * columns, 2.9 * len(tasks) + 0.9), layout="constrained")
    axes = figure.subplots(len(tasks), columns, squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for column, panel in enumerate(row):
            k, j = divmod(column, len(BETAS))
            control = points(found[task.name][CONTROL.name].losses[:, k, j])
            for number, (name, of_arm) in enumerate(found[task.name].items()):
                curve = points(of_arm.losses[:, k, j])
                middles = (np.arange(curve.shape[-1]) + 0.5) / curve.shape[-1]
                shown = (1e3 * (curve - control) if beyond else curve).mean(0)
                line = "--" if name == LONGER.name else "-"
                panel.plot(middles, shown, line, color=f"C{number}", lw=1.1, label=name)
            if beyond:
                margin = 1e3 * task.margins[k]
                panel.axhline(margin, color="0.4", ls=":", lw=1, label="margin")
                panel.set_yscale("symlog", linthresh=2 * margin)
            # What runs away must not hide the others.
            bottom, top = panel.get_ylim()
            mean = control.mean(0)
            least, most = (-1e3, 1e3) if beyond else (0.95 * mean.min(), 1.05 * mean.max())
            panel.set_ylim(max(bottom, least), min(top, most))
            panel.set_title(f"{task.name}, {BEGINNINGS[k]}, beta_2 {BETAS[j]}", size=9)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("nats x 1000 beyond float32" if beyond else "nats")
    for panel in axes[-1]:
        panel.set_xlabel("share of the steps")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path)


# ---------------------------------------------------------------------------------- JSON


def numbers(
    settings: Mapping[str, Any],
    tasks: Sequence[Task],
    found: Mapping[str, Mapping[str, Trained]],
    findings: Findings,
) -> dict[str, Any]:
    """Everything: settings, margins, each cell with its losses by seed, and the curves."""
    return {
        "settings": dict(settings)
        | {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "margins": {task.name: dict(zip(BEGINNINGS, task.margins, strict=True)) for task in tasks},
        "rates": {task.name: dict(zip(BEGINNINGS, task.rates, strict=True)) for task in tasks},
        "verdicts": {name: verdict(cells) for name, cells in findings.items()},
        "cells": {
            name: [dataclasses.asdict(cell) | {"verdict": cell.against.verdict} for cell in cells]
            for name, cells in findings.items()
        },
        "seconds": {t: {name: x.seconds for name, x in of.items()} for t, of in found.items()},
        "curves": {
            t: {name: points(x.losses).mean(0).tolist() for name, x in of.items()}
            for t, of in found.items()
        },
    }


def write_json(path: Path, whole: Any) -> None:
    """With no more digits than float32 has; what is not finite is null."""
    path.write_text(json.dumps(_plain(whole), indent=1, allow_nan=False) + "\n")


def _plain(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.9g}") if np.isfinite(x) else None
    return x


def stress_table(checks: Sequence[Check]) -> Table:
    """What was found, and what it must be."""
    made = Table(title="Stress")
    for name in ("check", "found", "from", "to"):
        made.add_column(name, justify="left" if name == "check" else "right")
    for check in checks:
        color = "green" if check.passed else "red"
        found = f"[{color}]{check.found:.4g}[/]"
        made.add_row(check.name, found, f"{check.low:.4g}", f"{check.high:.4g}")
    return made


def show(console: Console, made: Table) -> None:
    """Prints a table, and a line below it."""
    console.print(made)
    console.print()
