"""How ``flax.serialization`` writes and reads a dataclass; nothing here imports Flax."""

from collections.abc import Mapping
import dataclasses
import sys
from typing import Any

import jax


def register(cls: type, *, is_state: bool = True) -> None:
    """Makes a dataclass one of those that the ``flax.serialization`` of this process knows.

    Where Flax is in use; call it with each object, for Flax may be imported after the class.

    Args:
      cls: the dataclass.
      is_state: False of what no training goes on from: where a file has it otherwise, or has it
        not, it stays as the template has it.
    """
    serialization: Any = sys.modules.get("flax.serialization")
    # A module that is yet being imported has no such function.
    is_known = getattr(serialization, "is_serializable", lambda _: True)
    if not is_known(cls):
        read = _from_dict if is_state else _like_template
        serialization.register_serialization_state(cls, _to_dict, read)


def _to_dict(value: Any) -> dict[str, Any]:
    to_state_dict = sys.modules["flax.serialization"].to_state_dict
    return {f.name: to_state_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _like_template(template: Any, found: Any) -> Any:
    """What is found, if it is built as the template is; else the template."""
    serialization: Any = sys.modules["flax.serialization"]
    wanted: Any = jax.tree.structure(_to_dict(template))
    if wanted != jax.tree.structure(found):
        return template
    names = [f.name for f in dataclasses.fields(template)]
    read = serialization.from_state_dict
    return type(template)(**{x: read(getattr(template, x), found[x], x) for x in names})


NEWER = ("words", "remainder", "norms")
"""Fields that files of 0.1.0 do not have, and did not need."""


def _from_dict(template: Any, found: Mapping[str, Any]) -> Any:
    """``template`` with the fields of ``found``, which must have the same."""
    from_state_dict = sys.modules["flax.serialization"].from_state_dict
    names = [f.name for f in dataclasses.fields(template)]
    if set(names) - {*NEWER} != set(found) - {*NEWER}:
        raise ValueError(
            f"{type(template).__name__}: what is restored has the fields {sorted(found)}; must "
            f"have {sorted(names)}: it was saved from something else, or by another version, whose "
            "state adamw_xla.adapt_state takes as the dict that msgpack_restore returns."
        )
    found = dict.fromkeys(NEWER) | dict(found)
    for name in names:
        if (getattr(template, name) is None) != (found[name] is None):
            has, lacks = ("template", "file") if found[name] is None else ("file", "template")
            raise ValueError(
                f"{type(template).__name__}.{name}: the {has} has it, and the {lacks} lacks it; "
                "make the template with the options that the state was saved with, and then "
                "adamw_xla.adapt_state(state, params, config) turns others on or off."
            )
    fields = {name: from_state_dict(getattr(template, name), found[name], name) for name in names}
    return type(template)(**fields)
