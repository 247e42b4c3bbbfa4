"""The parts of the report, in order of worth, and how the time is shared among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses

GRAPHS_OFF = "--xla_gpu_enable_command_buffer="
"""With an empty list XLA:GPU replays nothing as a CUDA graph (seen in jaxlib 0.11.2 and 0.12.0,
whose dumps then lack a thunk sequence with command buffers; 0.10.2 takes the flag too)."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the report.

    Attributes:
      name: what ``--only`` takes.
      what: one line for people.
      share: its part of the time, in seconds of nine minutes; what one leaves, the next have.
      command: arguments to Python; the report appends where items go, and its limits.
      environment: variables of its own.
      needs_gpu: it says nothing about other devices.
    """

    name: str
    what: str
    share: float
    command: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs_gpu: bool = False


def _module(name: str, *arguments: str) -> list[str]:
    return ["-m", f"gpu_reporting.{name}", *arguments]


PARTS = (
    Part("build", "builds the package from this checkout, without a network", 50, _module("build")),
    Part("machine", "which device, driver and versions these are", 40, _module("machine")),
    Part(
        "correct-native",
        'the kernel ("native") on the device, against float64',
        50,
        _module("correct", "--implementation", "native"),
    ),
    Part(
        "correct-xla",
        'StableHLO ("xla") on the device, against float64',
        50,
        _module("correct", "--implementation", "xla"),
    ),
    Part(
        "steps-looped",
        "times of a step on the device alone, ours beside the peers'",
        150,
        _module("steps", "--form", "looped"),
    ),
    Part(
        "sweep",
        "launch shapes of the kernel, and which leaves are merged, on the device alone",
        80,
        _module("steps", "--form", "sweep"),
        needs_gpu=True,
    ),
    Part("steps", "times of one call, with JAX's dispatch", 70, _module("steps")),
    Part(
        "steps-no-graphs",
        "the same times with XLA's command buffers off",
        50,
        _module("steps"),
        {"XLA_FLAGS": GRAPHS_OFF},
        needs_gpu=True,
    ),
)


def limit(part: Part, others: Sequence[Part], left: float) -> float:
    """Seconds for ``part``, when so many are left for it and the others that will be run."""
    return left * part.share / sum(p.share for p in (part, *others))
