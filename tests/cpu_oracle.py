"""Inputs for the CPU kernel's tests, and the update in float64 NumPy, from its formulas."""

from collections.abc import Sequence
import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from adamw_xla_lowering import NUM_SLOTS, Slot, native

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

# Half a unit in the last place of a rounded result, and the rounding of the arithmetic.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 4e-6, "float64": 1e-12}


def require_native() -> None:
    """Skips the test without the compiled kernel, or fails where it must be there."""
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
) -> dict[str, Any]:
    """The new leaf, in float64."""
    s = {slot: float(row[slot]) for slot in Slot}
    x = {kind: np.asarray(value).astype(np.float64) for kind, value in leaf.items()}
    if skip and s[Slot.APPLY] == 0:
        return {kind: value for kind, value in x.items() if kind != "grads"}
    with np.errstate(all="ignore"):
        g = s[Slot.GRAD_SCALE] * leaf_scale * x["grads"]
        if clip_value:
            g = np.clip(g, -s[Slot.CLIP_VALUE], s[Slot.CLIP_VALUE])
        m = s[Slot.BETA_1] * x["m"] + s[Slot.ONE_MINUS_BETA_1] * g
        v = s[Slot.BETA_2] * x["v"] + s[Slot.ONE_MINUS_BETA_2] * g**2
        w = np.maximum(x["v_max"], v) if "v_max" in x else v
        square = w + s[Slot.EPSILON_ROOT] if epsilon_root else w
        along = s[Slot.STEP_SIZE] * m + (s[Slot.GRAD_STEP_SIZE] * g if nesterov else 0.0)
        step = along / (np.sqrt(square) * s[Slot.V_CORRECTION] + s[Slot.EPSILON])
        p = x["params"] - s[Slot.DECAY_RATE] * x["params"] - step
        new = {"params": p, "m": m, "v": v}
        if "v_max" in x:
            new["v_max"] = w
        if "ema" in x:
            e = s[Slot.EMA_MOMENTUM] * x["ema"] + s[Slot.ONE_MINUS_EMA_MOMENTUM] * p
            new["ema"] = e
            if ema_overwrite and s[Slot.EMA_OVERWRITE] != 0:
                new["params"] = e
    return new


def assert_close(got: Any, want: Any, name: str, param: str = "float32") -> None:
    """Equal to what the dtypes of result and arithmetic can hold; NaN, infinity in place."""
    arithmetic = "float64" if param == "float64" else "float32"
    tolerance = max(TOLERANCE[got.dtype.name], TOLERANCE[arithmetic])
    np.testing.assert_allclose(
        np.asarray(got).astype(np.float64), want, rtol=tolerance, atol=tolerance, err_msg=name
    )
