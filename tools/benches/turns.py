"""Peers that take turns, each in a process of its own, as it runs at its users'.

In one process they would disturb each other: OpenMP's threads spin on for some milliseconds
after torch's step, on the cores of who comes next. Here nobody's settings are touched; whoever
had its turn waits until all its threads sleep, and the others wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import gc
import multiprocessing
from multiprocessing.connection import Connection
import time
from typing import Any

from benches import jitted, step_peers
from benches.timing import no_gc

TURN = 0.15
"""Seconds of steps for each reading of the clock; at least one step, after one untimed."""


class Contestant:
    """One peer's process, as the process sees it that asks it to make steps."""

    def __init__(self, name: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, name), daemon=True)
        self._process.start()
        theirs.close()

    def build(self, *case: Any) -> None:
        """Has it drop what it had, and get ready for (shapes, dtype, clip, call)."""
        self._ask(case)

    def turn(self) -> float:
        """Seconds per step, in one turn."""
        return float(self._ask(None))

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, message: Any) -> Any:
        try:
            self._connection.send(message)
            failed, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            raise SystemExit(f"bench: {self._name}'s process ended with {code}") from None
        if failed:
            raise SystemExit(f"bench: {self._name}: {answer}")
        return answer


@contextlib.contextmanager
def contestants(names: Sequence[str]) -> Iterator[dict[str, Contestant]]:
    """A process for each of these peers of ``step_peers.PEERS``, ended in the end."""
    started: dict[str, Contestant] = {}
    try:
        for name in names:
            started[name] = Contestant(name)
        yield started
    finally:
        for contestant in started.values():
            contestant.close()


def _serve(connection: Connection, name: str) -> None:
    """A contestant's life: gets ready for a case, or has a turn, until nobody asks any more."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    peer: step_peers.Peer | None = None
    with contextlib.suppress(EOFError):
        while True:
            case = connection.recv()
            try:
                if case is not None:
                    peer = None
                    gc.collect()
                    peer = _built(name, *case)
                    answer: Any = None
                else:
                    assert peer is not None
                    answer = _timed(peer)
                _rest()
            except Exception as error:  # the other side says so, and ends all
                connection.send((True, f"{type(error).__name__}: {error}"))
            else:
                connection.send((False, answer))


def _built(
    name: str, shapes: list[tuple[int, ...]], dtype: str, clip: bool, call: jitted.Call
) -> step_peers.Peer:
    grads = step_peers.make_grads(shapes, dtype)
    build = step_peers.peers(call)[name]
    peer = build(shapes, dtype, grads, clip)
    peer.run(1)
    return peer


def _timed(peer: step_peers.Peer) -> float:
    """Seconds per step: each is waited for, as one is that a loss is read after."""
    with no_gc():
        peer.run(1)
        steps, start = 0, time.perf_counter()
        while not steps or time.perf_counter() - start < TURN:
            peer.run(1)
            steps += 1
        return (time.perf_counter() - start) / steps


def _rest() -> None:
    """Waits until this process' threads sleep."""
    while True:
        before = time.process_time()
        time.sleep(0.02)
        if time.process_time() - before < 0.002:
            return
