"""Starts several processes that work together on this machine, and leaves none behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

from places import python_path

PATIENCE = 300.0
"""Seconds in which they must be done, on a machine that others use too."""


def run(
    program: Path, job: str, processes: int, folder: Path, patience: float = PATIENCE
) -> list[str]:
    """Runs ``program JOB PROCESS PROCESSES PORT FOLDER`` in so many processes.

    Args:
      program: a Python file.
      job: its first argument.
      processes: how many.
      folder: where they may write, and their outputs are kept.
      patience: seconds after which they are killed.

    Returns:
      What each printed.

    Raises:
      RuntimeError: one failed, whereupon the others are killed, or they took too long.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()}
    env.pop("XLA_FLAGS", None)
    logs = [folder / f"{job}-{i}-of-{processes}.txt" for i in range(processes)]
    started: list[subprocess.Popen[bytes]] = []
    with _free_port() as port:
        try:
            for i, log in enumerate(logs):
                arguments = [job, str(i), str(processes), str(port), str(folder)]
                command = [sys.executable, str(program), *arguments]
                started.append(_start(command, env, log))
            codes = _ended(started, patience)
        finally:
            for process in started:
                kill(process)
    texts = [log.read_text() for log in logs]
    if codes != [0] * processes:
        ends = [
            f"process {i} {'was killed' if code is None else f'ended with {code}'}:\n{text[-3000:]}"
            for i, (code, text) in enumerate(zip(codes, texts, strict=True))
        ]
        raise RuntimeError("\n".join(ends))
    return texts


def _start(command: Sequence[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """A port that no one else gets meanwhile: it is taken, and gRPC shares what is so taken."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def _ended(started: Sequence[subprocess.Popen[bytes]], patience: float) -> list[int | None]:
    """The exit codes, once all have ended or one has failed; None of those that still run."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        codes = [process.poll() for process in started]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.1)
    return [process.poll() for process in started]
