"""``bench.py step``: one optimizer step, ours beside the peers', interleaved."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import gc
from importlib.util import find_spec
import json
import math
import os
from pathlib import Path
import platform
import statistics
import time
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
import shapes
import step_peers

import adamw_xla as ax


@dataclasses.dataclass(frozen=True)
class Case:
    """One tree, dtype and clipping."""

    name: str
    shapes: list[tuple[int, ...]]
    dtype: str = "float32"
    clip: bool = False

    @property
    def least_bytes(self) -> int:
        """What a step must read and write: param and moments twice, the gradient once."""
        width = np.dtype(self.dtype).itemsize
        return sum(map(math.prod, self.shapes)) * (3 * width + 4 * 4)

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}{' clip' if self.clip else ''}"


def trees() -> dict[str, list[tuple[int, ...]]]:
    """The trees that can be asked for, by name."""
    million, k = 1 << 20, 1 << 10
    return {
        "16x4M": [(4 * million,)] * 16,
        "16x32k": [(32 * k,)] * 16,  # stays in the cache, if few take part
        "gpt2-small": list(shapes.MODELS["gpt2-small"]().values()),
        "400x64k": [(64 * k,)] * 400,
        "1000x1k": [(k,)] * 1000,
    }


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds per step of every peer, round by round."""

    case: Case
    seconds: dict[str, list[float]]

    def median(self, peer: str) -> float:
        return statistics.median(self.seconds[peer])

    def ratio(self, peer: str, ours: str, floor: str | None = None) -> tuple[float, float, float]:
        """Ratio of medians, and the quartiles of the rounds' own ratios."""
        off = self.seconds[floor] if floor else [0.0] * len(self.seconds[ours])
        rounds = [
            (theirs - base) / (mine - base)
            for theirs, mine, base in zip(self.seconds[peer], self.seconds[ours], off, strict=True)
            if mine > base
        ]
        base = statistics.median(off)
        low, _, high = statistics.quantiles(rounds, n=4)
        return (self.median(peer) - base) / (self.median(ours) - base), low, high


def measure(case: Case, peers: list[str], rounds: int, progress: Progress) -> Result:
    """Times every peer once per round, in an order that rotates."""
    grads = step_peers.make_grads(case.shapes, case.dtype)
    built = {
        name: step_peers.PEERS[name](case.shapes, case.dtype, grads, case.clip) for name in peers
    }
    for peer in built.values():
        for _ in range(2):
            peer.step()
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    task = progress.add_task(case.label, total=rounds)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in peers[i % len(peers) :] + peers[: i % len(peers)]:
                start = time.perf_counter()
                built[name].step()
                seconds[name].append(time.perf_counter() - start)
            progress.advance(task)
    finally:
        gc.enable()
    return Result(case, seconds)


def machine() -> str:
    """What the figures were taken on."""
    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()}, {cores} cores, jax {jax.__version__}"


def table(results: list[Result], ours: str) -> Table:
    """A row per case and peer: its time, in units of ours, its rate and share of the bandwidth."""
    out = Table(title=f"One step: medians, and ratios to {ours} ({machine()})", box=SIMPLE_HEAD)
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


def as_json(results: list[Result], ours: str) -> dict[str, Any]:
    """Every round's seconds, for who wants to look closer."""
    rows = []
    for result in results:
        moved = step_peers.bytes_moved(result.case.shapes, result.case.dtype)
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
    return {"machine": machine(), "ours": ours, "cases": rows}


def run(
    cases: list[str] | None,
    dtypes: list[str],
    clip: bool,
    peers: list[str] | None,
    rounds: int,
    json_path: Path | None,
    plot_path: Path | None,
    console: Console,
) -> None:
    """The command: measures, prints, and writes what was asked for."""
    known = trees()
    chosen = [
        Case(name, _pick(known, name, "case"), dtype, with_clip)
        for name in cases or known
        for dtype in dtypes
        for with_clip in ([False, True] if clip else [False])
    ]
    names = [name for name in peers or _able() if _pick(step_peers.PEERS, name, "peer")]
    ours = "native" if "native" in names else "xla"
    if ours not in names:
        names.insert(0, ours)
    results = []
    with Progress(console=console, transient=True) as progress:
        for case in chosen:
            results.append(measure(case, names, rounds, progress))
            gc.collect()
    console.print(table(results, ours))
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(results, ours), indent=1))
    if plot_path is not None:
        plot(results, ours, plot_path)


def _pick(known: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in known:
        raise SystemExit(f"bench: no {what} {name!r}; choose from {', '.join(known)}")
    return known[name]


def _able() -> list[str]:
    """Everyone whose library is here."""
    missing = {peer for peer in ("keras", "torch") if find_spec(peer) is None}
    if not ax.native_available():
        missing.add("native")
    return [peer for peer in step_peers.PEERS if peer not in missing]


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
