"""Info that is kept from step to step: before the first, and of one structure ever after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._config import AdamW
from adamw_xla._info.norms import nothing, told
from adamw_xla._info.step_info import StepInfo
from adamw_xla._inside.grouped import frozen_leaves
from adamw_xla._inside.update import hyper_dtype
from adamw_xla._rules.stacked import layers_of
from adamw_xla_lowering.contract import Sums


def untold(params: Any, config: AdamW, asked: Sums | None) -> StepInfo:
    """What no step has told yet: NaN, and not applied; of every leaf that has state."""
    assert asked is not None
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    frozen = frozen_leaves(config, params)
    dtype = hyper_dtype([p.dtype for i, p in enumerate(leaves) if i not in frozen])

    def put(row: Sequence[jax.Array]) -> Any:
        return treedef.unflatten(None if i in frozen else x for i, x in enumerate(row))

    rates = [jnp.full((), np.nan, dtype) for _ in range(2)]
    layers = layers_of(config.stacked, params)
    return told(nothing(dtype, layers, asked), rates, layers, put)


def like_before(info: StepInfo, before: StepInfo | None) -> StepInfo:
    """The info with NaN of leaves that had no gradient, of which ``before`` has a norm."""
    if not isinstance(before, StepInfo):  # a dict, of a checkpoint that was not told the class
        return info
    if info.per_leaf is None or before.per_leaf is None:
        return info

    def norm(old: Any, new: Any) -> Any:
        return jnp.full_like(old, np.nan) if new is None and old is not None else new

    per_leaf = jax.tree.map(norm, before.per_leaf, info.per_leaf, is_leaf=lambda x: x is None)
    return StepInfo(**{**vars(info), "per_leaf": per_leaf})
