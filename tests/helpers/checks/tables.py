"""The trees, batches and options that the GPU's programs are checked with, wherever they run."""

from __future__ import annotations

from typing import Any

from cpu_oracle import DTYPES, leaves
import numpy as np

FLAGS = ("ema_overwrite", "clip_value", "skip", "epsilon_root", "nesterov")

SHAPES = [(6,), (2, 3), (), (0, 4), (1,), (64,), (65,), (128,), (5, 16), (15,), (200,)]
"""Whole units and what is left of them, one program and several, and nothing at all."""

ALIKE = [(6,), (2, 3), (3, 2), (), (0, 4), (1,), *[(5,)] * 30, (4, 3, 7)]
"""Equal sizes of several shapes, more of one than a kernel takes, and nothing at all."""

LARGE = [(300_001,), (1 << 20,), (1000, 1000), (4097,), (1024, 3)]
"""Many programs, whatever the shape of a launch."""

BATCHES: dict[str, tuple[int | None, set[str]]] = {
    "leaves": (None, {"params", "grads", "m", "v"}),
    "hyper": (0, {"params", "grads", "m", "v"}),
    "gradients": (None, {"grads"}),
    "rates": (0, {"m"}),
}
"""Under ``vmap``: the axis of hyper, and the operands that have one."""


def random_case(seed: int) -> dict[str, Any]:
    """A tree, and options, as a property test would draw them."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([*range(41), 48, 63, 64, 65, 128, 200, 1024, 5000], rng.integers(1, 9))
    half = list(DTYPES)[:3]
    return {
        "shapes": [(int(size),) for size in sizes],
        "param": [str(rng.choice(half)) for _ in sizes],
        "grad": [str(rng.choice(half)) for _ in sizes],
        "groups": [int(g) for g in rng.integers(0, 3, len(sizes))],
        **{name: bool(rng.integers(2)) for name in ("amsgrad", "ema", "leaf_scale")},
        "apply": float(rng.integers(2)),
        "flags": {name: bool(rng.integers(2)) for name in FLAGS},
        "seed": seed,
    }


def mixed(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    """The operands of such a case, whose leaves have dtypes of their own, and its arguments."""
    tree: dict[str, Any] = {}
    for i, (shape, param, grad) in enumerate(
        zip(case["shapes"], case["param"], case["grad"], strict=True)
    ):
        one = leaves(
            [shape], param, grad, "float32", case["amsgrad"], case["ema"], case["seed"] + i
        )
        for kind, column in one.items():
            tree.setdefault(kind, []).extend(column)
    if case["leaf_scale"]:
        tree["leaf_scale"] = np.linspace(0.5, 1.5, len(case["shapes"])).astype(np.float32)
    flags = {name: on for name, on in case["flags"].items() if on}
    if "ema" not in tree:
        flags.pop("ema_overwrite", None)
    return tree, flags
