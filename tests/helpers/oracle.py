"""AdamW in float64 NumPy, written from the published formulas and Keras' order of steps.

It shares no code with the product. Beside each result it says how large the largest term
was that entered it: rounding is judged in units of that, since a sum whose terms cancel
cannot be better than its terms.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Leaves = list[Array]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one optimizer; ``mask[i]`` says whether leaf i decays."""

    learning_rate: float | Callable[[int], float] = 0.001
    weight_decay: float | Callable[[int], float] = 0.004
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    amsgrad: bool = False
    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    loss_scale_factor: float | None = None
    gradient_accumulation_steps: int | None = None
    epsilon_hat: bool = True
    mask: tuple[bool, ...] | None = None
    skip_nonfinite: bool = False
    epsilon_root: float | None = None
    nesterov: bool = False
    maximize: bool = False
    decay_times_lr: bool = True
    cautious_decay: bool = False
    skip_spikes: Any = None  # has a window and deviations
    stacked: Any = None  # for each leaf whether it holds layers along axis 0


@dataclasses.dataclass
class State:
    """What the optimizer remembers."""

    m: Leaves
    v: Leaves
    v_max: Leaves
    ema: Leaves
    accumulated: Leaves
    count: int = 0
    micro_step: int = 0
    skipped: int = 0
    norms: Array = dataclasses.field(default_factory=lambda: np.zeros(0))  # -1 where there is none


@dataclasses.dataclass
class Info:
    """What a call tells of itself; by element, before and behind it, for norms.

    Attributes:
      applied: whether an update was made.
      grads: of each leaf, before clipping; None where there is none, or it is yet to be added to.
      added: to each leaf, decay included; likewise.
      clip_factor: the smallest.
      learning_rate: at this step.
      weight_decay: at this step.
    """

    applied: bool
    grads: dict[int, Array] = dataclasses.field(default_factory=dict)
    added: dict[int, Array] = dataclasses.field(default_factory=dict)
    clip_factor: float = 1.0
    learning_rate: float = 0.0
    weight_decay: float = 0.0


@dataclasses.dataclass
class Terms:
    """For each element of each result, the magnitude of the largest term in it."""

    params: Leaves
    m: Leaves
    v: Leaves
    v_max: Leaves
    ema: Leaves
    accumulated: Leaves
    step: Leaves  # what Adam's part alone adds to a param
    grads: Leaves  # of the mean gradient, before clipping
    added: Leaves
    info: Info


def init(params: Leaves) -> State:
    def zeros() -> Leaves:
        return [np.zeros_like(p) for p in params]

    return State(zeros(), zeros(), zeros(), [p.copy() for p in params], zeros())


def _at(value: float | Callable[[int], float], calls: int) -> float:
    return float(value(calls)) if callable(value) else value


def _norm(leaves: Leaves) -> float:
    return float(np.sqrt(sum(np.sum(np.square(g)) for g in leaves)))


def _factor(norm: float, bound: float) -> float:
    return 1.0 if norm <= bound else bound / norm


def _by_layer(x: Array, bound: float, is_stack: bool | None) -> Array:
    """The factor that clips a leaf; of a stack, one for each layer."""
    if not is_stack:
        return np.float64(_factor(_norm([x]), bound))
    found = [_factor(_norm([layer]), bound) for layer in x]
    return np.reshape(np.float64(found), (-1, *[1] * (x.ndim - 1)))


