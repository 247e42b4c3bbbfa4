"""What the parts that are Python have in common: arguments, a deadline, and items as they come."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import contextlib
import dataclasses
import faulthandler
import json
import os
from pathlib import Path
import sys
import time
from typing import Any, NoReturn

DEVICES = ("gpu", "cpu")
RESERVE = 0.12
"""The share of its time that a part leaves unused, so that it ends before it is killed."""


@dataclasses.dataclass(frozen=True)
class Child:
    """One part, seen from inside.

    Attributes:
      device: "gpu" or "cpu".
      until: when to stop, by ``time.monotonic``.
      items: the file that takes a line for each thing that is done.
      options: what else it was told.
    """

    device: str
    until: float
    items: Path
    options: argparse.Namespace

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def write(self, **item: Any) -> None:
        """Hands over one item, for good: the report has it whatever comes."""
        with self.items.open("a") as file:
            file.write(json.dumps(item) + "\n")
        print(json.dumps(item)[:300], flush=True)


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> Child:
    """Reads the arguments. A part that hangs says where, shortly before it is killed."""
    parser.add_argument("--device", choices=DEVICES, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--items", type=Path, required=True)
    options = parser.parse_args(argv)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(options.seconds - 1.5, 0.1))
    until = time.monotonic() + options.seconds * (1 - RESERVE)
    return Child(options.device, until, options.items, options)


def leave() -> NoReturn:
    """Ends the process well, and with it compilers that still run and that nobody waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def use_device(child: Child) -> Any:
    """The device that JAX is made to use; SystemExit where it is not there."""
    import jax

    jax.config.update("jax_platforms", "cpu" if child.device == "cpu" else "cuda,cpu")
    try:
        # By name: of several platforms, JAX passes over in silence what it does not find.
        return jax.devices("cpu" if child.device == "cpu" else "cuda")[0]
    except RuntimeError as error:
        raise SystemExit(f"JAX finds no GPU: {error}") from None


def read_items(path: Path) -> list[dict[str, Any]]:
    """What has been written so far; a line that is being written is left for later."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found
