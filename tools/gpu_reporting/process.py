"""Runs one part: a process group with a time limit, whatever it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import os
from pathlib import Path
import signal
import subprocess
import time

GRACE = 3.0
"""Seconds between being asked to end and being killed."""

POLL = 0.2
"""Seconds between two looks at the process."""

TAIL = 25
"""Lines of output that are kept of a part that did not end well."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: "done", "failed" or "timed out"; its last lines unless it is done."""

    status: str
    seconds: float
    tail: list[str]


def run(
    command: Sequence[str],
    limit: float,
    log: Path,
    environment: Mapping[str, str],
    folder: Path,
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> Ended:
    """Runs ``command`` in ``folder`` for ``limit`` seconds at most; its output goes to ``log``.

    ``tick`` is called every so often while it runs. All that it started ends with it.
    """
    start = clock()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            process_group=0,  # what it starts is killed with it; the session stays the caller's
        )
        late = False
        try:
            while process.poll() is None and not late:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
                tick()
                late = process.poll() is None and clock() - start >= limit
        finally:
            _end(process)
    status = "timed out" if late else "done" if process.returncode == 0 else "failed"
    tail = [] if status == "done" else last_lines(log)
    if status == "failed" and process.returncode < 0:
        tail.append(f"(killed by {signal.Signals(-process.returncode).name})")
    return Ended(status, clock() - start, tail)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole group: politely, then not."""
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has gone already
        os.killpg(process.pid, number)


def last_lines(log: Path) -> list[str]:
    """The end of what was printed; long lines are cut."""
    lines = log.read_text(errors="replace").splitlines()
    return [line[:400] for line in lines if line.strip()][-TAIL:]
