"""Which device, driver and versions these are."""

from __future__ import annotations

import argparse
import contextlib
from importlib import metadata
import os
import platform
import subprocess

from gpu_reporting import child

PACKAGES = ("jax", "jaxlib", "numpy", "optax", "torch", "jax-cuda13-plugin", "jax-cuda12-plugin")
DRIVER = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def driver() -> str:
    """What nvidia-smi says, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return (done.stdout or done.stderr).strip()


def main() -> None:
    me = child.start(argparse.ArgumentParser())
    # What needs no device first: it is there even if the device is not.
    me.write(
        versions=versions(),
        driver=driver() if me.device == "gpu" else "",
        cores=len(os.sched_getaffinity(0)),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )
    device = child.use_device(me)
    import adamw_xla

    me.write(
        device=device.device_kind,
        platform=device.platform,
        compute_capability=str(getattr(device, "compute_capability", "")),
        memory=(device.memory_stats() or {}).get("bytes_limit", 0),
        package=str(adamw_xla.__path__[0]),
        cpu_kernel=adamw_xla.native_available(),
    )


if __name__ == "__main__":
    main()
