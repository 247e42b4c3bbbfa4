"""What follows from a decay (a beta, a momentum): ``1 - decay`` and ``log(decay)``.

The float32 nearest to 0.999 is 1.3e-8 off, and one less it is 1.3e-5 off, relative. So what
follows is computed in float64 where the decay is known, and goes beside it where it is traced.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

_LEAST_LOG = math.log(np.finfo(np.float32).tiny)
"""Stands for log(0), which is no number: to any power it is 0 beside 1."""


class Decay(NamedTuple):
    """A decay with what follows from it; each a Python float where it is known now."""

    value: Any
    complement: Any
    log: Any = None


def of(value: Any) -> Decay:
    """A decay that is a scalar; known, in float64, and traced in its own dtype."""
    if not isinstance(value, jax.core.Tracer):
        number = float(value)
        return Decay(number, 1 - number, math.log(number) if number > 0 else _LEAST_LOG)
    wide = value.astype(jnp.promote_types(value.dtype, np.float32))
    return Decay(wide, 1 - wide, jnp.log(wide))


def of_complement(complement: Any) -> Decay:
    """The decay that is one less this: a Python float where it is known, else an array."""
    if isinstance(complement, float):
        log = math.log1p(-complement) if complement < 1 else _LEAST_LOG
        return Decay(1 - complement, complement, log)
    return Decay(1 - complement, complement, lax.log1p(-complement))


class Beta:
    """A beta at update ``t``; what follows from it is made once, when a row first reads it."""

    def __init__(self, decay: Decay, t: jax.Array) -> None:
        self.value, self.complement, self._log = decay
        self.t = t

    def _power_minus_one(self, t: jax.Array) -> jax.Array:
        """``beta**t - 1`` without cancellation."""
        log = self._log
        known = isinstance(log, float)
        same: Any = np.asarray(log, t.dtype) if known else lax.convert_element_type(log, t.dtype)
        return lax.expm1(lax.mul(t, same))

    @functools.cached_property
    def minus_bias(self) -> jax.Array:
        """``beta**t - 1``."""
        return self._power_minus_one(self.t)

    @functools.cached_property
    def following(self) -> jax.Array:
        """``beta**(t + 1) - 1``."""
        return self._power_minus_one(lax.add(self.t, np.ones((), self.t.dtype)))

    @functools.cached_property
    def bias(self) -> jax.Array:
        """``1 - beta**t``."""
        return lax.neg(self.minus_bias)

    @functools.cached_property
    def root(self) -> jax.Array:
        """The square root of ``bias``."""
        return lax.sqrt(self.bias)

    @functools.cached_property
    def inverse_root(self) -> jax.Array:
        """1 over that."""
        return lax.div(np.ones((), self.root.dtype), self.root)


def known(holder: Any, name: str) -> Decay:
    """The decay of this name, with what was known of it when its config was flattened."""
    kept: dict[str, Decay] = holder.__dict__.setdefault("_decays", {})
    if name in kept:
        return kept[name]
    found = of(getattr(holder, name))
    if isinstance(found.log, float):  # a tracer made here may not outlive the trace
        kept[name] = found
    return found


def rounded(value: Any, beside: Decay, dtype: DTypeLike) -> Decay:
    """A traced decay in ``dtype``, corrected by what was known of it before it was traced.

    What is beside it may be of another decay: people map functions over the leaves of a config.
    It counts where it is what follows from ``value``, but for rounding. Derivatives are those of
    ``value`` alone.
    """
    given = jnp.asarray(value)
    decay = lax.convert_element_type(given, dtype).reshape(())
    kinds = [x for x in (given.dtype, np.dtype(dtype)) if jnp.issubdtype(x, np.floating)]
    unit = max(2.0 ** -jnp.finfo(kind).nmant for kind in kinds)  # type: ignore[no-untyped-call]
    one = np.ones((), dtype)
    complement = jnp.asarray(beside.complement, dtype).reshape(())
    complement = _corrected(lax.sub(one, decay), complement, unit)
    if beside.log is None:
        return Decay(decay, complement)
    log = jnp.asarray(beside.log, dtype).reshape(())
    slack = lax.mul(lax.add(one, lax.abs(log)), one * (2 * unit))
    return Decay(decay, complement, _corrected(lax.log(decay), log, slack))


def _corrected(rough: jax.Array, fine: jax.Array, slack: Any) -> jax.Array:
    """``fine`` where ``rough`` is it but for ``slack``, with the derivatives of ``rough``."""
    off = lax.stop_gradient(lax.sub(fine, rough))
    return lax.add(rough, lax.select(lax.abs(off) <= slack, off, jnp.zeros_like(off)))
