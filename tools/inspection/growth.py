"""One train step on more and more devices: what each of them holds, moves and exchanges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any

from inspection import aot, demo_step, inspect_cases, tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator
from rich import box
from rich.table import Table

from adamw_xla.hlo import size

LAYOUTS: Mapping[str, Callable[[int, str | None], demo_step.Options]] = {
    "data": lambda n, sizes: demo_step.Options(f"data={n}", None, sizes),
    "zero1": lambda n, sizes: demo_step.Options(f"data={n}", None, sizes, zero1=True),
    "fsdp": lambda n, sizes: demo_step.Options(f"fsdp={n}", None, sizes),
}
"""How params and state lie on so many devices: whole, the state cut, both cut."""
LABELS = {"data": "data-parallel", "zero1": "ZeRO-1", "fsdp": "FSDP"}
MARKERS = {"data": "o", "zero1": "s", "fsdp": "^"}


@dataclasses.dataclass(frozen=True)
class Point:
    """A program, compiled; figures are of each of its devices, in bytes and in seconds.

    Attributes:
      target: such as ``v5e``.
      devices: how many.
      layout: of ``LAYOUTS``.
      refused: why the compiler refused it, which leaves all that follows at None.
      params: that lie on a device.
      state: of these.
      temporaries: scratch memory.
      buffers: arguments, results and temporaries together.
      moved: from and to main memory in a step.
      exchanged: with other devices in a step.
      traced: seconds until XLA has it.
      compiled: seconds in XLA.
      at_least: whether more is moved or exchanged than that: in loops of unknown length.
    """

    target: str
    devices: int
    layout: str
    refused: str | None = None
    params: int | None = None
    state: int | None = None
    temporaries: int | None = None
    buffers: int | None = None
    moved: int | None = None
    exchanged: int | None = None
    traced: float | None = None
    compiled: float | None = None
    at_least: bool = False


def targets(names: Sequence[str], counts: Sequence[int]) -> list[tuple[aot.Target, int]]:
    """For each number of devices the first target that has a topology of so many.

    Raises:
      UnavailableError: there is none.
    """
    found = []
    for count in counts:
        problems = []
        for target in map(aot.TARGETS.__getitem__, names):
            try:
                aot.devices(target, count)
            except aot.UnavailableError as error:
                problems.append(str(error))
            else:
                found.append((target, count))
                break
        else:
            raise aot.UnavailableError(" ".join(problems))
    return found


def jobs(
    chosen: Sequence[tuple[aot.Target, int]], sizes: str | None
) -> list[tuple[str, aot.Target, int, inspect_cases.Case]]:
    """A step for each layout, built and not compiled; on one device all are the same.

    Raises:
      CaseError: there is no such model on so many devices.
    """
    return [
        (layout, target, count, demo_step.train_step(options(count, sizes), target))
        for target, count in chosen
        for layout, options in list(LAYOUTS.items())[: None if count > 1 else 1]
    ]


def points(layout: str, target: aot.Target, count: int, case: inspect_cases.Case) -> list[Point]:
    """Compiles a step and reads it; of one device it is a point of each layout."""
    layouts = [layout] if count > 1 else list(LAYOUTS)
    try:
        found = inspect_cases.inspect(case, target)
    except inspect_cases.DoesNotFitError as error:
        return [Point(target.name, count, name, refused=str(error)) for name in layouts]
    report = found.report
    runs = [x.times for x in (*report.program.kernels, *report.collectives)]
    figures = (
        report.param_bytes,
        report.state_bytes,
        report.temporary_bytes,
        report.peak_bytes,
        report.program.read + report.program.written,
        tables.exchanged(report),
        found.program.trace_seconds,
        found.program.compile_seconds,
        None in runs,
    )
    return [Point(target.name, count, name, None, *figures) for name in layouts]


# ------------------------------------------------------------------------------ what is shown


def table(found: Sequence[Point]) -> Table:
    """All figures, a line for each program."""
    made = Table(title="of each device, in a step", box=box.SIMPLE_HEAD, padding=0)
    made.add_column("devices", justify="right", no_wrap=True)
    made.add_column("layout")
    heads = ("params", "state", "tempo-\nraries", "all\nbuffers", "moved", "ex-\nchanged")
    for name in (*heads, "trace,\ns", "compile,\ns"):
        made.add_column(name, justify="right", no_wrap=True)
    for number, x in enumerate(found):
        if number and found[number - 1].devices != x.devices:
            made.add_section()
        figures = (x.params, x.state, x.temporaries, x.buffers, x.moved, x.exchanged)
        cells = ["" if n is None else size(n) for n in figures]
        cells[4:] = [f">{cell}" if x.at_least else cell for cell in cells[4:]]
        cells += ["" if t is None else f"{t:.1f}" for t in (x.traced, x.compiled)]
        if x.refused is not None:
            cells[3] = "no room"
        made.add_row(f"{x.devices} {x.target}", x.layout, *cells)
    return made


@dataclasses.dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    figure: Callable[[Point], float | None]
    beside: Callable[[Point], float | None] | None = None
    counts_runs: bool = False


def _kept(x: Point) -> float | None:
    return None if x.params is None or x.state is None else x.params + x.state


PANELS = (
    _Panel("Memory: all buffers (dashed: params and state)", "B", lambda x: x.buffers, _kept),
    _Panel("Moved from and to main memory", "B", lambda x: x.moved, counts_runs=True),
    _Panel("Exchanged with other devices", "B", lambda x: x.exchanged, counts_runs=True),
    _Panel("Time to compile", "s", lambda x: x.compiled),
)


def draw(path: Path, found: Sequence[Point], model: str) -> None:
    """A panel for each figure, over the number of devices."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    figure.suptitle(f"A train step of {model}: bytes of each device, predicted", fontsize=12)
    names = list(dict.fromkeys(x.target for x in found))
    for axes, panel in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        _scales(axes, sorted({x.devices for x in found}), panel)
        for number, layout in enumerate(LAYOUTS):
            for target in names:
                line = [x for x in found if (x.layout, x.target) == (layout, target)]
                # What lies on one another is told apart by its widths.
                style = {"color": f"C{number}", "lw": 3.2 - number, "ms": 9 - 2 * number}
                whole = {"marker": MARKERS[layout], "mfc": None if target == names[0] else "w"}
                _line(axes, line, panel.figure, style | whole)
                if panel.counts_runs:
                    _mark(axes, line, panel.figure, style["color"])
                if panel.beside is not None:
                    short = {"lw": 1.2, "ls": "--", "marker": "_" if len(line) == 1 else ""}
                    _line(axes, line, panel.beside, style | short)
        if panel.beside is None and axes.lines:
            axes.set_ylim(0, 1.07 * axes.dataLim.y1)
    handles = [
        Line2D([], [], color=f"C{i}", marker=MARKERS[layout], label=LABELS[layout])
        for i, layout in enumerate(LAYOUTS)
    ]
    handles += [
        Line2D([], [], ls="", marker="o", color="0.4", mfc="w" if i else None, label=name)
        for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=130)


def _line(
    axes: Axes, line: Sequence[Point], number: Callable[[Point], float | None], style: Any
) -> None:
    there = [(x.devices, y) for x in line if (y := number(x)) is not None]
    if there:
        axes.plot(*zip(*there, strict=True), **style)


def _mark(
    axes: Axes, line: Sequence[Point], number: Callable[[Point], float | None], color: Any
) -> None:
    """Says of what is a lower bound that it is one, as the table does."""
    for x in line:
        if x.at_least and (y := number(x)) is not None:
            offset = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
            axes.annotate(">", (x.devices, y), color=color, **offset)


def _scales(axes: Axes, counts: Sequence[int], panel: _Panel) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    axes.xaxis.set_tick_params(labelbottom=True)
    if axes.get_subplotspec().is_last_row():
        axes.set_xlabel("devices")
    if panel.beside is not None:  # of which one is a small part of the other
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(panel.unit))
    axes.grid(color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
