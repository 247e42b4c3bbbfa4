"""Explicit axes: gradients and state lie as their params do, or are made to where it is free."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamw_xla._check.leaves import sharded_like, summed
from adamw_xla._check.words import Words

_GRADS = (
    "jax.tree.map(lambda g, p: jax.sharding.reshard(g, jax.typeof(p).sharding), grads, params) "
    "moves them"
)
_STATE = (
    "jax.device_put({0}, adamw_xla.sharding.state_shardings(params, config)), outside of jit, "
    "moves it"
)


def grads_like_params(
    params_tree: Any, leaves: Sequence[Any], grads: Sequence[Any], live: Collection[int]
) -> list[Any]:
    """The gradients, sharded as their params are.

    A gradient that is cut no smaller than its param is cut further, which moves nothing: XLA
    would do the same in the update.

    Raises:
      ValueError: another would have to be moved between devices; names it.
    """
    aligned = list(grads)
    for i in live:
        g, p = grads[i], leaves[i]
        summed("grads", params_tree, i, g)
        wanted, found = jax.typeof(p).sharding, jax.typeof(g).sharding
        if found.spec == wanted.spec:
            continue
        if _cuts_further(_cuts(wanted.spec), _cuts(found.spec)):
            aligned[i] = jax.sharding.reshard(g, wanted)  # type: ignore[no-untyped-call]
        else:
            sharded_like("grads", params_tree, i, g, p, _GRADS)
    return aligned


def check_state(
    params_tree: Any,
    leaves: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    live: Collection[int],
    words: Words,
) -> None:
    """Refuses a state that is not sharded as its params are.

    Raises:
      ValueError: names the leaf.
    """
    advice = _STATE.format(words.state)
    if words.placed:
        advice = f"{words.placed} takes it as it is; or {advice}"
    wanted = {i: jax.typeof(leaves[i]).sharding.spec for i in live}
    for field, column in columns.items():
        argument = words.of_state(field)
        for i in live:
            if jax.typeof(column[i]).sharding.spec != wanted[i]:
                sharded_like(argument, params_tree, i, column[i], leaves[i], advice)


def on_one_mesh(parts: Sequence[Any]) -> list[Any]:
    """Operands of one operation, also those that lie nowhere, on the mesh of the others.

    Of a batch over explicit axes JAX 0.10 to 0.12 refuse to concatenate them otherwise.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in parts]
    mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
    if mesh is None:
        return [*parts]
    whole = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return [
        x if m == mesh else jax.sharding.reshard(x, whole)  # type: ignore[no-untyped-call]
        for x, m in zip(parts, meshes, strict=True)
    ]


def axis_0_of(x: Any) -> Any:
    """How axis 0 of an array is cut: its entry of the spec."""
    return (*jax.typeof(x).sharding.spec, None)[0]


def axis_0_like(x: Any, other: Any) -> Any:
    """``x``, which is cut nowhere, with axis 0 cut as another array's is."""
    if (entry := axis_0_of(other)) is None:
        return x
    spec: Any = PartitionSpec(entry)  # type: ignore[no-untyped-call]
    place = NamedSharding(jax.typeof(other).sharding.mesh, spec)
    return jax.sharding.reshard(x, place)  # type: ignore[no-untyped-call]


def whole(x: Any) -> Any:
    """``x`` cut nowhere: for what is small."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    spec: Any = PartitionSpec()  # type: ignore[no-untyped-call]
    place = NamedSharding(sharding.mesh, spec)
    return jax.sharding.reshard(x, place)  # type: ignore[no-untyped-call]


def _cuts(spec: PartitionSpec) -> tuple[tuple[Any, ...], ...]:
    """For each dimension the axes that cut it, major first."""
    return tuple(e if isinstance(e, tuple) else () if e is None else (e,) for e in spec)


def _cuts_further(finer: Any, coarser: Any) -> bool:
    """Whether the first cuts each piece of the second, and not across its edges."""
    return finer != coarser and all(a[: len(b)] == b for a, b in zip(finer, coarser, strict=True))
