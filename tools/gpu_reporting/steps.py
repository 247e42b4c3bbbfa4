"""Times of one step on the device, ours beside the peers', or beside variants of our own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
import gc
from importlib.util import find_spec
import itertools
import math
import os
import time
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from gpu_reporting import child

READING = 0.06
"""Seconds that one reading of the clock may take: some steps of the slowest peer."""

TIMING = {"gpu": 2.0, "cpu": 0.5}
"""Seconds for the rounds of one case."""

ROUNDS = (5, 15)
"""At least, and at most."""

BUILDING = {"gpt2-small": 20.0, "resnet50": 10.0, "400x64k": 16.0, "1000x1k": 60.0}
"""Seconds to build the peers of a tree, until they are known (an H100's host of 16 cores, jax
0.11.2; the last, which compiles longest of all, is a guess)."""

OTHERS = 4.0
"""Seconds for any other tree."""

PATIENCE = 1.5
"""How many times as long is waited for; who is late then is left out of the tree's other cases."""

GPU_TREES = (("gpt2-small", "resnet50", "1x256M"), ("400x64k",), ("1000x1k",))
"""In groups: those whose programs compile in seconds first, and last what takes half a minute."""

CPU_TREES = (("16x32k",),)
KINDS = [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)]
"""Dtype of the params, and whether gradients are clipped by the global norm."""

LOOPED_KINDS = KINDS[:2]
LOOPED_TREES = (("gpt2-small", "1x256M", "resnet50", "400x64k"), ("1000x1k",))

NOT_CALLED = ("keras", "native words", "xla words")
"""Who is not timed call by call, where dispatch is most of it."""

LAUNCHES, MERGES = ("native",), ("merged", "by leaf")
SWEPT = [
    ("gpt2-small", "float32", LAUNCHES + MERGES),
    ("400x64k", "float32", LAUNCHES + MERGES),
]
"""Trees, and the beginnings of the names of what is compared there."""


Form: TypeAlias = Literal["calls", "looped", "sweep"]
"""How steps are timed: called one by one; on the device alone; and so variants of our own."""


class Plan(NamedTuple):
    """What to time: a tree, its params' dtype, clipping, who takes part, and in which form."""

    tree: str
    dtype: str
    clip: bool
    peers: Mapping[str, Any]
    form: Form = "calls"


def plans(device: str, form: Form, without: list[str]) -> Iterator[Plan]:
    """All cases, in order of worth."""
    from benches import gpu_peers, looped_peers, step_peers

    if form == "sweep":
        for tree, dtype, names in SWEPT:
            chosen = {k: v for k, v in looped_peers.SWEEP.items() if k.startswith(names)}
            yield Plan(tree, dtype, False, _kept(chosen, without), form)
        return
    on_gpu = device == "gpu"
    if form == "looped":
        peers, kinds, trees = looped_peers.PEERS, LOOPED_KINDS, LOOPED_TREES
        left_out = [*([] if on_gpu else ["torch", "by leaf"]), *without]
    else:
        peers = gpu_peers.PEERS if on_gpu else step_peers.PEERS
        kinds, trees = KINDS, GPU_TREES
        left_out = [*NOT_CALLED, *([] if on_gpu else ["bandwidth", "torch"]), *without]
    for group in trees if on_gpu else CPU_TREES:
        for (dtype, clip), tree in itertools.product(kinds, group):
            yield Plan(tree, dtype, clip, _kept(peers, left_out), form)


def _kept(peers: Mapping[str, Any], without: list[str]) -> dict[str, Any]:
    """Those who can take part: not left out, and installed."""
    kept = {k: v for k, v in peers.items() if k.split()[0] not in without and k not in without}
    return {k: v for k, v in kept.items() if k not in ("torch", "optax") or find_spec(k)}


def needed_bytes(least: int, peers: Mapping[str, Any]) -> int:
    """Of JAX's memory for one case: arrays of ours and of optax', gradients, and two copies.

    Each set of arrays is at most what a step moves; a copy is half of that.
    """
    sets = 1 + ("optax" in peers) + 3 * ("bandwidth" in peers) * 0.5
    return int(1.2 * least * sets)


