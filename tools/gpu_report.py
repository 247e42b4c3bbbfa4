"""One command for a GPU: builds, checks and times this package there, and says what follows.

Needs JAX and NumPy alone, and no network: the machines that have GPUs often have neither a
network nor the packages that other tools here use (hence argparse). What else is there takes
part: optax and torch as peers, pip or cmake for the build.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import os
from pathlib import Path
import shutil
import signal
import sys
import tempfile
import time
from typing import Any, NoReturn

import cli
from gpu_reporting import plan, process
from gpu_reporting.plan import Part
from gpu_reporting.record import Record

ROOT = Path(__file__).parents[1]
END = 6.0
"""Seconds at the end that no part is given: to end what runs, and to write the report."""

EPILOG = """
parts, in order of worth:
{parts}

In DIR it writes report.json (everything), report.md (tables, and a verdict on the defaults) and
report.log (what the parts printed). Each part is a process of its own with a limit in time, and
what it has found is in the files while it runs. The exit status is 0 if every part ended well
and every check held.

Example, on a rented machine, in ten minutes:  python3 tools/gpu_report.py --out "$OUT"
"""


def parser() -> argparse.ArgumentParser:
    parts = "\n".join(f"  {part.name:16} {part.what}" for part in plan.PARTS)
    made = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG.format(parts=parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--minutes", type=float, help="for all of it (default: 9; on a cpu 1)")
    add(
        "--out",
        type=Path,
        default=ROOT / "out" / "gpu_report",
        metavar="DIR",
        help="where the files go (default: out/gpu_report of this checkout)",
    )
    add(
        "--only",
        action="append",
        metavar="PART",
        choices=[part.name for part in plan.PARTS],
        help="this part, and what names the machine; may be given several times",
    )
    add(
        "--device",
        choices=("gpu", "cpu"),
        default="gpu",
        help="cpu: a few small cases, to see that the report works (default: gpu)",
    )
    return made


def environment(part: Part, site: Path, device: str) -> dict[str, str]:
    """What a part runs in: the package that was built, if it was, and the tests' helpers."""
    built = (site / "adamw_xla").is_dir()
    package = [site] if built else [ROOT, ROOT / "lowering"]
    path = [*package, ROOT / "tools", ROOT / "tests" / "helpers", os.environ.get("PYTHONPATH", "")]
    more = {
        "PYTHONPATH": os.pathsep.join(str(x) for x in path if str(x)),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # torch needs its share
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1"),
        # The option decides: neither of these may.
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "",
        "ADAMW_XLA_IMPLEMENTATION": "",
    }
    flags = [os.environ.get("XLA_FLAGS", ""), part.environment.get("XLA_FLAGS", "")]
    return {**os.environ, **part.environment, **more, "XLA_FLAGS": " ".join(filter(None, flags))}


def run_parts(
    parts: Sequence[Part],
    record: Record,
    scratch: Path,
    run: Callable[..., process.Ended] = process.run,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> None:
    """Runs one after the other; whatever becomes of one, the next has its turn."""
    end = clock() + record.minutes * 60 - END
    for i, part in enumerate(parts):
        if (why := _reason_to_skip(part, record)) is not None:
            record.skip(part.name, why)
            say(f"{part.name}: skipped: {why}")
            continue
        others = [p for p in parts[i + 1 :] if _reason_to_skip(p, record) is None]
        limit = plan.limit(part, others, end - clock())
        if limit < 1:
            record.skip(part.name, "no time was left")
            continue
        items, log = scratch / f"{part.name}.items", scratch / f"{part.name}.log"
        record.begin(part.name, limit)
        say(f"{part.name}: {part.what}, for {limit:.0f} s at most")
        command = [sys.executable, *part.command, "--device", record.device]
        command += [
            "--seconds",
            f"{limit:.1f}",
            "--items",
            str(items),
            *_more(part, record, scratch),
        ]
        try:
            ended = run(
                command,
                limit,
                log,
                environment(part, scratch / "site", record.device),
                scratch,
                lambda name=part.name, items=items: record.look(name, items),
            )
        except OSError as error:
            ended = process.Ended("failed", 0.0, [str(error)])
        record.end(part.name, ended, items)
        with (record.out / "report.log").open("a") as whole:
            whole.write(f"\n==== {part.name}: {ended.status} after {ended.seconds:.1f} s\n")
            whole.write(log.read_text(errors="replace") if log.exists() else "")
        say(f"{part.name}: {ended.status} after {ended.seconds:.0f} s")


def _reason_to_skip(part: Part, record: Record) -> str | None:
    if part.needs_gpu and record.device != "gpu":
        return "needs a GPU"
    if part.name in ("build", "machine") or record.device != "gpu":
        return None
    there = record.item("machine", "platform")
    if record.parts.get("machine", {}).get("status") == "failed" and there != "gpu":
        return "JAX finds no GPU"
    return None


def _more(part: Part, record: Record, scratch: Path) -> list[str]:
    """Arguments that depend on what the parts before have found."""
    if part.name == "build":
        return ["--site", str(scratch / "site")]
    crashed = record.parts.get("correct-native", {}).get("status") in ("failed", "timed out")
    # A kernel that kills its process, or never ends, would take the peers' times with it.
    if crashed and "gpu_reporting.steps" in part.command:
        return ["--without", "native"]
    return []


def chosen(only: Sequence[str] | None) -> list[Part]:
    """The parts that were asked for; the machine's name goes with any of them."""
    return [p for p in plan.PARTS if not only or p.name in only or p.name == "machine"]


def all_is_well(whole: dict[str, Any]) -> bool:
    """Whether every part ended well, and every check held."""
    ended = all(part["status"] in ("done", "skipped") for part in whole["parts"].values())
    return ended and not any(whole["verdict"][name]["failed"] for name in ("native", "xla"))


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # so that the part that runs is ended, and the report written


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.minutes is None:
        options.minutes = 9.0 if options.device == "gpu" else 1.0
    if options.minutes <= 0:
        parser().error("--minutes must be positive")
    if problem := cli.folder_problem(options.out):
        parser().error(f"cannot write into {options.out}: {problem}")
    options.out.joinpath("report.log").write_text("")
    before = signal.signal(signal.SIGTERM, _stop)
    record = Record(options.out.resolve(), options.device, options.minutes)
    scratch = Path(tempfile.mkdtemp(prefix="gpu_report."))
    try:
        run_parts(chosen(options.only), record, scratch)
    finally:
        record.stop()
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(scratch, ignore_errors=True)
    print((record.out / "report.md").read_text())
    print(f"report: {record.out}/report.json, report.md, report.log")
    return 0 if all_is_well(record.as_json()) else 1


if __name__ == "__main__":
    sys.exit(main())
