"""What of a config is no number: as a hashable."""

from __future__ import annotations

from collections.abc import Hashable
import dataclasses
from typing import Any

import jax

from adamw_xla._check.trees import is_known_bool


@dataclasses.dataclass(frozen=True)
class Static:
    """A pytree of hashables, as one hashable."""

    leaves: tuple[Hashable, ...]
    treedef: Any

    @classmethod
    def of(cls, tree: Any) -> Static:
        """The tree; arrays of one bool become bools, since arrays have no hash."""
        leaves, treedef = jax.tree.flatten(tree)
        known = (bool(x) if is_known_bool(x) else x for x in leaves)
        return cls(tuple(known), treedef)

    def tree(self) -> Any:
        """The tree again."""
        return jax.tree.unflatten(self.treedef, self.leaves)
