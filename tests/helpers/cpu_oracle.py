"""Inputs for the update's tests, and the update in float64 NumPy, from its formulas."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any, Literal

from bounded import IEEE, Bounded, Machine, assert_within
import ml_dtypes
import numpy as np

from adamw_xla_lowering import NUM_SLOTS, Slot
from adamw_xla_lowering.cpu import library as native

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

OPTIONS: list[dict[str, bool]] = [
    {},
    {"amsgrad": True},
    {"ema": True},
    {"ema": True, "ema_overwrite": True},
    {"clip_value": True},
    {"skip": True},
    {"epsilon_root": True},
    {"nesterov": True},
    {"cautious": True},
    {
        "amsgrad": True,
        "ema": True,
        "ema_overwrite": True,
        "clip_value": True,
        "skip": True,
        "epsilon_root": True,
        "nesterov": True,
        "cautious": True,
    },
]


def require_native() -> None:
    """Skips the test without the compiled kernel, or fails where it must be there."""
    import pytest  # only here: the other helpers run on devices whose Python may not have it

    if (reason := native.unavailable_reason()) is not None:
        if os.environ.get("ADAMW_XLA_REQUIRE_NATIVE") == "1":
            pytest.fail(f"the CPU kernel is required: {reason}")
        pytest.skip(reason)


def hyper(
    groups: int = 1, batch: Sequence[int] = (), dtype: Any = np.float32, **slots: float
) -> Any:
    """Rows that differ from each other in every slot; ``slots`` are set in all rows."""
    base = {
        Slot.GRAD_SCALE: 0.7,
        Slot.STEP_SIZE: 0.02,
        Slot.V_CORRECTION: 1.3,
        Slot.DECAY_RATE: 0.003,
        Slot.BETA_1: 0.88,
        Slot.ONE_MINUS_BETA_1: 0.12,
        Slot.BETA_2: 0.95,
        Slot.ONE_MINUS_BETA_2: 0.05,
        Slot.EPSILON: 1e-3,
        Slot.CLIP_VALUE: 0.5,
        Slot.EMA_MOMENTUM: 0.9,
        Slot.ONE_MINUS_EMA_MOMENTUM: 0.1,
        Slot.EMA_OVERWRITE: 1.0,
        Slot.APPLY: 1.0,
        Slot.EPSILON_ROOT: 0.02,
        Slot.GRAD_STEP_SIZE: 0.01,
    }
    rows = np.zeros((*batch, groups, NUM_SLOTS), dtype)
    vary = 1 + 0.05 * np.arange(rows[..., 0].size).reshape(rows.shape[:-1])
    for slot, value in base.items():
        rows[..., slot] = value * vary
    for name, value in slots.items():
        rows[..., Slot[name]] = value
    return rows


def leaves(
    shapes: Sequence[tuple[int, ...]],
    param: str = "float32",
    grad: str | None = None,
    state: str = "float32",
    amsgrad: bool = False,
    ema: bool = False,
    seed: int = 0,
) -> dict[str, list[Any]]:
    """One list of leaves per kind of operand."""
    rng = np.random.default_rng(seed)

    def column(dtype: str, positive: bool = False) -> list[Any]:
        values = (rng.standard_normal(shape) for shape in shapes)
        return [np.asarray(x * x if positive else x).astype(DTYPES[dtype]) for x in values]

    tree = {"params": column(param), "grads": column(grad or param), "m": column(state)}
    tree["v"] = column(state, positive=True)
    if amsgrad:
        tree["v_max"] = column(state, positive=True)
    if ema:
        tree["ema"] = column(state)
    return tree


def split(options: dict[str, bool]) -> tuple[dict[str, bool], dict[str, bool]]:
    """Options that are operands, and options that are arguments."""
    operands = {key: on for key, on in options.items() if key in ("amsgrad", "ema")}
    return operands, {key: on for key, on in options.items() if key not in operands}


def compute_dtype(params: Any) -> Any:
    return np.dtype(np.float64 if params.dtype == np.float64 else np.float32)


def expected(
    row: Any,
    leaf: dict[str, Any],
    *,
    leaf_scale: float = 1.0,
    clip_value: bool = False,
    ema_overwrite: bool = False,
    skip: bool = False,
    epsilon_root: bool = False,
    nesterov: bool = False,
    cautious: bool = False,
    delta: Literal["change", "difference"] | None = None,
    adds: bool = False,
    machine: Machine = IEEE,
) -> dict[str, Bounded]:
    """The new leaf, in float64, and how far rounding may move it.

    A leaf that was expected from an earlier step brings the errors of that step along. With
    ``delta``, "params" is their change: as it is, or as what is between the new and the old. With
    ``adds`` there is only "added", what is added to the params before they are rounded.
    """
    params = leaf["params"]
    dtype = params.arithmetic if isinstance(params, Bounded) else compute_dtype(params)
    s = {slot: Bounded.operand(row[slot], dtype, machine) for slot in Slot}
    x = {kind: Bounded.operand(value, dtype, machine) for kind, value in leaf.items()}
    if skip and s[Slot.APPLY].value == 0:
        if adds:
            return {"added": Bounded.operand(np.zeros(x["params"].value.shape), dtype, machine)}
        if delta:
            x["params"] = Bounded.operand(np.zeros_like(x["params"].value), dtype, machine)
        return {kind: value for kind, value in x.items() if kind != "grads"}
    with np.errstate(all="ignore"):
        g = s[Slot.GRAD_SCALE] * x["grads"]
        if leaf_scale != 1:
            g = g * Bounded.operand(leaf_scale, dtype, machine)
        if clip_value:
            g = g.clip(s[Slot.CLIP_VALUE])
        m = s[Slot.BETA_1] * x["m"] + s[Slot.ONE_MINUS_BETA_1] * g
        v = s[Slot.BETA_2] * x["v"] + s[Slot.ONE_MINUS_BETA_2] * (g * g)
        w = x["v_max"].maximum(v) if "v_max" in x else v
        square = w + s[Slot.EPSILON_ROOT] if epsilon_root else w
        along = s[Slot.STEP_SIZE] * m
        if nesterov:
            along = along + s[Slot.GRAD_STEP_SIZE] * g
        step = along / (square.sqrt() * s[Slot.V_CORRECTION] + s[Slot.EPSILON])
        decay = s[Slot.DECAY_RATE] * x["params"]
        if cautious:
            decay = decay.where(~(x["params"].value * step.value < 0))
        change = decay + step
        p = x["params"] - change
        new = {"params": p, "m": m, "v": v}
        if "v_max" in x:
            new["v_max"] = w
        if "ema" in x:
            e = s[Slot.EMA_MOMENTUM] * x["ema"] + s[Slot.ONE_MINUS_EMA_MOMENTUM] * p
            new["ema"] = e
            if ema_overwrite and s[Slot.EMA_OVERWRITE].value != 0:
                new["params"] = e
        if adds:
            added = change if new["params"] is p else new["params"] - x["params"]
            return {"added": added}
        if delta == "change" and new["params"] is p:
            new["params"] = dataclasses.replace(change, value=-change.value)
        elif delta:
            new["params"] = new["params"] - x["params"]
    return new


def check(got: Any, h: Any, tree: dict[str, Any], groups: Any = None, **flags: Any) -> None:
    """Every leaf of a result is what the formulas say, and like what it replaces."""
    scales = tree.get("leaf_scale")
    for i in range(len(tree["params"])):
        leaf = {kind: column[i] for kind, column in tree.items() if kind != "leaf_scale"}
        scale = 1.0 if scales is None else float(scales[i])
        want = expected(h[groups[i] if groups else 0], leaf, leaf_scale=scale, **flags)
        for kind, value in want.items():
            result = getattr(got, kind)[i]
            assert result.shape == leaf[kind].shape
            changes = kind == "params" and flags.get("delta")
            assert result.dtype == (compute_dtype(leaf[kind]) if changes else leaf[kind].dtype)
            assert_within(result, value, f"{kind}[{i}]")
