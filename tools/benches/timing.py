"""What the benches' clocks share."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import gc
import os
import platform


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    """No pauses for garbage inside of what is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def processor() -> str:
    """What Python runs on, and how much of it."""
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
