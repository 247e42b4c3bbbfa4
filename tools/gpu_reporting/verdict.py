"""What the figures say of this package's defaults on GPUs."""

from __future__ import annotations

import math
import statistics
from typing import Any

RIVALS = ("xla", "optax")
DECIDES = "steps-looped"
"""The part whose times decide: those of calls are JAX's dispatch where leaves are small."""

CURRENT_LAUNCH = "native"
CURRENT_MERGE = "merged 2^25"

Whole = dict[str, Any]
Item = dict[str, Any]


def items(whole: Whole, part: str) -> list[Item]:
    """What a part has written."""
    return whole["parts"].get(part, {}).get("items", [])


def timed(whole: Whole, part: str) -> list[Item]:
    """Its cases that have times."""
    return [item for item in items(whole, part) if item.get("seconds") and "case" in item]


def median(item: Item, peer: str) -> float | None:
    """Seconds per step; None if the peer was not there."""
    seconds = item["seconds"].get(peer)
    return statistics.median(seconds) if seconds else None


def ratio(item: Item, peer: str, ours: str) -> tuple[float, float, float] | None:
    """Of medians, how many times as long ``peer`` takes, and the quartiles of the rounds' own."""
    theirs, mine = (item["seconds"].get(name) for name in (peer, ours))
    if not theirs or not mine:
        return None
    rounds = [a / b for a, b in zip(theirs, mine, strict=True)]
    low, _, high = statistics.quantiles(rounds, n=4)
    return statistics.median(theirs) / statistics.median(mine), low, high


def agreement(whole: Whole, implementation: str) -> dict[str, Any]:
    """How many checks were planned, made and failed; ``agrees``: all were made, and none failed."""
    part = f"correct-{implementation}"
    found = items(whole, part)
    planned = next((item["planned"] for item in found if "planned" in item), 0)
    made = [item for item in found if "check" in item]
    failed = [item["check"] for item in made if item.get("problem")]
    status = whole["parts"].get(part, {}).get("status", "not run")
    agrees = status == "done" and not failed and 0 < planned == len(made)
    return {"status": status, "planned": planned, "made": len(made), "failed": failed} | {
        "agrees": agrees
    }


def keeps_another_state(item: Item, peer: str, ours: str = "native") -> bool:
    """Whether a peer's state has more or fewer bytes than ours, as where its dtype is another.

    Counters differ, and are few; a step moves its state twice, so its time is of another thing.
    """
    kept = item.get("state_bytes", {})
    return peer in kept and ours in kept and abs(kept[peer] / kept[ours] - 1) > 0.01


def losses(whole: Whole) -> list[dict[str, Any]]:
    """Where the kernel is not faster than a rival with the same state: which, and by how much."""
    found = []
    for item in timed(whole, DECIDES):
        for rival in RIVALS:
            against = ratio(item, rival, "native")
            if keeps_another_state(item, rival) or against is None or against[0] > 1:
                continue
            found.append({"case": item["case"], "rival": rival, "times_as_long": against})
    return found


def others(whole: Whole) -> list[str]:
    """Cases and rivals that decide nothing, as they keep another state."""
    return [
        f"{rival} in {item['case']}"
        for item in timed(whole, DECIDES)
        for rival in RIVALS
        if keeps_another_state(item, rival)
    ]


def unknown(whole: Whole) -> list[str]:
    """Cases in which the kernel, or a rival, has no time."""
    found = []
    for item in items(whole, DECIDES):
        if "case" in item:
            there = item.get("seconds") or {}
            found += [item["case"]] * (not {"native", *RIVALS} <= there.keys())
    return found


def best(whole: Whole, current: str, prefix: str, *others: str) -> dict[str, Any] | None:
    """Which variant of a sweep is fastest over all trees, by the geometric mean of ratios.

    Returns:
      The times of each in units of ``current``'s, over all trees and on each; None if there
      are none.
    """
    trees: dict[str, dict[str, float]] = {}
    for item in timed(whole, "sweep"):
        base = median(item, current)
        names = [n for n in item["seconds"] if n.startswith(prefix) or n in others]
        if base and len(names) > 1:
            trees[item["case"]] = {n: (median(item, n) or math.nan) / base for n in names}
    if not trees:
        return None
    everywhere = set.intersection(*({*row} for row in trees.values()))
    means = {
        name: math.exp(statistics.fmean(math.log(row[name]) for row in trees.values()))
        for name in everywhere
    }
    order = sorted(means, key=means.__getitem__)
    per_tree = {case: min(row, key=row.__getitem__) for case, row in trees.items()}
    means = {name: means[name] for name in order}
    return {"best": order[0], "current": current, "means": means, "per_tree": per_tree} | {
        "trees": trees
    }


def graphs(whole: Whole) -> dict[str, dict[str, float]]:
    """By case and peer, how many times as long a step takes without command buffers."""
    without = {item["case"]: item for item in timed(whole, "steps-no-graphs")}
    found: dict[str, dict[str, float]] = {}
    for item in timed(whole, "steps"):
        if (other := without.get(item["case"])) is not None:
            both = item["seconds"].keys() & other["seconds"].keys()
            found[item["case"]] = {
                name: (median(other, name) or math.nan) / (median(item, name) or math.nan)
                for name in item["seconds"]
                if name in both
            }
    return found


def verdict(whole: Whole) -> dict[str, Any]:
    """Whether "native" should be the default on this device, and with which constants."""
    native, xla = agreement(whole, "native"), agreement(whole, "xla")
    lost, missing = losses(whole), unknown(whole)
    measured = len(timed(whole, DECIDES))
    faster = bool(measured) and not lost and not missing
    on_gpu = whole["asked_for"] == "gpu"
    return {
        "native_by_default": on_gpu and faster and bool(native["agrees"]),
        "faster_on_every_case": faster,
        "cases_timed": measured,
        "cases_without_a_comparison": missing,
        "losses": lost,
        "of_another_state": others(whole),
        "native": native,
        "xla": xla,
        "launches": best(whole, CURRENT_LAUNCH, "native"),
        "merging": best(whole, CURRENT_MERGE, "merged", "by leaf"),
        "without_command_buffers": graphs(whole),
    }
