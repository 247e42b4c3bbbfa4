"""Where the state lies: what ``jax.jit``, ``jax.device_put`` and checkpoints ask for.

The state takes the shardings of its params, so data parallelism, FSDP and tensor parallelism need
nothing of this. It is for states that are not there yet (``abstract_state``), for jitted functions
that name the shardings of their arguments (``state_shardings``), and for a state that is cut
smaller than its params (``zero1``). ``check_same_config`` is for several processes.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding
import numpy as np

from adamw_xla._check import calls, places, trees
from adamw_xla._check.leaves import float_leaf
from adamw_xla._check.words import misplaced
from adamw_xla._config import AdamW, check_config
from adamw_xla._inside.grouped import frozen_leaves
from adamw_xla._inside.placed import columns_of
from adamw_xla._inside.processes import check_same_config as check_same_config
from adamw_xla._placement import fixed_places, of_scalars, placed_at
from adamw_xla._state import AdamWState, adamw_init, built

_CONFIG = {"config": "the options, an adamw_xla.AdamW"}


@calls.explained("abstract_state", aliases={"optimizer": "config"}, lacking=_CONFIG)
def abstract_state(
    params: Any, config: AdamW, *, state_shardings: AdamWState | None = None
) -> AdamWState:
    """The state of ``params`` without its values: shapes, dtypes and shardings.

    A template for restoring a checkpoint, and an argument of ``jax.jit(...).lower``, for compiling
    ahead of time. Nothing is allocated.

    Args:
      params: a pytree of arrays or of ``jax.ShapeDtypeStruct``, with or without shardings.
      config: the hyperparameters.
      state_shardings: where the state is to lie, from ``state_shardings``; None: beside its
        params, counters replicated over their mesh.

    Returns:
      What ``adamw_init(params, config)`` would be, as ``jax.ShapeDtypeStruct``s. They have no
      sharding where a param has none.

    Raises:
      TypeError: a leaf is no array, or not of a real floating dtype: names its path; or
        ``config`` is no ``AdamW``.
      ValueError: ``state_shardings`` are of another tree or config.

    Example:
      >>> import adamw_xla as ax, jax
      >>> params = {"w": jax.ShapeDtypeStruct((8, 4), "bfloat16")}
      >>> ax.sharding.abstract_state(params, ax.AdamW()).m
      {'w': ShapeDtypeStruct(shape=(8, 4), dtype=float32)}
    """
    call = "abstract_state(params, config)"
    misplaced(places.words(call), params=params, config=config)
    check_config(config, call)
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    frozen = frozen_leaves(config, params)
    for i, leaf in enumerate(leaves):
        if i not in frozen:
            float_leaf("params", params, i, leaf, needs_values=False)
    shapes = treedef.unflatten([_struct(p, None) for p in leaves])
    state = jax.eval_shape(functools.partial(adamw_init, config=config), shapes)
    beside = fixed_places(leaves)
    if not any(beside):
        beside = list(map(placed_at, leaves))
    scalars: Any = of_scalars(beside)
    given: dict[str, list[Sharding | None]] = {}
    if state_shardings is not None:
        given = columns_of(state_shardings, params, treedef, config)
        scalars = state_shardings.count

    def column(field: str) -> Any:
        flat = treedef.flatten_up_to(getattr(state, field))
        pairs = zip(flat, given.get(field, beside), strict=True)
        return treedef.unflatten([None if x is None else _struct(x, place) for x, place in pairs])

    return built(config, column, lambda field: _struct(getattr(state, field), scalars))


def _frozen(config: AdamW, tree: Any) -> set[int]:
    """The leaves without state; those of shardings are known by their paths alone."""
    if any(isinstance(x, Sharding) for x in jax.tree.leaves(tree)):
        for group in config.groups:
            if callable(group.match):
                raise TypeError(
                    f"params: is a tree of shardings, and {group.name} of the config is called "
                    "with leaves; give params, or jax.ShapeDtypeStruct with these shardings."
                )
    return frozen_leaves(config, tree)


def _struct(shape: Any, place: Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
        shape.shape, shape.dtype, sharding=place
    )


@calls.explained("state_shardings", aliases={"optimizer": "config"}, lacking=_CONFIG)
def state_shardings(
    params_or_shardings: Any, config: AdamW, *, memory_kind: str | None = None
) -> AdamWState:
    """The shardings of a state: for ``in_shardings``, ``out_shardings`` and ``jax.device_put``.

    Args:
      params_or_shardings: a pytree of params (arrays, or ``jax.ShapeDtypeStruct`` with
        shardings), or of ``jax.sharding.Sharding`` in their places, as ``zero1`` returns.
      config: the hyperparameters.
      memory_kind: of all but the counters: "pinned_host" keeps the state in the host's memory.
        None: that of the params.

    Returns:
      An ``AdamWState`` of shardings: each field lies as the params do, and counters are
      replicated over the same mesh.

    Raises:
      TypeError: a leaf has no sharding, or is a ``PartitionSpec``: names its path.
      ValueError: there is no leaf; or the devices have no memory of this kind.

    Example:
      >>> import adamw_xla as ax, jax, jax.numpy as jnp
      >>> params, config = {"w": jnp.ones((8, 4))}, ax.AdamW()
      >>> shardings = ax.sharding.state_shardings(params, config)
      >>> init = jax.jit(ax.adamw_init, static_argnames="config", out_shardings=shardings)
      >>> state = init(params, config=config)
    """
    call = "state_shardings(params_or_shardings, config)"
    misplaced(places.words(call), params=params_or_shardings, config=config)
    check_config(config, call)
    return of_tree("params", params_or_shardings, config, memory_kind)


def of_tree(
    argument: str,
    tree: Any,
    config: AdamW,
    memory_kind: str | None = None,
    params: Any = None,
) -> AdamWState:
    """``state_shardings`` of a tree that its caller calls ``argument``.

    What groups freeze is found in ``params``, or where these are None in the tree itself.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    found: list[Any] = [*places.of_tree(argument, tree, leaves)]
    scalars = of_scalars(found)
    if memory_kind is not None:
        found = [s.with_memory_kind(memory_kind) for s in found]
    if any(group.frozen for group in config.groups):
        matched = tree if params is None else params
        for i in _frozen(config, matched):
            found[i] = None
    return built(config, lambda field: treedef.unflatten(found), lambda field: scalars)


