"""The transformer of ``tools/train_lm.py``, small, and what a device holds of it."""

from __future__ import annotations

from collections.abc import Mapping
import math

import train_lm

SIZES = "layers=2,width=64,heads=4,context=16"
MODEL = train_lm.Model(layers=2, width=64, heads=4)


def bytes_by_hand(ways: Mapping[str, int], zero1: bool) -> tuple[int, int]:
    """Of params and of m and v, on each device of a mesh of the axes data, fsdp and model."""
    params = state = 0
    for leaf in train_lm.jax.tree.leaves(train_lm.layout(MODEL)):
        cut = [1 if axis is None else ways[axis] for axis in leaf.spec]
        here = 4 * math.prod(leaf.shape) // math.prod(cut)
        params += here
        # What is small, or has no dimension that data divides, stays whole.
        dims = zip(leaf.shape, [*cut, *[1] * len(leaf.shape)], strict=False)
        divides = any(n % (k * ways["data"]) == 0 for n, k in dims)
        large = math.prod(leaf.shape) >= 4096
        state += 2 * here // (ways["data"] if zero1 and large and divides else 1)
    return params, state
