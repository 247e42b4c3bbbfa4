"""Checks of shardings, and of the meshes and axes that they name."""

from collections.abc import Sequence
import dataclasses
import difflib
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec, Sharding

from adamw_xla._check.leaves import kind, path
from adamw_xla._check.words import NATIVE, Words

_BUILD = "adamw_xla.sharding.state_shardings(params, config)"


def words(call: str) -> Words:
    """The package's own words, for another call."""
    return dataclasses.replace(NATIVE, call=call)


def of_tree(argument: str, tree: Any, leaves: Sequence[Any]) -> list[Sharding]:
    """The shardings in a tree of them, or of a tree of arrays."""
    if not leaves:
        raise ValueError(f"{argument}: has no leaf, so nothing says on which devices it lies.")
    return [of_leaf(argument, tree, i, x) for i, x in enumerate(leaves)]


def of_leaf(argument: str, tree: Any, index: int, leaf: Any) -> Sharding:
    """A sharding, or that of an array; ``tree`` has the leaf's path."""
    if isinstance(leaf, Sharding):
        return leaf
    is_traced = isinstance(leaf, jax.core.Tracer)
    found = None if is_traced else getattr(leaf, "sharding", None)
    if isinstance(found, Sharding):
        return found
    if isinstance(leaf, PartitionSpec):
        what = "is a PartitionSpec, which names no mesh"
        advice = f"give jax.sharding.NamedSharding(mesh, {leaf})"
    elif is_traced:
        what = "is traced, and where it lies is known when the program is compiled"
        advice = "build the shardings outside of the traced function"
    else:
        what = f"got {kind(leaf)}, which has no sharding"
        advice = "give a jax.sharding.Sharding, or an array or jax.ShapeDtypeStruct that has one"
    raise TypeError(f"{argument}{path(tree, index)}: {what}; {advice}.")


def fit(argument: str, tree: Any, leaves: Sequence[Any], found: Sequence[Sharding | None]) -> None:
    """Refuses a sharding that cannot be a leaf's, of whose shape its state is."""
    for i, (leaf, place) in enumerate(zip(leaves, found, strict=True)):
        if place is None:
            continue
        shape = tuple(getattr(leaf, "shape", ()))
        try:
            place.shard_shape(shape)
        except (IndexError, ValueError):
            raise ValueError(
                f"{argument}{path(tree, i)}: {place} cannot cut params{path(tree, i)}, of shape "
                f"{shape}; name no more dimensions than that, and axes that divide them."
            ) from None


def not_manual(argument: str, tree: Any, found: Sequence[Sharding | None]) -> None:
    """Refuses shardings where axes are manual, also of others: XLA aborts on what that needs."""
    manual = sorted(jax.sharding.get_abstract_mesh().manual_axes)
    for i, place in enumerate(found if manual else ()):
        if place is not None:
            raise ValueError(
                f"{argument}{path(tree, i)}: inside of jax.shard_map the axes {manual} are manual, "
                "and each device updates the part that it is given; leave state_shardings out. (To "
                "cut the state there, give it in_specs of its own, and the gradients and params of "
                "its part: jax.lax.psum_scatter, and jax.lax.all_gather of new params.)"
            )


def not_of_a_state(argument: str, value: Any) -> TypeError:
    """The error for something else than the shardings of a state."""
    return TypeError(
        f"{argument}: must be an AdamWState of shardings, got {kind(value)}; {_BUILD} makes it, "
        "also of a tree of shardings in place of params."
    )


def of_another_config(argument: str, field: str, needed: bool) -> ValueError:
    """The error for shardings with, or without, a field that the config has not, or has."""
    has, does = ("lack it", "has") if needed else ("have it", "does not have")
    return ValueError(
        f"{argument}.{field}: the shardings {has}, and a state of the config {does} it: they were "
        f"built for another config; {_BUILD} builds them for this one."
    )


def axes_of(function: str, mesh: Any, axis: Any) -> tuple[str, ...]:
    """The names of axes, if a mesh has them."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"{function}: mesh must be a jax.sharding.Mesh, got {kind(mesh)}.")
    if not isinstance(axis, str | tuple | list):
        raise TypeError(
            f"{function}: axis must be the name of one, or several in a tuple, got {kind(axis)}."
        )
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if not axes or len({*axes}) < len(axes):
        raise ValueError(f"{function}: axis must name one, or several and each once, got {axis!r}.")
    for name in axes:
        if name not in mesh.axis_names:
            near = difflib.get_close_matches(str(name), map(str, mesh.axis_names), 1)
            advice = f"did you mean {near[0]!r}?" if near else f"it has {mesh.axis_names}."
            raise ValueError(f"{function}: the mesh has no axis {name!r}; {advice}")
    return axes


def same_mesh(params: Any, index: int, mesh: Any, other: Any) -> None:
    """Refuses a param that lies on another mesh than its state is to."""
    if mesh.shape_tuple != other.shape_tuple:
        raise ValueError(
            f"params{path(params, index)}: lies on the mesh {dict(other.shape)}, and its state is "
            f"to lie on {dict(mesh.shape)}; give zero1 the mesh of the params."
        )


def indivisible(params: Any, index: int, leaf: Any, axis: Any, ways: int) -> ValueError:
    """The error for a leaf that cannot be cut into so many parts."""
    return ValueError(
        f"params{path(params, index)}: has shape {leaf.shape}, and the {ways} devices of {axis!r} "
        "divide none of its dimensions, so its state cannot be cut; pad a dimension to a multiple "
        f"of {ways}, or keep the state of such leaves whole with zero1(..., strict=False)."
    )
