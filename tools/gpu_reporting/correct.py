"""One implementation on the device, against the float64 oracles of the tests."""

from __future__ import annotations

import argparse
import os

from gpu_reporting import child


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--implementation", choices=("xla", "native"), required=True)
    me = child.start(parser)
    device = child.use_device(me)

    from checks.on_device import all_checks, run_all

    import adamw_xla

    implementation = me.options.implementation
    if implementation == "native" and me.device == "cpu" and not adamw_xla.native_available():
        me.write(skipped="the CPU's kernel was not built")
        return
    checks = all_checks(implementation, device.platform, quick=me.device == "cpu")
    me.write(planned=len(checks))
    threads = max(1, min(12, len(os.sched_getaffinity(0)) - 1))
    for outcome in run_all(checks, threads, me.until):
        me.write(check=outcome.name, seconds=round(outcome.seconds, 3), problem=outcome.problem)


if __name__ == "__main__":
    main()
    child.leave()
