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

# GPUs' drivers tell the memory's clock and the width of its bus, from which XLA has their product
# (tools/inspection/targets); it is 2.039, 3.352 and 7.672 TB/s.
BANDWIDTHS: Mapping[str, Bandwidth] = MappingProxyType(
    {
        "a100": Bandwidth(2.039e12, "NVIDIA, A100 datasheet: 80GB SXM, 2,039 GB/s"),
        "h100": Bandwidth(
            3.35e12, "NVIDIA, H100 datasheet: H100 SXM, 80GB, 3.35TB/s", measured=2.99e12
        ),
        "b200": Bandwidth(8e12, "NVIDIA, DGX B200 datasheet: 64TB/s of eight GPUs"),
        "v4": Bandwidth(1.2e12, f"{_TPU}/v4: HBM2, 1200 GBps"),
        # Later versions of the page say 800 GiBps, which is 859 GB/s or, if a GiB is 1.024 GB, 819.
        "v5e": Bandwidth(0.819e12, f"{_TPU}/v5e: HBM2, 819 GBps"),
        "v5p": Bandwidth(2.765e12, f"{_TPU}/v5p: HBM2e, 2765 GBps"),
        "v6e": Bandwidth(1.638e12, f"{_TPU}/v6e: HBM, 1638 GBps"),
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
