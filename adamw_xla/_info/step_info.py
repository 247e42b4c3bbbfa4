"""``StepInfo``: what a step can tell, as a pytree of scalars."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
from jax import export
import numpy as np

from adamw_xla._saved import flax
from adamw_xla_lowering.contract import Sums

ReturnInfo: TypeAlias = Literal[False, True, "per_leaf"]


def asked(option: str, value: Any) -> Sums | None:
    """What an option of this kind asks for, as sums.

    Raises:
      ValueError: it is none of the three.
    """
    if isinstance(value, bool | np.bool_):
        return "tree" if value else None
    if isinstance(value, str) and value == "per_leaf":
        return "leaves"
    raise ValueError(
        f'{option}: must be False, True or "per_leaf", known when the step is traced, got '
        f"{value!r}."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LeafNorms:
    """L2 norms of each leaf: trees like the params, with None where nothing is updated.

    Scalars; of a leaf that the config's ``stacked`` says to hold layers, one for each: [layers].

    Attributes:
      grad_norm: of the gradient, as in ``StepInfo``.
      param_norm: of the new param.
      update_norm: of what was added to it.
    """

    grad_norm: Any
    param_norm: Any
    update_norm: Any

    def __post_init__(self) -> None:
        """Makes it known to Flax' checkpoints."""
        flax.register(type(self), is_state=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What one call of ``adamw_step`` tells of itself.

    All are scalars on the device, float32 (float64 where a param is), but for ``applied``. The
    norms are of the leaves that are updated (not of what is frozen), over all devices. In a call
    that only adds to the sum of gradients they are NaN, and so is ``clip_factor``: nothing was
    measured. Norms of params and updates are infinite from 1.8e19 on (in float32); the gradient's
    is right for every finite gradient. What is below 1.1e-19 counts as 0 in them.

    Attributes:
      grad_norm: L2 norm of the gradient (under accumulation, of the mean) before anything is
        clipped, and after ``loss_scale_factor`` was divided out.
      clip_factor: what ``global_clipnorm`` multiplied the gradient by, at most 1; with ``clipnorm``
        the smallest of its factors; 1 without either.
      param_norm: L2 norm of the new params, as they are stored; where the state holds their
        masters, of their values without.
      update_norm: L2 norm of what was added to the params, with weight decay, before it is rounded
        to their dtypes; 0 of a step that is skipped.
      learning_rate: of this step: the config's, or what took its place; groups may have others.
      weight_decay: likewise.
      applied: a bool: whether params and state were updated: not where a step was skipped, or only
        added to the sum of gradients.
      per_leaf: with ``return_info="per_leaf"``, the norms of each leaf.
    """

    grad_norm: jax.Array
    clip_factor: jax.Array
    param_norm: jax.Array
    update_norm: jax.Array
    learning_rate: jax.Array
    weight_decay: jax.Array
    applied: jax.Array
    per_leaf: LeafNorms | None = None

    def __post_init__(self) -> None:
        """Makes it known to Flax' checkpoints."""
        flax.register(type(self), is_state=False)


for _class in (LeafNorms, StepInfo):  # lets `jax.export` write functions that return them
    export.register_pytree_node_serialization(
        _class,
        serialized_name=f"adamw_xla.{_class.__name__}",
        serialize_auxdata=lambda aux: b"",
        deserialize_auxdata=lambda data: (),
    )
