"""The equations of ``contract.py``, for whatever makes operations of them.

``stablehlo.py`` and the kernel of ``gpu/triton/builder.py`` build the same update from
this one description, each with ``ops`` of its own.
"""

from collections.abc import Callable, Iterable
from typing import Any

from .contract import Slot, UpdateSpec
from .formats import narrow, word
from .formats.ops import Ops


def update(
    ops: Ops,
    spec: UpdateSpec,
    slot: Callable[[Slot], Any],
    x: dict[str, Any],
    scales: Iterable[Any],
    *,
    is_narrow: bool,
) -> dict[str, Any]:
    """One leaf's new values, line by line.

    Args:
      ops: what makes the operations.
      spec: what kind of update it is.
      slot: the value of a column of ``hyper``, for each element.
      x: the leaf's operands by kind, in the compute dtype.
      scales: further factors on the gradient.
      is_narrow: the param is bfloat16.

    Returns:
      A value for each of ``spec.result_kinds`` (and perhaps more), in the compute dtype; with
      ``spec.sums`` also ``"added"``, what is added to the param before that is rounded.
    """
    p, m, v = x["params"], x.get("m"), x.get("v")
    rounds = is_narrow and (spec.stochastic or spec.split_master)
    if spec.split_master and is_narrow:
        p = narrow.join(ops, p, x["remainder"])
    random = None
    if spec.words or (spec.stochastic and is_narrow):
        random = word.random_bits(ops, x["grads"], p, slot(Slot.SALT))
    if spec.words:
        m, v = word.decode(ops, x["words"])
    g = ops.multiply(x["grads"], slot(Slot.GRAD_SCALE))
    for scale in scales:
        g = ops.multiply(g, scale)
    if spec.clip_value:
        bound = slot(Slot.CLIP_VALUE)
        g = ops.clamp(ops.negate(bound), g, bound)
    m = _mix(ops, slot(Slot.BETA_1), m, slot(Slot.ONE_MINUS_BETA_1), g)
    v = _mix(ops, slot(Slot.BETA_2), v, slot(Slot.ONE_MINUS_BETA_2), ops.multiply(g, g))
    w = ops.maximum(x["v_max"], v) if spec.amsgrad else v
    square = ops.add(w, slot(Slot.EPSILON_ROOT)) if spec.epsilon_root else w
    root = ops.multiply(ops.sqrt(square), slot(Slot.V_CORRECTION))
    step = ops.multiply(slot(Slot.STEP_SIZE), m)
    if spec.nesterov:
        step = ops.add(step, ops.multiply(slot(Slot.GRAD_STEP_SIZE), g))
    step = ops.divide(step, ops.add(root, slot(Slot.EPSILON)))
    decay = ops.multiply(slot(Slot.DECAY_RATE), p)
    if spec.cautious:
        zero = ops.number(0.0)
        decay = ops.select(ops.less(ops.multiply(p, step), zero), zero, decay)
    change = ops.add(decay, step)
    new = {"m": m, "v": v, "v_max": w}
    if spec.words:
        new["words"] = word.encode(ops, m, v, random)
    by_change = spec.delta and not rounds
    if not by_change:
        new["params"] = ops.subtract(p, change)
    else:
        new["updates"] = ops.negate(change)
        if spec.ema:  # the caller's own sum, so that XLA makes one of the two
            new["params"] = ops.add(p, new["updates"])
    if spec.ema:
        momentum, rest = slot(Slot.EMA_MOMENTUM), slot(Slot.ONE_MINUS_EMA_MOMENTUM)
        new["ema"] = average = _mix(ops, momentum, x["ema"], rest, new["params"])
        if spec.ema_overwrite:
            overwrite = ops.is_set(slot(Slot.EMA_OVERWRITE))
            kind, there = "params", average
            if by_change:
                kind, there = "updates", ops.subtract(average, p)
            new[kind] = ops.select(overwrite, there, new[kind])
    if spec.sums:
        new["added"] = new["updates"] if by_change else ops.negate(change)
        if spec.ema and spec.ema_overwrite and not by_change:
            new["added"] = ops.select(overwrite, ops.subtract(average, p), new["added"])
    if spec.split_master:
        new["remainder"] = x["remainder"]
    if rounds:
        if spec.split_master:
            new["params"], new["remainder"] = narrow.split(ops, new["params"])
        else:
            new["params"] = narrow.stochastic(ops, new["params"], random)
        if spec.delta:
            new["updates"] = ops.subtract(new["params"], x["params"])
    return new


def _mix(ops: Ops, a: Any, x: Any, b: Any, y: Any) -> Any:
    return ops.add(ops.multiply(a, x), ops.multiply(b, y))
