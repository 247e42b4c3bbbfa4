"""Where arrays lie, and how what belongs to them comes to lie there too."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from adamw_xla_lowering import shard_alike, shard_apart


def placed_at(x: Any) -> Sharding | None:
    """Where an array lies, or a ``jax.ShapeDtypeStruct`` is to; None where nothing says so.

    Of what is traced with automatic axes only the compiler knows.
    """
    if isinstance(x, jax.core.Tracer):
        return None
    found = getattr(x, "sharding", None)
    return found if isinstance(found, Sharding) else None


def fixed_places(leaves: Sequence[Any]) -> list[Sharding | None]:
    """For each leaf where it lies; None too for one that JAX is free to move to the others."""
    return [
        None if isinstance(x, jax.Array) and place is not None and not x.committed else place
        for x, place in zip(leaves, map(placed_at, leaves), strict=True)
    ]


def of_scalars(places: Iterable[Sharding | None]) -> Sharding | None:
    """Where scalars lie that belong to arrays at all of these places; None if nothing says so.

    Replicated over the (largest) mesh, or on the one device; in that device's own memory.
    """
    known = [s for s in places if s is not None]
    meshes = [s.mesh for s in known if isinstance(s, NamedSharding)]
    if meshes:
        whole = PartitionSpec()  # type: ignore[no-untyped-call]
        return NamedSharding(max(meshes, key=lambda mesh: mesh.size), whole)
    for s in known:
        if isinstance(s, SingleDeviceSharding):
            return SingleDeviceSharding(*s.device_set)
        if s.is_fully_replicated:
            return s
    return None


def filled(
    place: Sharding | None, value: float = 0, shape: tuple[int, ...] = (), dtype: Any = jnp.int32
) -> jax.Array:
    """An array of one value, at a place where there is one; an int32 zero, if nothing is said."""
    found = jnp.full(shape, value, dtype)
    if place is None or isinstance(found, jax.core.Tracer):
        return found
    return jnp.full(shape, value, dtype, device=place)


def zeros_like(xs: Sequence[Any], dtypes: Sequence[Any]) -> list[jax.Array]:
    """Zeros that lie as ``xs`` do, traced or not.

    Under ``jit`` with automatic axes XLA puts what depends on no argument on the first device, or
    on all. So these depend on ``xs``, and on a flag of which XLA cannot know that it is false.
    """
    zeros = [jnp.zeros_like(x, dtype) for x, dtype in zip(xs, dtypes, strict=True)]
    if not any(isinstance(x, jax.core.Tracer) for x in (*xs, *zeros)):
        return zeros
    never = jax.lax.optimization_barrier(jnp.array(False))  # type: ignore[no-untyped-call]
    return [
        jnp.where(never, jax.lax.stop_gradient(x).astype(zero.dtype), zero)
        if _in_device_memory(x)
        else zero
        for x, zero in zip(xs, zeros, strict=True)
    ]


def _in_device_memory(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Device


def moved_to(x: Any, place: Sharding) -> jax.Array:
    """``x`` at another place; where it is traced, the compiler is told so."""
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, place)
    if not _in_device_memory(x) or is_host(place):
        return jax.device_put(x, place)
    return _constrained(x, place) if isinstance(place, NamedSharding) else x


def in_device_memory(place: Sharding) -> Sharding:
    """The same place, but for what computes there: its devices' own memory."""
    return place.with_memory_kind("device") if is_host(place) else place


def moved_beside(x: Any, other: Any) -> jax.Array:
    """``x`` where another array of its shape lies, also where only the compiler knows that."""
    if not isinstance(x, jax.core.Tracer):
        (fixed,) = fixed_places([other])
        if fixed is None and isinstance(place := placed_at(x), NamedSharding):
            # As jit takes what it is free to move; what is NumPy's lies nowhere.
            fixed = of_scalars([place]) if isinstance(other, jax.Array) else place
        return x if fixed is None else jax.device_put(x, fixed)
    x, type_of = apart(x), jax.typeof(other)
    if AxisType.Explicit in type_of.sharding.mesh.axis_types:
        x = _constrained(x, type_of.sharding, AxisType.Explicit)
    return shard_alike(x, other)


def apart(x: Any) -> Any:
    """``x``, as another value that may lie elsewhere: of each value XLA chooses once where."""
    return shard_apart(x) if isinstance(x, jax.core.Tracer) else x


def _constrained(x: Any, place: NamedSharding, *kinds: AxisType) -> Any:
    """Where axes are explicit, shardings are types; of other axes the compiler is told."""
    for kind in kinds or (AxisType.Explicit, AxisType.Auto):
        if kind in place.mesh.axis_types:
            spec = [_of_kind(kind, place.mesh, entry) for entry in place.spec]
            part = NamedSharding(place.mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]
            explicit = kind == AxisType.Explicit
            move: Any = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
            x = move(x, part)
    return x


def _of_kind(kind: AxisType, mesh: Any, entry: Any) -> Any:
    """The axes of this kind in an entry of a spec."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(name for name in names if kinds.get(name) == kind)
    return kept[0] if len(kept) == 1 else kept or None


def is_host(place: Sharding) -> bool:
    """Whether this is a place in the host's memory."""
    return "host" in (place.memory_kind or "")
