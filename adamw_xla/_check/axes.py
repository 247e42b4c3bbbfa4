"""Checks of ``axis_names``: over which axes of the mesh the parts of a leaf lie.

It is a tuple of names, of which types tell which ones a leaf varies over, or a tree that says it
of each leaf: a prefix of the params' tree, of tuples of names or ``PartitionSpec``.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding, PartitionSpec

from adamw_xla._check import trees
from adamw_xla._check.words import Words

Axes: TypeAlias = frozenset[str]


def canonical(value: Any) -> Any:
    """The value as a config keeps it, without shardings and sets; refuses what it may not be."""
    if value is None:
        return None
    if isinstance(value, set | frozenset):
        value = tuple(sorted(value, key=str))
    value = jax.tree.map(_as_spec, value, is_leaf=_is_of_one_leaf)
    for key, entry in jax.tree_util.tree_leaves_with_path(value, is_leaf=_is_of_one_leaf):
        if not (_is_of_one_leaf(entry) and _is_of_names(entry)):
            raise TypeError(
                f"AdamW: axis_names{jax.tree_util.keystr(key)} must be a tuple of names of mesh "
                f"axes, or a jax.sharding.PartitionSpec of such, got {entry!r}; one name is "
                "('data',), none is (), and a tree of them is a prefix of the params'."
            )
    return value


def _as_spec(entry: Any) -> Any:
    return entry.spec if isinstance(entry, NamedSharding) else entry


def is_flat(value: Any) -> bool:
    """Whether this is one tuple of names, for types to tell which of them are a leaf's."""
    return type(value) is tuple and all(isinstance(name, str) for name in value)


def _is_of_one_leaf(value: Any) -> bool:
    return isinstance(value, PartitionSpec) or is_flat(value)


def _is_of_names(entry: Any) -> bool:
    return all(isinstance(name, str) for name in _listed(entry))


def _listed(entry: Any) -> list[Any]:
    """The names in a tuple of them, or in a spec's entries."""
    parts = [part if isinstance(part, tuple) else (part,) for part in entry]
    return [name for part in parts for name in part if name is not None]


def named(value: Any) -> list[str]:
    """All names in ``axis_names``, each once."""
    entries = jax.tree.leaves(value, is_leaf=_is_of_one_leaf)
    return list(dict.fromkeys(name for entry in entries for name in _listed(entry)))


def of_each_leaf(value: Any, params_tree: Any, count: int) -> list[Axes]:
    """What a tree says of each of the ``count`` leaves."""
    entries = trees.of_each_leaf("axis_names", params_tree, value, _is_of_one_leaf)
    assert len(entries) == count
    return [frozenset(_listed(entry)) for entry in entries]


def of_axis_0(value: Any, params_tree: Any, count: int) -> list[Axes | None]:
    """What specs say of axis 0 of each of the ``count`` leaves; None where names are given."""
    if is_flat(value):
        return [None] * count
    entries = trees.of_each_leaf("axis_names", params_tree, value, _is_of_one_leaf)
    return [
        frozenset(_listed(entry[:1])) if isinstance(entry, PartitionSpec) else None
        for entry in entries
    ]


def known(names: Iterable[str], manual: Collection[str], mesh: Sequence[str]) -> None:
    """Refuses a name that is none of the manual axes."""
    for name in names:
        if name in manual:
            continue
        if name in mesh:
            raise ValueError(
                f"axis_names: {name!r} is an axis of the mesh that is not manual here, and XLA "
                f"sums over it by itself; leave it out. Manual is {_spoken(manual) or 'none'}."
            )
        if _is_of_a_batch(name):
            raise ValueError(
                f"axis_names: {name!r} is an axis of jax.vmap, and not of a mesh; each member of "
                "a batch has a norm of its own. Leave it out."
            )
        if mesh:
            raise ValueError(
                f"axis_names: {name!r} is no axis of this mesh, which has {_spoken(mesh)}."
            )


def _is_of_a_batch(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _spoken(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


# ------------------------------------------------------------------ refusals, as exceptions


def not_said(words: Words, option: str, manual: Sequence[str], types_tell: bool) -> ValueError:
    """The error where a norm is needed, and nobody says of whose parts it is."""
    if types_tell:
        how = (
            f"axis_names={tuple(manual)!r}, and each leaf is summed over those of them that it "
            "varies over"
        )
    else:
        how = (
            "axis_names=specs, the params' tree of PartitionSpecs as in in_specs, since with "
            "check_vma=False (and in jax.pmap) types do not tell which leaves are sharded"
        )
    return ValueError(
        f"axis_names: {option} needs to know, inside of jax.shard_map, whose parts of a gradient "
        f"are of one norm, and {words.options} does not say. Give it {how}; or axis_names=() where "
        "each device holds all that it is to count: whole leaves, or a model of its own."
    )


def needs_a_tree(names: Sequence[str]) -> ValueError:
    """The error for names alone where types do not tell."""
    return ValueError(
        f"axis_names: with check_vma=False types do not tell which leaves are sharded over "
        f"{_spoken(names)}; say it of each leaf with the params' tree of PartitionSpecs (a prefix "
        "will do), as in in_specs of jax.shard_map, or leave check_vma on."
    )


def not_averaged(where: str, axes: Axes) -> ValueError:
    """The error for a gradient that varies where its param does not; ``where`` is its path."""
    names = tuple(sorted(axes))
    return ValueError(
        f"grads{where}: varies over {_spoken(names)}, which params{where} does not: it is not yet "
        "averaged over these devices, and the norm is that of the average. Pass "
        f"jax.lax.pmean(grads, {names!r})."
    )


def contradicts_types(where: str, said: Axes, varying: Axes) -> ValueError:
    """The error for a leaf of which ``axis_names`` says other axes than its type."""
    said_, varying_ = (tuple(sorted(axes)) for axes in (said, varying))
    return ValueError(
        f"axis_names: says {said_!r} of params{where}, which by its type varies over {varying_!r}. "
        "Give it the specs that the params have in in_specs of jax.shard_map; or a tuple of names "
        "alone, and types tell the rest."
    )


def over_layers(where: str, names: Sequence[str], first: Axes | None) -> ValueError:
    """The error for layers that lie, or may lie, on several devices; ``first`` are axis 0's."""
    if first:
        return ValueError(
            f"stacked: axis 0 of params{where}, along which layers lie, is cut over "
            f"{_spoken(sorted(first))}, and norms of layers, for clipnorm or return_info, need all "
            "layers on each device inside of jax.shard_map; cut another axis, or leave the step to "
            "XLA, outside of jax.shard_map."
        )
    return ValueError(
        f"axis_names: params{where} holds layers, each with a norm of its own, and is cut over "
        f"{_spoken(names)}; names do not say whether along axis 0. Give axis_names the params' "
        "tree of PartitionSpecs, as in in_specs of jax.shard_map."
    )
