"""A state that lies elsewhere than its params: its shardings, leaf by leaf."""

import dataclasses
from typing import Any

from jax.sharding import Sharding

from adamw_xla._check import places, trees
from adamw_xla._config import AdamW
from adamw_xla._state import COUNTERS, AdamWState, built

NAME = "state_shardings"


def columns_of(
    shardings: Any, params: Any, treedef: Any, config: AdamW
) -> dict[str, list[Sharding | None]]:
    """For each field that mirrors the params where each leaf's state is to lie.

    Args:
      shardings: an ``AdamWState`` of them, as ``sharding.state_shardings`` makes.
      params: the params.
      treedef: their structure.
      config: the hyperparameters.

    Returns:
      None in the place of a leaf that has no state.
    """
    if not isinstance(shardings, AdamWState):
        raise places.not_of_a_state(NAME, shardings)
    needed = built(config, lambda field: field, lambda: "")
    columns = {}
    for field in (x.name for x in dataclasses.fields(needed)):
        given, is_needed = getattr(shardings, field), getattr(needed, field) is not None
        if (given is not None) != is_needed:
            raise places.of_another_config(NAME, field, is_needed)
        argument = f"{NAME}.{field}"
        if field in COUNTERS and is_needed:
            places.of_leaf(argument, given, 0, given)
        elif is_needed:
            flat = trees.like_params(argument, params, treedef, given)
            columns[field] = [
                None if x is None else places.of_leaf(argument, params, i, x)
                for i, x in enumerate(flat)
            ]
    return columns
