"""``SpikeRule``: which gradients are too large to be trained on; a part of the config."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
import dataclasses
import numbers
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from adamw_xla._check import calls, options
from adamw_xla._check.leaves import kind
from adamw_xla._saved.static import Compared

EMPTY = -1.0
"""Stands in a window where there is no norm yet: none is negative, and ``jax_debug_nans`` and
``jax_debug_infs`` do not stop at it."""

LEAST = 0.01
"""The least deviation, as a part of the mean."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SpikeRule(Compared):
    r"""Which steps have a gradient so large that they are not made: ``AdamW(skip_spikes=...)``.

    With :math:`\mu` the mean and :math:`\sigma` the deviation (with :math:`n - 1`) of the norms
    :math:`x` of the last updates, one is skipped whose norm is above

    .. math:: b = \mu + k \max(\sigma, \mu / 100)

    and :math:`\min(x, b)` enters the window in place of the oldest. The norm is that of the whole
    tree's gradient, over all devices that ``axis_names`` says; unscaled, before any clip, and
    under accumulation that of the mean, so that it is the whole update that is skipped.

    A step that is skipped leaves params, state and count as they were, but for this window, and is
    counted in ``state.skipped``. Until half of the window is filled (and at least 2 norms), or
    where all of it are 0, every finite norm passes.

    - What is skipped enters too, or a level that has changed for good would be skipped for ever;
      but as :math:`b`, or one spike would hide those after it: behind one of 1,000 times the
      mean, none below 500 times would be found for a whole window. So a level of 10 times
      the mean is that of the training after 10 to 45 steps, one of 1,000 times after 50 to 85.
    - A norm that is NaN or infinite is a spike at any time, and does not enter. (``skip_nonfinite``
      looks at each call of an accumulation, and at squares that overflow; what it skips does not
      enter either.)
    - The deviation counts as at least a hundredth of the mean: where norms are all but equal,
      what differs by rounding is none.

    Args:
      window: how many norms are remembered, at least 2: so many float32 of state,
        ``state.norms``. It is static; ``adapt_state`` fits a state to another one, and keeps the
        newest.
      deviations: :math:`k`, above 0; a number or scalar array, which may be traced. At 6, of 20,000
        norms whose logarithms have a deviation of 0.3, two are above.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: one is out of its range.

    Example:
      >>> import adamw_xla as ax, jax.numpy as jnp
      >>> config = ax.AdamW(skip_spikes=ax.SpikeRule(window=8))
      >>> params, grads = jnp.ones(3), jnp.ones(3)
      >>> state = ax.adamw_init(params, config)
      >>> for scale in (1.0, 1.1, 0.9, 1.0, 100.0, 1.0):
      ...     params, state = ax.adamw_step(params, scale * grads, state, config)
      >>> int(state.count), int(state.skipped)
      (5, 1)

    References:
      OLMo-core's ``SkipStepOptimizer``, from whose defaults these are, Levanter's
      ``SkipStepConfig`` and MaxText's ``skip_step_on_spikes`` (there norms enter as they are, the
      loss has a window of its own, and the deviation is at least 0, 1e-6 and 0; in OLMo-core a
      norm that far below the mean is skipped too).
    """

    window: int = 128
    deviations: ArrayLike = 6.0

    def __post_init__(self) -> None:
        """Checks every argument."""
        window: Any = self.window
        if isinstance(window, bool) or not isinstance(window, numbers.Integral):
            raise TypeError(
                f"SpikeRule: window must be an integer, got {window!r}; it is an array's length, "
                "so it cannot be traced."
            )
        if window < 2:
            raise ValueError(
                f"SpikeRule: window must be at least 2, or norms have no deviation; got {window}."
            )
        options.scalar("deviations", self.deviations, lambda x: x > 0, "above 0", "SpikeRule")

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], Hashable]:
        """The number is a child, the window's length static."""
        return ((jax.tree_util.GetAttrKey("deviations"), self.deviations),), int(self.window)

    @classmethod
    def tree_unflatten(cls, window: int, children: Any) -> SpikeRule:
        """Rebuilds without checks, as ``AdamW`` does."""
        rule = object.__new__(cls)
        object.__setattr__(rule, "window", window)
        object.__setattr__(rule, "deviations", *children)
        return rule


def checked(value: Any) -> None:
    """Refuses what is neither a rule nor None."""
    if value is None or isinstance(value, SpikeRule):
        return
    if isinstance(value, Mapping):
        advice = "SpikeRule(**options) makes one of options"
    elif isinstance(value, type):
        advice = "call it: SpikeRule()"
    elif value is True:
        advice = "SpikeRule() has the defaults"
    elif value is False:
        advice = "None is for none"
    else:
        advice = "its numbers go into one: SpikeRule(window=..., deviations=...)"
    raise TypeError(
        f"AdamW: skip_spikes must be an adamw_xla.SpikeRule, or None, got "
        f"{repr(value) if isinstance(value, bool | int | float) else kind(value)}; {advice}."
    )


def judged(rule: SpikeRule, window: jax.Array, norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether a norm is no spike, a bool scalar, and the window, [N], with it at its end."""
    window, norm = jax.lax.stop_gradient((window, norm.astype(window.dtype)))
    is_there = window >= 0
    count = jnp.sum(is_there, dtype=window.dtype)
    # In units of the largest: squares of norms may overflow, or vanish.
    largest = jnp.max(window)
    unit = jnp.where(largest > 0, largest, 1)
    parts = jnp.where(is_there, window / unit, 0)
    mean = jnp.sum(parts) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(is_there, jnp.square(parts - mean), 0))
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    away = jnp.asarray(rule.deviations, window.dtype) * jnp.maximum(deviation, LEAST * mean)
    is_known = (count >= max(2, rule.window // 2)) & (largest > 0)
    # Not infinity: ``jax_debug_infs`` stops at it.
    bound = jnp.where(is_known, unit * (mean + away), np.finfo(window.dtype).max)
    # No concatenation: with explicit axes its operands must be on one mesh.
    is_last = np.arange(rule.window) == rule.window - 1
    entered = jnp.where(is_last, jnp.minimum(norm, bound), jnp.roll(window, -1))
    is_finite = jnp.isfinite(norm)
    return is_finite & (norm <= bound), jnp.where(is_finite, entered, window)


def resized(window: Any, length: int) -> jax.Array:
    """The newest norms of a window in one of this length."""
    found = jnp.asarray(window, np.float32)
    if length <= len(found):
        return found[len(found) - length :]
    return jnp.pad(found, (length - len(found), 0), constant_values=EMPTY)


def _to_bytes(window: int) -> bytes:
    return str(window).encode()


# Lets `jax.export` write functions that take a config with a rule.
export.register_pytree_node_serialization(
    SpikeRule,
    serialized_name="adamw_xla.SpikeRule",
    serialize_auxdata=_to_bytes,
    deserialize_auxdata=lambda data: int(bytes(data)),
)

_ALIASES = {
    "window": ("rolling_interval_length", "interval", "skip_step_interval", "length", "size", "n"),
    "deviations": ("sigma_factor", "scaling_factor", "skip_step_scaling_factor", "sigma", "k"),
}
SpikeRule.__init__ = calls.explained(  # type: ignore[method-assign]
    "SpikeRule",
    aliases={alias: name for name, aliases in _ALIASES.items() for alias in aliases},
    is_method=True,
)(SpikeRule.__init__)
