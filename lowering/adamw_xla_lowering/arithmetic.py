"""The equations of ``contract.py``, for whatever makes operations of them.

``stablehlo.py`` and the kernel of ``gpu/triton_builder.py`` build the same update from
this one description, the first with the StableHLO dialect itself as ``ops``.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .contract import Slot, UpdateSpec


class Ops(Protocol):
    """Makers of elementwise operations on values of one shape and dtype."""

    def add(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def subtract(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def multiply(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def divide(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def maximum(self, a: Any, b: Any, /) -> Any: ...  # noqa: D102
    def negate(self, x: Any, /) -> Any: ...  # noqa: D102
    def sqrt(self, x: Any, /) -> Any: ...  # noqa: D102
    def clamp(self, low: Any, x: Any, high: Any, /) -> Any: ...  # noqa: D102
    def select(self, condition: Any, yes: Any, no: Any, /) -> Any: ...  # noqa: D102


def update(
    ops: Ops,
    spec: UpdateSpec,
    slot: Callable[[Slot], Any],
    is_set: Callable[[Any], Any],
    x: dict[str, Any],
    scales: Iterable[Any],
) -> dict[str, Any]:
    """One leaf's new values, line by line.

    Args:
      ops: what makes the operations.
      spec: what kind of update it is.
      slot: the value of a column of ``hyper``, for each element.
      is_set: whether such a value is not 0.
      x: the leaf's operands by kind, in the compute dtype.
      scales: further factors on the gradient.

    Returns:
      A value for each of ``spec.result_kinds`` (and perhaps more), in the compute dtype.
    """
    p, g = x["params"], ops.multiply(x["grads"], slot(Slot.GRAD_SCALE))
    for scale in scales:
        g = ops.multiply(g, scale)
    if spec.clip_value:
        bound = slot(Slot.CLIP_VALUE)
        g = ops.clamp(ops.negate(bound), g, bound)
    m = _mix(ops, slot(Slot.BETA_1), x["m"], slot(Slot.ONE_MINUS_BETA_1), g)
    v = _mix(ops, slot(Slot.BETA_2), x["v"], slot(Slot.ONE_MINUS_BETA_2), ops.multiply(g, g))
    w = ops.maximum(x["v_max"], v) if spec.amsgrad else v
    square = ops.add(w, slot(Slot.EPSILON_ROOT)) if spec.epsilon_root else w
    root = ops.multiply(ops.sqrt(square), slot(Slot.V_CORRECTION))
    step = ops.multiply(slot(Slot.STEP_SIZE), m)
    if spec.nesterov:
        step = ops.add(step, ops.multiply(slot(Slot.GRAD_STEP_SIZE), g))
    step = ops.divide(step, ops.add(root, slot(Slot.EPSILON)))
    change = ops.add(ops.multiply(slot(Slot.DECAY_RATE), p), step)
    new = {"m": m, "v": v, "v_max": w}
    if not spec.delta:
        new["params"] = ops.subtract(p, change)
    else:
        new["updates"] = ops.negate(change)
        if spec.ema:  # the caller's own sum, so that XLA makes one of the two
            new["params"] = ops.add(p, new["updates"])
    if spec.ema:
        momentum, rest = slot(Slot.EMA_MOMENTUM), slot(Slot.ONE_MINUS_EMA_MOMENTUM)
        new["ema"] = average = _mix(ops, momentum, x["ema"], rest, new["params"])
        if spec.ema_overwrite:
            overwrite = is_set(slot(Slot.EMA_OVERWRITE))
            kind, there = "params", average
            if spec.delta:
                kind, there = "updates", ops.subtract(average, p)
            new[kind] = ops.select(overwrite, there, new[kind])
    return new


def _mix(ops: Ops, a: Any, x: Any, b: Any, y: Any) -> Any:
    return ops.add(ops.multiply(a, x), ops.multiply(b, y))
