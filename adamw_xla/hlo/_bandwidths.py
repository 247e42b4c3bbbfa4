"""How fast devices read and write their main memory, as their makers publish it."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """Of a device's main memory.

    Attributes:
      bytes_per_second: that are read and written together, at most.
      source: who says so.
      measured: what a copy was measured to reach, by this package's GPU report; None: never.
    """

    bytes_per_second: float
    source: str
    measured: float | None = None


_TPU = "docs.cloud.google.com/tpu/docs"

BANDWIDTHS: Mapping[str, Bandwidth] = MappingProxyType(
    {
        "a100": Bandwidth(2.039e12, "NVIDIA, A100 80GB datasheet: SXM"),
        "h100": Bandwidth(3.35e12, "NVIDIA, H100 datasheet: SXM, 80 GB of HBM3", measured=2.99e12),
        "b200": Bandwidth(8e12, "NVIDIA, DGX B200 datasheet: 64 TB/s of eight"),
        "v4": Bandwidth(1.2e12, f"{_TPU}/v4"),
        "v5e": Bandwidth(0.819e12, f"{_TPU}/v5e"),
        "v5p": Bandwidth(2.765e12, f"{_TPU}/v5p-training"),
        "v6e": Bandwidth(1.638e12, f"{_TPU}/v6e"),
    }
)
"""By the names that ``tools/inspect_hlo.py --target`` takes; of a TPU that of a chip."""


def microseconds(number_of_bytes: int, device: str) -> float:
    """The least time in which a device reads and writes so many bytes of its main memory.

    A lower bound, and no estimate: nothing computes, waits or is launched in it.

    Args:
      number_of_bytes: such as a kernel's ``read + written``.
      device: of ``BANDWIDTHS``.

    Raises:
      ValueError: nothing is known of ``device``.

    Example:
      >>> import adamw_xla as ax
      >>> round(ax.hlo.microseconds(28 * 124_439_808, "h100"))
      1040
    """
    if device not in BANDWIDTHS:
        raise ValueError(
            f"microseconds: nothing is known of {device!r}; must be one of {', '.join(BANDWIDTHS)}."
        )
    return number_of_bytes / BANDWIDTHS[device].bytes_per_second * 1e6
