"""Checks of what is stored otherwise than it is computed with, and what does not go with it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._check.leaves import path

DTYPES = {"words": np.dtype(jnp.bfloat16), "remainder": np.dtype(np.int16)}
"""Of fields whose dtype no option changes."""


def check_options(c: Any) -> None:
    """Refuses options of a config that contradict each other."""
    if c.state_format == "word16" and c.amsgrad:
        raise ValueError(
            'AdamW: amsgrad does not go with state_format="word16": v is rounded at random there, '
            "and the largest of its values so far would be the largest of the errors; use "
            'state_format="moments".'
        )
    if c.state_format == "word16" and c.state_dtype is not None:
        raise ValueError(
            f'AdamW: state_dtype={c.state_dtype} does not go with state_format="word16", whose '
            "words are bfloat16 and all other state float32; leave state_dtype out."
        )
    if c.master == "split" and c.params_rounding == "stochastic":
        raise ValueError(
            'AdamW: params_rounding="stochastic" does not go with master="split", where nothing '
            "is lost that it could make up for; leave one of them out."
        )


def no_nan(argument: str, tree: Any, index: int, moment: Any) -> None:
    """Refuses a moment that is to become words and has a NaN; of a traced one nothing is known.

    Args:
      argument: what the caller calls its tree.
      tree: has the path.
      index: of the leaf.
      moment: the leaf, in the device's memory.

    Raises:
      ValueError: names the leaf.
    """
    if isinstance(moment, jax.core.Tracer):
        return
    found = _has_nan(moment)
    if not isinstance(found, jax.core.Tracer) and found:  # traced where a trace closes over it
        raise ValueError(
            f"{argument}{path(tree, index)}: has a NaN, which words cannot hold: it would become a "
            'number. Go on with state_format="moments", which keeps it, or from a state that was '
            "saved before it came up."
        )


@jax.jit
def _has_nan(x: jax.Array) -> jax.Array:
    return jnp.any(jnp.isnan(x))


def check_param(params_tree: Any, index: int, param: Any, config: Any) -> None:
    """Refuses a param that cannot have the formats of the config.

    Raises:
      TypeError: names the leaf.
    """
    if config.state_format == "word16" and param.dtype == np.float64:
        raise TypeError(
            f"params{path(params_tree, index)}: is float64, and words hold float32 moments; use "
            'AdamW(state_format="moments"), or float32 params.'
        )
    if param.dtype != np.float16:
        return
    for option, value in {"master": "split", "params_rounding": "stochastic"}.items():
        if getattr(config, option) == value:
            raise TypeError(
                f"params{path(params_tree, index)}: is float16, and {option}={value!r} is for "
                f"bfloat16 params; cast it to bfloat16, or leave {option} out."
            )
