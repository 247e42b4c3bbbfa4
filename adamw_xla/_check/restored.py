"""What a checkpoint returns for a state when it is not told its class: dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

NATIVE_STATE = "adamw_xla.AdamWState"
OPTAX_STATE = "adamw_xla.optax.AdamWOptState"
STOCK_STATE = "optax.ScaleByAdamState"

_OPTIONAL = tuple(
    (largest, "ema", "accumulated", "micro_step", "skipped") for largest in ("v_max", "nu_max")
)
_LATER = ("words", "remainder", "norms")

FIELDS = {
    NATIVE_STATE: ("count", "m", "v", *_OPTIONAL[0], *_LATER),
    OPTAX_STATE: ("count", "mu", "nu", *_OPTIONAL[1], *_LATER, "info"),
    STOCK_STATE: ("count", "mu", "nu"),
}
"""The fields of each class that holds AdamW's state, in order.

The count is never None, and the moments behind it are None where there are words alone.
"""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A part of a tree that has the fields of a state, and not its class.

    Attributes:
      where: the part, as an expression.
      state_class: the class that it was saved from.
      stars: how its fields are passed on, ``**`` or ``*``.
      lacking: the fields that each state has, and this lacks.
      unknown: the keys that are no field of the class.
    """

    where: str
    state_class: str
    stars: str
    lacking: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def call(self) -> str:
        """What makes a state of it."""
        if not self.unknown:
            return f"{self.state_class}({self.stars}{self.where})"
        known = f"{{k: x for k, x in {self.where}.items() if k not in {self.unknown}}}"
        return f"{self.state_class}(**{known})"


def find(tree: Any, where: str, state_class: str | None = None) -> Restored | None:
    """The first part of a tree that was a state; None if there is none.

    Args:
      tree: what a checkpoint returned.
      where: what it is called.
      state_class: what it was where its fields do not tell; None: of those without names, one of
        optax' two.
    """
    found = _of_mapping(tree, where, state_class) if isinstance(tree, Mapping) else None
    if found is None and type(tree) in (tuple, list):
        found = _of_sequence(tree, where, state_class)
    if found is not None:
        return found
    inner = (find(part, f"{where}[{key!r}]", state_class) for key, part in parts(tree))
    return next((x for x in inner if x is not None), None)


def parts(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The members of a dict, list or tuple, each with its key."""
    if isinstance(tree, Mapping):
        yield from tree.items()
    elif type(tree) in (tuple, list):
        yield from enumerate(tree)


def _of_mapping(tree: Mapping[Any, Any], where: str, state_class: str | None) -> Restored | None:
    shared = {name: len({*fields} & {*tree}) for name, fields in FIELDS.items()}
    name = max(shared, key=lambda x: (shared[x], x == state_class, -len(FIELDS[x])))
    fields = FIELDS[name]
    is_in_words = tree.get("words") is not None and "words" in fields
    needed = ("count", "words") if is_in_words else fields[:3]
    moments = [x for x in needed[1:] if tree.get(x) is not None]
    if not moments or ("count" not in tree and len(moments) < 2 and shared[name] < 4):
        return None
    if name == STOCK_STATE and tree.keys() > {*fields}:
        name = OPTAX_STATE
    lacking = tuple(x for x in needed if tree.get(x) is None)
    unknown = tuple(x for x in tree if x not in fields)
    return Restored(where, name, "**", lacking, unknown)


def _of_sequence(tree: Any, where: str, state_class: str | None) -> Restored | None:
    if len(tree) < 3 or not is_count(tree[0]) or is_count(tree[1]):
        return None
    name = state_class or (STOCK_STATE if len(tree) == 3 else OPTAX_STATE)
    return Restored(where, name, "*") if len(tree) <= len(FIELDS[name]) else None


def is_count(value: Any) -> bool:
    """Whether this may be a counter: an integer, or an array of one."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return type(value) is int
    return jnp.issubdtype(dtype, np.integer) and np.shape(value) == ()
