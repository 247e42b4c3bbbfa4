"""``bench.py step``: one optimizer step, ours beside the peers', interleaved."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import gc
from importlib.util import find_spec
import json
from pathlib import Path
import shutil
from typing import Any, Literal, TypeAlias

from benches import gpu_peers, step_cases, step_peers, turns
from benches.jitted import Call
from benches.step_cases import CASES, STEPS, Case, Result, trees
from benches.step_peers import Build
from benches.timing import processor
from benches.turns import Contestant
import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import adamw_xla as ax

Device: TypeAlias = Literal["cpu", "gpu"]

HOW = {
    "cpu": "each peer in a process of its own, at its defaults and with all cores",
    "gpu": "all in one process, in turn",
}
"""Said below the table: how everybody runs."""


def measure(
    case: Case, peers: Mapping[str, Build], rounds: int, steps: int, progress: Progress
) -> Result:
    """Builds the peers and times them, in turn."""
    built = step_cases.build(case, peers)
    task = progress.add_task(case.label, total=rounds)
    return step_cases.time_rounds(case, built, rounds, steps, lambda: progress.advance(task))


def measure_apart(
    case: Case, peers: Mapping[str, Contestant], rounds: int, progress: Progress
) -> Result:
    """The same on CPUs, where each peer has a process of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    task = progress.add_task(case.label, total=rounds + 1)
    for peer in peers.values():
        peer.build(case.shapes, case.dtype, case.clip, case.call)
    for i in range(rounds):
        progress.advance(task)
        for name in _rotated(list(peers), i):
            seconds[name].append(peers[name].turn())
    progress.advance(task)
    return Result(case, seconds)


def _rotated(names: list[str], i: int) -> list[str]:
    """Another one begins each round."""
    return names[i % len(names) :] + names[: i % len(names)]


def machine() -> str:
    """What the figures were taken on."""
    device = jax.devices()[0]
    where = processor() if device.platform == "cpu" else device.device_kind
    return f"{where}, jax {jax.__version__}"


def table(results: list[Result], ours: str, how: str = "") -> Table:
    """A row per case and peer: its time, in units of ours, its rate and share of the bandwidth."""
    title = f"One step: medians, and ratios to {ours} ({machine()})"
    out = Table(title=title, caption=how, box=SIMPLE_HEAD)
    for heading in ("case", "peer", "ms", f"× {ours}", "× less identity", "GB/s", "of bandwidth"):
        out.add_column(heading, justify="left" if heading in ("case", "peer") else "right")
    for result in results:
        for i, peer in enumerate(result.seconds):
            out.add_row(
                result.case.label if i == 0 else "",
                peer,
                f"{result.median(peer) * 1e3:.2f}",
                _ratio(result, peer, ours),
                _ratio(result, peer, ours, "identity"),
                "" if peer == "identity" else f"{_rate(result, peer):.0f}",
                _share(result, peer),
            )
        out.add_section()
    return out


def _ratio(result: Result, peer: str, ours: str, floor: str | None = None) -> str:
    if peer in (ours, floor) or (floor and floor not in result.seconds):
        return ""
    ratio, low, high = result.ratio(peer, ours, floor)
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}]"


def _rate(result: Result, peer: str) -> float:
    """Of the bytes that must be moved: one who moves more has a lower rate."""
    return result.case.least_bytes / result.median(peer) / 1e9


def _share(result: Result, peer: str) -> str:
    if "bandwidth" not in result.seconds or peer == "identity":
        return ""
    return f"{result.median('bandwidth') / result.median(peer):.0%}"


def as_json(results: list[Result], ours: str, how: str = "") -> dict[str, Any]:
    """Every round's seconds, for who wants to look closer."""
    rows = []
    for result in results:
        moved = result.case.least_bytes
        rows.append(
            {
                "case": result.case.label,
                "seconds": result.seconds,
                "gigabytes_per_second": {
                    peer: moved / result.median(peer) / 1e9 for peer in result.seconds
                },
                "ratios": {peer: result.ratio(peer, ours) for peer in result.seconds},
            }
        )
    return {"machine": machine(), "how": how, "ours": ours, "cases": rows}