def measure(
    plan: Plan, memory: int, until: float = math.inf, timing: float = TIMING["gpu"]
) -> dict[str, Any]:
    """Builds and times one case: an item for the report.

    Args:
      plan: the case.
      memory: that JAX may have, in bytes; 0 where that is not known.
      until: when its timing should begin, by ``time.monotonic``, with those built by then.
      timing: seconds for its rounds.
    """
    from benches import looped_peers, step_cases

    case = step_cases.Case(plan.tree, step_cases.trees()[plan.tree], plan.dtype, plan.clip)
    item: dict[str, Any] = {"case": case.label, "tree": plan.tree, "dtype": plan.dtype}
    item |= {"clip": plan.clip, "least_bytes": case.least_bytes}
    needed = needed_bytes(case.least_bytes, plan.peers)
    if memory and needed > memory:
        skipped = f"needs {needed / 1e9:.0f} GB, and JAX may have {memory / 1e9:.0f} GB"
        return item | {"skipped": skipped}
    failed: dict[str, str] = {}

    def note(name: str, error: Exception) -> None:
        failed[name] = f"{type(error).__name__}: {error}"[:400]

    begin = time.monotonic()
    built = step_cases.build(case, plan.peers, note, until)
    item |= {"build_seconds": round(time.monotonic() - begin, 2), "failed": failed}
    if not built:
        return item
    kept = {k: x.state_bytes for k, x in built.items() if getattr(x, "state_bytes", 0)}
    item |= {"state_bytes": kept}
    if plan.form != "calls":
        result = looped_peers.time_rounds(case, built, READING, timing, ROUNDS)
        return item | {
            "rounds": len(next(iter(result.seconds.values()))),
            "seconds": result.seconds,
        }
    trial = {name: _seconds(peer, 2) / 2 for name, peer in built.items()}
    steps = int(min(max(READING / max(trial.values()), 3), 20))
    rounds = int(timing / (steps * sum(trial.values())))
    rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
    result = step_cases.time_rounds(case, built, rounds, steps)
    return item | {"steps": steps, "rounds": rounds, "seconds": result.seconds}


def _seconds(peer: Any, steps: int) -> float:
    start = time.perf_counter()
    peer.run(steps)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--form", choices=get_args(Form), default="calls")
    parser.add_argument("--without", action="append", default=[])
    me = child.start(parser)
    device = child.use_device(me)
    without = list(me.options.without)
    if me.device == "cpu":
        import adamw_xla

        without += [] if adamw_xla.native_available() else ["native"]
    me.write(xla_flags=os.environ.get("XLA_FLAGS", ""), without=without)
    memory = int((device.memory_stats() or {}).get("bytes_limit", 0))
    spent: dict[str, float] = {}
    first = BUILDING if me.device == "gpu" else {}
    timing = TIMING[me.device]
    late: dict[str, set[str]] = {}
    for plan in plans(me.device, me.options.form, without):
        building = first.get(plan.tree, OTHERS)
        label = f"{plan.tree} {plan.dtype}{' clip' if plan.clip else ''}"
        # Compiling takes most of it, and the same again for the same tree.
        needed = spent.get(plan.tree, building + 2 * timing)
        if me.left < needed:
            skipped = f"no time was left: it takes {needed:.0f} s, and there were {me.left:.0f}"
            me.write(case=label, skipped=skipped)
            continue
        begin = time.monotonic()
        until = min(begin + PATIENCE * building, me.until - timing)
        tardy = late.setdefault(plan.tree, set())
        plan = plan._replace(peers={k: v for k, v in plan.peers.items() if k not in tardy})
        try:
            item = measure(plan, memory, until, timing)
        except Exception as error:  # the other cases have their turn
            item = {"case": label, "skipped": f"{type(error).__name__}: {error}"[:600]}
        me.write(**item)
        tardy |= {k for k, v in item.get("failed", {}).items() if v.startswith("TimeoutError")}
        gc.collect()
        spent[plan.tree] = time.monotonic() - begin


if __name__ == "__main__":
    main()
    child.leave()
