"""A state that lies elsewhere than its params: its shardings, leaf by leaf."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
from jax.sharding import Sharding

from adamw_xla._check import places, trees
from adamw_xla._config import AdamW
from adamw_xla._inside.update import Backend
from adamw_xla._placement import apart, in_device_memory, moved_beside, moved_to
from adamw_xla._state import OF_ALL, AdamWState, built
from adamw_xla_lowering import STATE_KINDS, UpdateResult

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
    needed = built(config, lambda field: field, lambda field: field)
    columns = {}
    for field in (x.name for x in dataclasses.fields(needed)):
        given, is_needed = getattr(shardings, field), getattr(needed, field) is not None
        if (given is not None) != is_needed:
            raise places.of_another_config(NAME, field, is_needed)
        argument = f"{NAME}.{field}"
        if field in OF_ALL and is_needed:
            places.of_leaf(argument, given, 0, given)
        elif is_needed:
            flat = trees.like_params(argument, params, treedef, given)
            found = enumerate(flat)
            columns[field] = [
                None if x is None else places.of_leaf(argument, params, i, x) for i, x in found
            ]
            places.fit(argument, params, jax.tree.leaves(params), columns[field])
            places.not_manual(argument, params, columns[field])
    return columns


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the state of some leaves lies, and their update is made.

    Attributes:
      columns: for each field that mirrors the params the places; None for one that may be anywhere.
    """

    columns: Mapping[str, Sequence[Sharding | None]]

    @property
    def _first(self) -> Sequence[Sharding | None]:
        """Where m lies, or what stands in place of it."""
        return next(self.columns[x] for x in STATE_KINDS if x in self.columns)

    def fetched(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        """State where the update is made: where ``m`` lies, in the device's memory."""
        return _moved(xs, [place and in_device_memory(place) for place in self._first])

    def parts_of(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        """Params or gradients, which lie elsewhere, where the update is made."""
        return self.fetched([apart(x) for x in xs])

    def kept(self, field: str, xs: Sequence[jax.Array]) -> list[jax.Array]:
        """New state where its field lies."""
        return _moved(xs, self.columns[field])

    def around(self, inner: Backend) -> Backend:
        """A backend that makes the update where the state lies, and gives params back as they lay.

        Only params and gradients are moved: m and v never are, but between memories.
        """

        def update(hyper: Any, params: Any, grads: Any, **rest: Any) -> UpdateResult:
            if not inner.offload:  # else fetched a few leaves at a time
                rest |= {kind: self.fetched(rest[kind]) for kind in STATE_KINDS if kind in rest}
            new = inner.update(hyper, self.parts_of(params), self.fetched(grads), **rest)
            kept: dict[str, Any] = {
                k: self.kept(k, xs) for k, xs in new._asdict().items() if k in self.columns
            }
            whole = map(moved_beside, self.fetched(new.params), params)
            return new._replace(params=list(whole), **kept)

        return inner._replace(update=update)


def _moved(xs: Sequence[Any], spots: Sequence[Sharding | None]) -> list[Any]:
    pairs = zip(xs, spots, strict=True)
    return [x if place is None else moved_to(x, place) for x, place in pairs]