def run(
    device: Device,
    sweep: bool,
    cases: list[str] | None,
    dtypes: list[str],
    clip: bool,
    call: Call,
    peers: list[str] | None,
    rounds: int,
    json_path: Path | None,
    plot_path: Path | None,
    console: Console,
) -> None:
    """The command: measures, prints, and writes what was asked for."""
    known, everyone = trees(), _everyone(device, sweep, call)
    chosen = [
        Case(name, _pick(known, name, "case"), dtype, with_clip, call)
        for name in cases or CASES[device]
        for dtype in dtypes
        for with_clip in ([False, True] if clip else [False])
    ]
    names = peers or [name for name in everyone if _able(name)]
    taking_part = {name: _pick(everyone, name, "peer") for name in names}
    if unable := [name for name in names if not _able(name)]:
        raise SystemExit(f"bench: {unable[0]} cannot run here; {_NEEDED[unable[0]]}")
    if plot_path is not None and find_spec("matplotlib") is None:
        raise SystemExit("bench: --plot needs matplotlib: pip install -e '.[demo]'")
    ours = "native" if "native" in taking_part else "xla"
    taking_part = {ours: everyone[ours]} | taking_part
    results = []
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(console=console, transient=True))
        if device == "cpu":
            apart = stack.enter_context(turns.contestants(list(taking_part)))
        for case in chosen:
            if device == "cpu":
                results.append(measure_apart(case, apart, rounds, progress))
            else:
                results.append(measure(case, taking_part, rounds, STEPS, progress))
            gc.collect()
    console.print(table(results, ours, HOW[device]))
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(results, ours, HOW[device]), indent=1))
    if plot_path is not None:
        plot(results, ours, plot_path)


def _everyone(device: Device, sweep: bool, call: Call) -> Mapping[str, Build]:
    """Who can be asked for there; makes it the device that JAX uses."""
    if sweep and device == "cpu":
        raise SystemExit("bench: --sweep is for GPUs; add --device gpu")
    if call != "donated" and device == "gpu":
        raise SystemExit("bench: --call is for CPUs; on GPUs every step is donated")
    jax.config.update("jax_platforms", "cpu" if device == "cpu" else "cuda,cpu")
    if device == "cpu":
        return step_peers.peers(call)
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        raise SystemExit(
            f"bench: JAX finds no GPU ({error}); on a machine with one: pip install 'jax[cuda12]'"
        ) from None
    return gpu_peers.SWEEP if sweep else gpu_peers.PEERS


def _pick(known: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in known:
        raise SystemExit(f"bench: no {what} {name!r}; choose from {', '.join(known)}")
    return known[name]


def _able(peer: str) -> bool:
    """Whether all is here that this peer needs."""
    if jax.default_backend() == "cpu" and peer in ("native", "bandwidth"):
        return ax.native_available() if peer == "native" else shutil.which("cc") is not None
    return peer not in ("keras", "torch") or find_spec(peer) is not None


_NEEDED = {
    "native": "the CPU kernel was not built",
    "bandwidth": "it is compiled by cc, which is not there",
    "keras": "pip install -e '.[peers]'",
    "torch": "pip install -e '.[peers]'",
}
"""What is missing where a peer is not able."""


def plot(results: list[Result], ours: str, path: Path) -> None:
    """Bars: each peer's time in units of ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    peers = [peer for peer in results[0].seconds if peer != "identity"]
    figure, axes = plt.subplots(figsize=(1.8 + 1.9 * len(results), 4.2), layout="constrained")
    width = 0.8 / len(peers)
    for k, peer in enumerate(peers):
        x = [i + (k - (len(peers) - 1) / 2) * width for i in range(len(results))]
        heights, spread = [], []
        for result in results:
            ratio, low, high = result.ratio(peer, ours)
            heights.append(ratio)
            spread.append((max(ratio - low, 0), max(high - ratio, 0)))
        axes.bar(x, heights, width, label=peer, yerr=list(zip(*spread, strict=True)), capsize=2)
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_xticks(range(len(results)), [r.case.label.replace(" ", "\n") for r in results])
    axes.set_ylabel(f"time of one step / time of {ours}")
    axes.set_title(machine(), fontsize=9)
    axes.legend(ncols=len(peers), fontsize=8)
    figure.savefig(path, dpi=130)
