"""What the last step told, in one more of the optimizer's variables.

Nothing here imports Keras: a variable is whatever has a ``value``.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._info.norms import Measured, told
from adamw_xla._info.step_info import StepInfo
from adamw_xla._inside.hyper import Scalar

_FIELDS = tuple(f.name for f in dataclasses.fields(StepInfo) if f.name != "per_leaf")
LENGTH = len(_FIELDS)


@dataclasses.dataclass(frozen=True)
class Kept:
    """The variable, which Keras does not find by itself as it would in an attribute.

    One, and not one for each number: these may share arrays, which cannot be donated twice.

    Attributes:
      variable: of shape [LENGTH]; NaN before the first step.
    """

    variable: Any

    def info(self) -> StepInfo:
        """What it holds at this moment."""
        return unpacked(self.variable.value)


def packed(measured: Measured, rates: Sequence[Scalar]) -> jax.Array:
    """The numbers of a step in a row.

    Args:
      measured: of the step.
      rates: learning rate and weight decay.
    """
    dtype = measured.grad_norm.dtype
    info = told(measured, [jnp.asarray(x, dtype) for x in rates], (), list)
    return jnp.stack([getattr(info, name).astype(dtype) for name in _FIELDS])


def unpacked(row: jax.Array) -> StepInfo:
    """The row as a ``StepInfo``."""
    numbers: list[Any] = [*jnp.unstack(row)]
    info = StepInfo(*numbers)
    return dataclasses.replace(info, applied=info.applied == 1)  # NaN is not applied


def nothing_told() -> StepInfo:
    """What no step has told yet."""
    return unpacked(jnp.full(LENGTH, jnp.nan, np.float32))
