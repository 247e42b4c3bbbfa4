"""The report as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpu_reporting import plan
from gpu_reporting.verdict import (
    DECIDES,
    Item,
    Whole,
    items,
    keeps_another_state,
    median,
    ratio,
    timed,
)

ORDER = (
    "native",
    "xla",
    "by leaf",
    "optax",
    "native words",
    "xla words",
    "torch",
    "identity",
    "bandwidth",
)
SHOWN = {"bandwidth": "copy", "torch": "torch fused"}
"""How peers are called on the page."""

TITLES = {
    DECIDES: "One step, on the device alone",
    "steps": "One call",
    "steps-no-graphs": "One call, command buffers off",
}
"""The parts that have a table of times."""

HOW = (
    "Medians of calls one after the other. identity is what JAX takes to dispatch the same buffers:"
    " where it takes nearly as long, that is what was measured. Nothing is decided by this table.",
    "Medians of steps in a loop on the device, less JAX's dispatch of the loop; torch's from their"
    " first kernel on, all queued before. The verdict is drawn from this table.",
)
"""How times were taken: of calls; on the device alone."""


def markdown(whole: Whole) -> str:
    """The whole page, of whatever is there."""
    machine = _merged(items(whole, "machine"))
    name = machine.get("device", f"{whole['asked_for']}: device not known yet")
    blocks = [
        f"# adamw_xla on {name}",
        _about(whole, machine),
        "## Verdict",
        *_verdict(whole),
        "## Agreement with float64",
        *_agreement(whole),
    ]
    for part, title in TITLES.items():
        if timed(whole, part):
            blocks += [f"## {title}", _steps(whole, part), HOW[part == DECIDES]]
            blocks += _notes(whole, part)
    if whole["verdict"]["without_command_buffers"]:
        blocks += ["## What command buffers save", _graphs(whole)]
    for key, title in (("launches", "Launch shapes"), ("merging", "What is merged")):
        if whole["verdict"][key]:
            blocks += [f"## {title}", _sweep(whole["verdict"][key])]
    blocks += _notes(whole, "sweep")
    blocks += ["## Parts", *_parts(whole)]
    return "\n\n".join(blocks) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown's; the first column is text."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _merged(found: list[Item]) -> dict[str, Any]:
    return {key: value for item in found for key, value in item.items()}


def _about(whole: Whole, machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    build = _merged(items(whole, "build"))
    built = f"package built by {build['way']}" if build.get("way") else "package not built"
    said = [f"{whole['started']}, {whole['minutes']:g} minutes asked for", versions, built]
    said += [machine.get("driver", ""), machine.get("system", "")]
    return ". ".join(x for x in said if x) + "."


def _verdict(whole: Whole) -> list[str]:
    v = whole["verdict"]
    if whole["asked_for"] != "gpu":
        return ["None: this is not a GPU; the figures only show that the report works."]
    said = [f'- "native" by default: {"yes" if v["native_by_default"] else "no"}.']
    if v["faster_on_every_case"]:
        said.append(f"- It is faster than xla and optax in all {v['cases_timed']} cases.")
    for loss in v["losses"]:
        middle, low, high = loss["times_as_long"]
        said.append(
            f"- It loses to {loss['rival']} in {loss['case']}, which takes {middle:.3f} times its"
            f" time [{low:.3f}, {high:.3f}]."
        )
    if v["of_another_state"]:
        said.append(f"- Not compared, as the state is another: {', '.join(v['of_another_state'])}.")
    if v["cases_without_a_comparison"]:
        said.append(f"- No comparison in: {', '.join(v['cases_without_a_comparison'])}.")
    if not v["cases_timed"]:
        said.append("- No case has been timed.")
    for key, constant in (("launches", "LAUNCHES"), ("merging", "MAX_MERGED_ELEMENTS")):
        if found := v[key]:
            gain = 1 - found["means"][found["best"]] / found["means"][found["current"]]
            said.append(
                f"- {constant}: {found['best']} is best over all trees, {gain:.1%} quicker than"
                f" {found['current']}, which is in use."
            )
    return ["\n".join(said)]


def _agreement(whole: Whole) -> list[str]:
    rows, problems = [], []
    for name in ("native", "xla"):
        found = whole["verdict"][name]
        rows.append(
            [name, *(str(found[k]) for k in ("planned", "made")), str(len(found["failed"]))]
            + [found["status"]]
        )
        for item in items(whole, f"correct-{name}"):
            if item.get("problem"):
                problems.append(f"- {item['check']}: {item['problem'][:300]}")
            if "skipped" in item:
                problems.append(f"- {name}: skipped: {item['skipped']}")
    out = [table(["", "planned", "made", "failed", "part"], rows)]
    return out + (["\n".join(problems)] if problems else [])


def _names(found: list[Item]) -> list[str]:
    there = {name for item in found for name in item["seconds"]}
    return [*(n for n in ORDER if n in there), *sorted(there - {*ORDER})]


def _steps(whole: Whole, part: str) -> str:
    """Milliseconds, and how many times as long as ours, with the quartiles."""
    found = timed(whole, part)
    names = _names(found)
    ours = names[0]
    rows = []
    for item in found:
        cells = []
        for name in names:
            seconds, against = median(item, name), ratio(item, name, ours)
            cell = "" if seconds is None else f"{seconds * 1e3:.3f}"
            if against is not None and name != ours:
                cell += f" ({against[0]:.2f} [{against[1]:.2f}, {against[2]:.2f}])"
                cell += "*" * keeps_another_state(item, name, ours)
            cells.append(cell)
        rate = item["least_bytes"] / (median(item, ours) or float("inf")) / 1e9
        rows.append([item["case"], *cells, f"{rate:.0f}"])
    heads = [SHOWN.get(name, name) for name in names]
    text = table(["ms", *heads, f"GB/s of {ours}"], rows)
    return (
        text
        + f"\n\nIn parentheses, in units of {ours}'s time, the ratio of medians and the quartiles"
        " of the rounds' own ratios; * keeps a state of another size, and moves other bytes. copy"
        f" reads and writes as many bytes as a step of {ours} must."
    )


def _notes(whole: Whole, part: str) -> list[str]:
    """What is missing from a table, and why."""
    said = []
    for item in items(whole, part):
        if "skipped" in item:
            said.append(f"- {item.get('case', part)}: skipped: {item['skipped']}")
        for name, problem in item.get("failed", {}).items():
            said.append(f"- {item['case']}: {name} failed: {problem}")
    return ["\n".join(said)] if said else []


def _graphs(whole: Whole) -> str:
    found = whole["verdict"]["without_command_buffers"]
    there = {name for row in found.values() for name in row}
    names = [n for n in ORDER if n in there]
    rows = [
        [case, *(f"{row[n]:.2f}" if n in row else "" for n in names)] for case, row in found.items()
    ]
    heads = [SHOWN.get(name, name) for name in names]
    return table(["time without them / with them", *heads], rows)


def _sweep(found: dict[str, Any]) -> str:
    """Rows are variants, the best first; figures are in units of what is in use."""
    cases = list(found["trees"])
    names = [*found["means"]]
    names += sorted({n for row in found["trees"].values() for n in row} - {*names})
    rows = []
    for name in names:
        mean = found["means"].get(name)
        cells = [
            f"{found['trees'][c][name]:.3f}" if name in found["trees"][c] else "" for c in cases
        ]
        rows.append([name, "" if mean is None else f"{mean:.3f}", *cells])
    return table([f"time / {found['current']}'s", "all", *cases], rows)


def _parts(whole: Whole) -> list[str]:
    about = {part.name: part.what for part in plan.PARTS}
    rows, tails = [], []
    for name, part in whole["parts"].items():
        spent = f"{part['seconds']:.0f} of {part['limit']:.0f}" if "seconds" in part else ""
        status = part["status"] + (f": {part['why']}" if "why" in part else "")
        rows.append([name, about.get(name, ""), spent, status])
        if part.get("tail"):
            tails.append(f"{name} ended with:\n\n```\n" + "\n".join(part["tail"]) + "\n```")
    return [table(["part", "what", "seconds", "status"], rows), *tails]
