"""What optax' wrappers hold around AdamW's own state, on its way into another state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adamw_xla.optax import _check

_INJECTED = "InjectStatefulHyperparamsState"
_SCHEDULES = {_INJECTED, "ScaleByScheduleState", "WeightDecaySchedule", "WrappedScheduleState"}


@dataclasses.dataclass(frozen=True)
class _Wrapper:
    """A container on the way from a state's root to AdamW's part, which child ``inner`` has."""

    node: Any
    path: str
    keys: tuple[str, ...]
    children: tuple[Any, ...]
    treedef: Any
    inner: int

    @property
    def beside(self) -> list[tuple[int, Any]]:
        return [(i, x) for i, x in enumerate(self.children) if i != self.inner]


def exchanged(
    name: str, source: Any, like: Any, old: Any, target: Any, filled: Any, count: jax.Array
) -> Any:
    """``like`` with ``filled`` for ``target``, and around it what is around ``old`` in source.

    Each wrapper of ``like`` is filled from the next wrapper of its kind in ``source``; without
    one it stays as it is, but for its schedules, which go on from ``count``.

    Args:
      name: what ``source`` is called in errors.
      source: the state whose wrappers' states move.
      like: the state to be filled.
      old: AdamW's state in ``source``.
      target: AdamW's state in ``like``.
      filled: what takes its place.
      count: updates done.

    Returns:
      A state built as ``like``.

    Raises:
      ValueError: a wrapper of ``source`` holds something, and ``like`` has none of its kind.
    """
    theirs, ours = _way(source, _whole(source, old), name), _way(like, _whole(like, target), "like")
    pairs = _pairs(theirs, ours)
    for i, wrapper in enumerate(theirs):
        if i not in pairs.values():
            _nothing_lost(wrapper)
    new = _counted(_whole(like, target), count, target, filled)
    for i, wrapper in reversed([*enumerate(ours)]):
        children = list(wrapper.children)
        children[wrapper.inner] = new
        for k, child in wrapper.beside:
            if i in pairs:
                children[k] = _taken(theirs[pairs[i]], wrapper, k, count)
            elif _has_schedule(wrapper.node) and wrapper.keys[k] == ".count":
                children[k] = _count(child, count)
            else:
                children[k] = _counted(child, count)
        new = wrapper.treedef.unflatten(children)
    return new


def _way(tree: Any, part: Any, path: str) -> list[_Wrapper]:
    """The containers from the root down to ``part``."""
    found = _descent(tree, part, path)
    assert found is not None
    return found


def _descent(tree: Any, part: Any, path: str) -> list[_Wrapper] | None:
    if tree is part:
        return []
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if jax.tree_util.treedef_is_leaf(treedef):
        return None
    keys = tuple(jax.tree_util.keystr(key) for key, _ in flat)
    children = tuple(child for _, child in flat)
    for i, (key, child) in enumerate(zip(keys, children, strict=True)):
        if (rest := _descent(child, part, path + key)) is not None:
            return [_Wrapper(tree, path, keys, children, treedef, i), *rest]
    return None


def _whole(tree: Any, state: Any) -> Any:
    """All that ``optax.adamw`` keeps: it is a chain, of which the state is the first."""
    way = _way(tree, state, "")
    if not _is_stock(state) or not way:
        return state
    chain = way[-1]
    is_adamw = type(chain.node) is tuple and chain.inner == 0 and not any(map(_kept, chain.beside))
    return chain.node if is_adamw else state


def _pairs(source: Sequence[_Wrapper], like: Sequence[_Wrapper]) -> dict[int, int]:
    """For wrappers of ``like`` the one of their kind in ``source``, both in order."""
    found: dict[int, int] = {}
    start = 0
    for i, wrapper in enumerate(like):
        for k in range(start, len(source)):
            if _alike(source[k], wrapper):
                found[i], start = k, k + 1
                break
    return found


def _alike(a: _Wrapper, b: _Wrapper) -> bool:
    if a.treedef != b.treedef or a.inner != b.inner:
        return False
    if _is_injected(a.node):
        return True
    pairs = zip(a.beside, b.beside, strict=True)
    return all(_same_structure(x, y) for (_, x), (_, y) in pairs)


def _same_structure(a: Any, b: Any) -> bool:
    structure: Callable[[Any], Any] = jax.tree.structure
    return bool(structure(a) == structure(b))


def _taken(source: _Wrapper, like: _Wrapper, k: int, count: jax.Array) -> Any:
    """What the source's wrapper has as child ``k``, in the dtypes of ``like``."""
    old, place, path = source.children[k], like.children[k], source.path + source.keys[k]
    if not (_is_injected(like.node) and isinstance(place, dict)):
        return _cast(path, old, place)
    # Ours has hyperparameters that optax.adamw has not; schedules may come and go.
    return {
        key: _cast(f"{path}[{key!r}]", old[key], x)
        if key in old and _same_structure(old[key], x)
        else _counted(x, count)
        for key, x in place.items()
    }


def _cast(path: str, old: Any, place: Any) -> Any:
    _check.same_shapes(path, old, place)
    return jax.tree.map(_as, old, place)


def _as(x: Any, place: Any) -> Any:
    dtype = getattr(place, "dtype", None)
    if isinstance(x, jax.Array) and x.dtype == dtype:  # it may be a random key
        return x
    return jnp.asarray(x, dtype)


def _counted(tree: Any, count: jax.Array, target: Any = None, filled: Any = None) -> Any:
    """``tree`` with ``count`` in its schedules, and with ``filled`` for ``target``."""

    def change(node: Any) -> Any:
        if target is not None and node is target:
            return filled
        if not _has_schedule(node):
            return node
        fields = {k: _counted(x, count) for k, x in node._asdict().items()}
        return type(node)(**{**fields, "count": _count(node.count, count)})

    return jax.tree.map(change, tree, is_leaf=lambda x: x is target or _has_schedule(x))


def _count(place: Any, count: Any) -> Any:
    """The count, in the box that Flax keeps arrays in, if there is one around ``place``."""
    (value,) = jax.tree.leaves(count)
    # A copy: a state that has one array twice cannot be donated.
    return jax.tree.map(lambda _: jnp.array(value), place)


def _kept(child: tuple[int, Any]) -> list[Any]:
    """The leaves of a child, but for what follows from the count or from hyperparameters."""
    leaves = jax.tree.leaves(child[1], is_leaf=_has_schedule)
    return [x for x in leaves if not _has_schedule(x)]


def _nothing_lost(wrapper: _Wrapper) -> None:
    if _has_schedule(wrapper.node):
        return
    for k, child in wrapper.beside:
        if _kept((k, child)):
            inner = wrapper.path + wrapper.keys[wrapper.inner]
            _check.no_place(wrapper.path + wrapper.keys[k], inner)


def _named(*names: str) -> Callable[[Any], bool]:
    return lambda node: type(node).__name__ in names  # some are no public names of optax


_is_stock = _named("ScaleByAdamState")
_is_injected = _named(_INJECTED)
_has_schedule = _named(*_SCHEDULES)
