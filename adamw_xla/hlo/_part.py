"""Some kernels of a program, and what they come to together."""

from __future__ import annotations

from collections import Counter
import dataclasses
from typing import Any, cast

from adamw_xla.hlo._kernels import Kernel


@dataclasses.dataclass(frozen=True)
class Part:
    """The whole program, or what of it is the update's or the norm's.

    Attributes:
      kernels: its launches, in the order of the schedule, and on TPU also its scalar and
        background operations, which are not counted as launches.
      least_bytes: what a single kernel in its place would move: each array that comes from
        outside read once, each that is used outside written once. None for the program.
    """

    kernels: tuple[Kernel, ...]
    least_bytes: int | None = None

    @property
    def count(self) -> int:
        """Launches, each counted once: those in loops and in branches too."""
        return sum(kernel.counted for kernel in self.kernels)

    @property
    def launches(self) -> int | None:
        """Launches per call, each times the length of its loops; None if one is not known."""
        times = [kernel.times for kernel in self.kernels if kernel.counted]
        return None if None in times else sum(cast(list[int], times))

    @property
    def by_kind(self) -> dict[str, int]:
        """How many of each kind, most frequent first."""
        return dict(Counter(kernel.kind for kernel in self.kernels).most_common())

    @property
    def read(self) -> int:
        """Bytes read from main memory; a loop of unknown length counts once."""
        return sum(kernel.read * (kernel.times or 1) for kernel in self.kernels)

    @property
    def written(self) -> int:
        """Bytes written to main memory; a loop of unknown length counts once."""
        return sum(kernel.written * (kernel.times or 1) for kernel in self.kernels)

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimates added up (TPU); never a measurement. None without any."""
        estimates = [
            kernel.estimated_cycles * (kernel.times or 1)
            for kernel in self.kernels
            if kernel.estimated_cycles is not None
        ]
        return sum(estimates) if estimates else None

    def to_json(self) -> dict[str, Any]:
        """All of it, as what ``json.dump`` takes."""
        return {
            "count": self.count,
            "launches": self.launches,
            "by_kind": self.by_kind,
            "bytes_read": self.read,
            "bytes_written": self.written,
            "least_bytes": self.least_bytes,
            "estimated_cycles": self.estimated_cycles,
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
        }