def spikes(norms: Array, norm: float, window: int, deviations: float) -> tuple[bool, Array]:
    """Whether a norm is a spike beside the last ones, the newest last, and these with it."""
    if not np.isfinite(norm):
        return True, norms
    known = norms[norms >= 0]
    bound = np.inf
    if len(known) >= max(2, window // 2) and known.max() > 0:
        mean = known.sum() / len(known)
        deviation = np.sqrt(((known - mean) ** 2).sum() / (len(known) - 1))
        bound = mean + deviations * max(deviation, mean / 100)
    return norm > bound, np.append(norms[1:], min(norm, bound))


def _quotient(a: Array, b: Array) -> Array:
    """What never had a gradient does not move, with an epsilon of 0 too: 0/0 is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=(a != 0) | (b != 0))


def step(
    params: Leaves, grads: list[Array | None], state: State, o: Options
) -> tuple[Leaves, State, Terms]:
    """One call of the optimizer. A leaf whose gradient is None stays as it is."""
    new = State(
        *(list(x) for x in (state.m, state.v, state.v_max, state.ema, state.accumulated)),
        count=state.count,
        micro_step=state.micro_step,
        skipped=state.skipped,
        norms=state.norms,
    )
    result = list(params)
    kept = (result, new.m, new.v, new.v_max, new.ema, new.accumulated)
    nothing = [np.zeros_like(p) for p in params]
    kept = (*kept, nothing, nothing, nothing)
    terms = Terms(*([np.abs(x) for x in leaves] for leaves in kept), info=Info(applied=False))
    live = [i for i, g in enumerate(grads) if g is not None]
    g: dict[int, Array] = {i: np.asarray(grads[i], np.float64) for i in live}
    n = o.gradient_accumulation_steps
    calls = state.count if n is None else state.count * n + state.micro_step
    lr, wd = _at(o.learning_rate, calls), _at(o.weight_decay, calls)
    info = terms.info
    info.learning_rate, info.weight_decay = lr, wd
    if o.skip_nonfinite and not all(np.all(np.isfinite(x)) for x in g.values()):
        new.skipped += 1
        if n is None:
            info.grads, info.added = g, {i: np.zeros_like(x) for i, x in g.items()}
            info.clip_factor = np.nan if o.clipnorm or o.global_clipnorm else 1.0
        return result, new, terms

    g = {i: x / (o.loss_scale_factor or 1.0) for i, x in g.items()}
    size = {i: np.abs(x) for i, x in g.items()}
    if n is not None:
        size = {i: np.maximum(np.abs(state.accumulated[i]), size[i]) for i in live}
        g = {i: state.accumulated[i] + x for i, x in g.items()}
        if state.micro_step + 1 < n:
            new.micro_step += 1
            for i in live:
                new.accumulated[i], terms.accumulated[i] = g[i], size[i]
            return result, new, terms
        new.micro_step = 0
        for i in live:
            new.accumulated[i] = np.zeros_like(g[i])
            terms.accumulated[i] = np.zeros_like(g[i])
        g = {i: x / n for i, x in g.items()}
        size = {i: x / n for i, x in size.items()}

    is_spike, rule = False, o.skip_spikes
    if rule is not None:
        last = state.norms if len(state.norms) else np.full(rule.window, -1.0)
        norm, bound = _norm(list(g.values())), float(rule.deviations)
        is_spike, new.norms = spikes(last, norm, rule.window, bound)
    info.applied, info.grads = not is_spike, g
    for i, x in size.items():
        terms.grads[i] = x
    if o.maximize:
        g = {i: -x for i, x in g.items()}
    if o.clipnorm is not None:
        factors = {i: _by_layer(x, o.clipnorm, o.stacked and o.stacked[i]) for i, x in g.items()}
    elif o.global_clipnorm is not None:
        norm = _norm(list(g.values()))
        factor = _factor(norm, o.global_clipnorm)
        factors = dict.fromkeys(live, np.float64(factor if np.isfinite(norm) else np.nan))
    else:
        factors = dict.fromkeys(live, np.float64(1.0))
    info.clip_factor = min((float(np.min(x, initial=1.0)) for x in factors.values()), default=1.0)
    if is_spike:
        new.skipped += 1
        info.added = {i: np.zeros_like(x) for i, x in g.items()}
        return result, new, terms
    g = {i: x * factors[i] for i, x in g.items()}
    size = {i: x * factors[i] for i, x in size.items()}
    if o.clipvalue is not None:
        g = {i: np.clip(x, -o.clipvalue, o.clipvalue) for i, x in g.items()}
        size = {i: np.minimum(x, o.clipvalue) for i, x in size.items()}

    new.count = t = state.count + 1
    bias_1, bias_2 = 1 - o.beta_1**t, 1 - o.beta_2**t
    for i in live:
        decays = o.mask is None or o.mask[i]
        p, m, v = params[i], state.m[i], state.v[i]
        new.m[i] = o.beta_1 * m + (1 - o.beta_1) * g[i]
        terms.m[i] = np.maximum(o.beta_1 * np.abs(m), (1 - o.beta_1) * size[i])
        new.v[i] = w = o.beta_2 * v + (1 - o.beta_2) * g[i] ** 2
        terms.v[i] = term_w = np.maximum(o.beta_2 * v, (1 - o.beta_2) * size[i] ** 2)
        if o.amsgrad:
            new.v_max[i] = w = np.maximum(state.v_max[i], w)
            terms.v_max[i] = term_w = np.maximum(state.v_max[i], term_w)
        root = o.epsilon_root or 0.0
        if o.epsilon_hat:
            rate = lr * np.sqrt(bias_2)
            denominator = np.sqrt(w + root) + o.epsilon
        else:
            rate = lr
            denominator = np.sqrt(w / bias_2 + root) + o.epsilon
        direction, term = new.m[i] / bias_1, terms.m[i] / bias_1
        if o.nesterov:
            following = 1 - o.beta_1 ** (t + 1)
            direction = o.beta_1 * new.m[i] / following + (1 - o.beta_1) * g[i] / bias_1
            term = o.beta_1 * terms.m[i] / following + (1 - o.beta_1) * size[i] / bias_1
        moved = rate * _quotient(direction, denominator)
        decay = (lr if o.decay_times_lr else 1.0) * wd * p if decays else np.zeros_like(p)
        if o.cautious_decay:
            decay = np.where(np.sign(p) * np.sign(moved) < 0, 0.0, decay)
        result[i] = p - decay - moved
        info.added[i] = -decay - moved
        # To first order an error of w is half of it in the root.
        inside = np.abs(direction) * np.divide(term_w, w, out=np.ones_like(w), where=w > 0)
        enters = rate * _quotient(np.maximum(term, inside), denominator)
        terms.step[i] = enters
        terms.added[i] = np.maximum(np.abs(decay), enters)
        terms.params[i] = np.maximum(np.abs(p), terms.added[i])
        if o.use_ema:
            momentum = 0.0 if t == 1 else o.ema_momentum
            new.ema[i] = momentum * state.ema[i] + (1 - momentum) * result[i]
            terms.ema[i] = np.maximum(
                momentum * np.abs(state.ema[i]), (1 - momentum) * terms.params[i]
            )
            frequency = o.ema_overwrite_frequency
            if frequency is not None and t % frequency == 0:
                result[i], terms.params[i] = new.ema[i], terms.ema[i]
                info.added[i] = new.ema[i] - p
                terms.added[i] = np.maximum(terms.ema[i], np.abs(p))
    return result, new, terms
