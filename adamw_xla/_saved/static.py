"""What of a config is no number: as a hashable, and as bytes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

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


class Compared:
    """Equal to what is flattened alike, and hashable, whatever the arrays in it are."""

    def _key(self) -> Hashable:
        children, static = self.tree_flatten_with_keys()  # type: ignore[attr-defined]
        return tuple(hashable(value) for _, value in children), static

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, type(self)) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())


def hashable(value: Any) -> Hashable:
    """A number as a hashable; what is computed with otherwise, is not equal.

    Of JAX's arrays a step computes in their dtype, of all others in float64.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            "AdamW: a config with a traced number has no hash, and is equal to none; pass it to "
            "jax.jit as an argument that is not static."
        )
    if isinstance(value, jax.Array | np.ndarray | np.generic) and np.ndim(value) == 0:
        return isinstance(value, jax.Array), str(value.dtype), value.item()
    return value


_ADVICE = "close over the config in the function that is exported, in place of passing it."


def _is_callable(option: str) -> TypeError:
    return TypeError(f"AdamW: {option} is a callable, which no file holds; {_ADVICE}")


def to_bytes(names: Sequence[str], static: Any) -> bytes:
    """What of a config is no number, for ``jax.export``; ``names`` are its choices'.

    Raises:
      TypeError: it is nothing that a file can hold; names the option.
    """
    schedules, choices, mask, axis_names, stacked, rules = static
    if schedules:
        raise _is_callable(schedules[0][0])
    for name, value in {"weight_decay_mask": mask, "stacked": stacked}.items():
        if not isinstance(value, Static):
            raise _is_callable(name)
    values = (x.name if isinstance(x, np.dtype) else x for x in choices)
    fields = dict(zip(names, values, strict=True)) | {"rules": rules}
    trees = {
        "weight_decay_mask": (mask, "bools"),
        "axis_names": (axis_names, "names and specs"),
        "stacked": (stacked, "bools"),
    }
    for name, (kept, leaves) in trees.items():
        try:
            fields[name] = _to_json(kept.tree())
        except TypeError as error:
            raise TypeError(
                f"AdamW: {name} has {error} in it, and a file holds {leaves} in dicts, lists "
                f"and tuples; {_ADVICE}"
            ) from None
    return json.dumps(fields).encode()


NEWER = {
    "state_format": "moments",
    "params_rounding": "nearest",
    "master": None,
    "maximize": False,
    "decay_times_lr": True,
    "cautious_decay": False,
}
"""Choices that files of 0.1.0 do not have, and what they stood for."""


def from_bytes(names: Sequence[str], data: bytes) -> Any:
    """What ``to_bytes`` wrote."""
    fields = json.loads(data)
    mask = Static.of(_from_json(fields.pop("weight_decay_mask")))
    # Files of 0.1.0 have none of these.
    axis_names, stacked = (
        Static.of(_from_json(fields.pop(name, None))) for name in ("axis_names", "stacked")
    )
    if fields["state_dtype"] is not None:
        fields["state_dtype"] = jnp.dtype(fields["state_dtype"])
    rules = tuple(fields.pop("rules", ()))
    choices = tuple(fields.get(name, NEWER.get(name)) for name in names)
    return (), choices, mask, axis_names, stacked, rules


def group_to_bytes(static: Any) -> bytes:
    """What of a group is no number, likewise.

    Raises:
      TypeError: it is a callable; names it.
    """
    match, schedules, frozen = static
    if not isinstance(match, str):
        raise _is_callable("match of a Group")
    if schedules:
        raise _is_callable(f"{schedules[0][0]} of Group({match!r})")
    return json.dumps({"match": match, "frozen": bool(frozen)}).encode()


def group_from_bytes(data: bytes) -> Any:
    """What ``group_to_bytes`` wrote."""
    fields = json.loads(data)
    return fields["match"], (), fields["frozen"]


def _to_json(tree: Any) -> Any:
    """A tree of None, bools, names, specs, lists, tuples and dicts, as what JSON can hold."""
    if tree is None or isinstance(tree, bool | str):
        return tree
    if isinstance(tree, PartitionSpec):
        return {"spec": [_to_json(x) for x in tree]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_to_json(x) for x in tree]}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _to_json(x) for key, x in tree.items()}}
    raise TypeError(f"a {type(tree).__name__}")


def _from_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _from_json(x) for key, x in content.items()}
    parts = map(_from_json, content)
    if kind == "spec":
        spec: Any = PartitionSpec
        return spec(*parts)
    return {"list": list, "tuple": tuple}[kind](parts)