@calls.explained("zero1", aliases={"axis_name": "axis", "model": "params"})
def zero1(
    mesh: Mesh | AbstractMesh,
    axis: str | Sequence[str],
    params: Any,
    *,
    min_size: int = 4096,
    strict: bool = True,
) -> Any:
    """Shardings that cut the state smaller than its params: ZeRO's first stage.

    Each device of the data axis keeps, and updates, its part of the state; new params are
    gathered. ``state_shardings(zero1(mesh, "data", params), config)`` are those of the whole state,
    for ``adamw_step(..., state_shardings=...)``.

    A leaf is cut along its largest dimension that the axis divides, of those that its param is not
    cut along; if there is none, a dimension that is cut already is cut further. On all others
    its param's sharding stays, and one that is sharded over the axis (FSDP) stays as it is.

    Args:
      mesh: the mesh of the params.
      axis: its axis over which the params are replicated, such as "data"; or several.
      params: a pytree of arrays or of ``jax.ShapeDtypeStruct``. One without a ``NamedSharding``
        counts as replicated.
      min_size: a leaf of fewer elements stays as its param: messages would cost more than its
        memory.
      strict: whether a larger leaf that cannot be cut is an error; else it stays as its param.

    Returns:
      A tree like the params, of ``jax.sharding.NamedSharding``.

    Raises:
      ValueError: ``mesh`` has no such axis; a param lies on another mesh; or, with ``strict``, the
        axis divides no dimension of a leaf: names its path.
      TypeError: an argument is of the wrong kind.

    Example:
      >>> import adamw_xla as ax, jax
      >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
      >>> params = {"w": jax.ShapeDtypeStruct((512, 768), "float32")}
      >>> tuple(ax.sharding.zero1(mesh, "data", params)["w"].spec)
      (None, 'data')
    """
    axes = places.axes_of("zero1", mesh, axis)
    size: Any = min_size
    if not isinstance(size, int | float | np.number):
        raise TypeError(f"zero1: min_size must be a number of elements, got {min_size!r}.")
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    trees.params(params, leaves, needs_values=False)
    ways = math.prod(mesh.shape[name] for name in axes)
    specs = []
    for i, leaf in enumerate(leaves):
        spec = own = _own_spec(mesh, params, i, leaf)
        if math.prod(leaf.shape) >= min_size:
            spec = _cut(mesh, axes, ways, leaf.shape, own) or ([] if strict else own)
        if leaf.shape and not spec:
            raise places.indivisible(params, i, leaf, axis, ways)
        specs.append(spec)
    return treedef.unflatten([NamedSharding(mesh, _spec(entries)) for entries in specs])


def _spec(entries: Sequence[Any]) -> PartitionSpec:
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return PartitionSpec(*entries)  # type: ignore[no-untyped-call]


def _own_spec(mesh: Any, params: Any, index: int, leaf: Any) -> list[Any]:
    """How a param is cut, an entry for each dimension."""
    place = placed_at(leaf)
    if not isinstance(place, NamedSharding):
        return [None] * len(leaf.shape)
    places.same_mesh(params, index, mesh, place.mesh)
    return [*place.spec] + [None] * (len(leaf.shape) - len(place.spec))


def _cut(
    mesh: Any, axes: tuple[str, ...], ways: int, shape: Sequence[int], own: list[Any]
) -> list[Any] | None:
    """The spec of the state, ``own`` if it is cut over these axes already; None for no way."""
    names = [_names(entry) for entry in own]
    if any(axis in entry for entry in names for axis in axes):
        return own
    parts = [math.prod(mesh.shape[name] for name in entry) for entry in names]
    ways_of = {
        d: (parts[d] == 1, size)
        for d, size in enumerate(shape)
        if size and size % (parts[d] * ways) == 0
    }
    if not ways_of:
        return None
    best = max(ways_of, key=lambda d: (*ways_of[d], -d))
    spec = list(own)
    cut = (*names[best], *axes)
    spec[best] = cut if len(cut) > 1 else cut[0]
    return spec


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
