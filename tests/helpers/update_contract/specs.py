"""The updates that every implementation is tested with: one table of options, leaves and batches.

An implementation runs all of it that it can, on leaves of ``SHAPES`` and of sizes at which it
changes course itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from cpu_oracle import DTYPES, OPTIONS, hyper, leaves, split
from hypothesis import strategies as st
import numpy as np

Options = Mapping[str, bool]
Dtypes = tuple[str, str, str]
"""Of params, of gradients and of the state."""

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (17,), (3, 5), (2, 0, 4), (4, 3, 7)]

PLAIN, ALL = OPTIONS[0], OPTIONS[-1]
FOR_CHANGES: list[Options] = [PLAIN, {"ema": True}, {"ema": True, "ema_overwrite": True}, ALL]
"""Those that a change of the params passes differently than the params do."""

ALIKE: list[Dtypes] = [
    (param, param, "float64" if param == "float64" else "float32") for param in DTYPES
]
"""Gradients of the params' dtypes, and the state that belongs to them."""

MIXED: list[Dtypes] = [
    (param, grad, state)
    for param in DTYPES
    for grad in sorted({param, "float32"})
    for state in ("float32", "float64")
]
"""Wider and narrower gradients, and a state that is wider than the arithmetic."""


def name_of(options: Options) -> str:
    return "+".join(options) or "plain"


def wide(dtypes: Dtypes) -> Any:
    """The dtype of ``hyper``."""
    return np.float64 if dtypes[0] == "float64" else np.float32


@dataclasses.dataclass(frozen=True)
class Batch:
    """Which operands ``vmap`` maps: all others are the same for every member."""

    hyper: bool
    kinds: frozenset[str]
    leaf_scale: bool = False

    def make(self, members: int, shapes: Sequence[tuple[int, ...]]) -> Batched:
        """Operands, of which those that are mapped have ``members`` in front."""
        groups = tuple(i % 2 for i in range(len(shapes)))
        tree: dict[str, Any] = leaves([(members, *shape) for shape in shapes], ema=True)
        tree |= {kind: [x[0] for x in tree[kind]] for kind in tree.keys() - self.kinds}
        if self.leaf_scale:
            scale = np.linspace(0.5, 2, members * len(shapes), dtype=np.float32)
            tree["leaf_scale"] = scale.reshape(members, len(shapes))
        return Batched(self, hyper(2, (members,) if self.hyper else ()), tree, groups)


@dataclasses.dataclass(frozen=True)
class Batched:
    """Operands of a mapped update."""

    batch: Batch
    rows: Any
    tree: dict[str, Any]
    groups: tuple[int, ...]

    @property
    def axes(self) -> tuple[int | None, dict[str, int | None]]:
        """``in_axes`` for ``(hyper, tree)``."""
        mapped = self.batch.kinds | {"leaf_scale"}
        each = {kind: 0 if kind in mapped else None for kind in self.tree}
        return (0 if self.batch.hyper else None), each

    def member(self, i: int) -> tuple[Any, dict[str, Any]]:
        """``hyper`` and the tree of one member."""
        rows, axes = self.axes
        tree = {
            kind: x if axes[kind] is None else x[i] if kind == "leaf_scale" else [y[i] for y in x]
            for kind, x in self.tree.items()
        }
        return (self.rows if rows is None else self.rows[i]), tree


EVERY_KIND = frozenset({"params", "grads", "m", "v", "ema"})
BATCHES = {
    "leaves": Batch(False, EVERY_KIND),
    "hyper and leaves": Batch(True, EVERY_KIND),
    "gradients": Batch(False, frozenset({"grads"})),
    "hyper and m": Batch(True, frozenset({"m"})),
    "everything": Batch(True, EVERY_KIND, leaf_scale=True),
    "numbers": Batch(True, frozenset(), leaf_scale=True),
    "leaves and their scales": Batch(False, EVERY_KIND, leaf_scale=True),
}


@dataclasses.dataclass(frozen=True)
class Nested:
    """Several ``vmap``s, the outermost first, and which of them each operand has."""

    sizes: dict[str, int]
    axes: dict[str, str]


NESTED = {
    "hyper and leaves apart": Nested(
        {"a": 3, "b": 4}, {"hyper": "a", "params": "b", "grads": "ab", "m": "b", "v": "b"}
    ),
    "nothing shared": Nested({"a": 3, "b": 2}, {"m": "b", "grads": "a"}),
    "two of three": Nested({"a": 2, "b": 4, "c": 3}, {"m": "ac", "grads": "b"}),
}
BATCH_SHAPES: list[tuple[int, ...]] = [(5, 7), ()]

# ------------------------------------------------------------------------------ any tree

_, FLAGS = split(ALL)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """A tree whose leaves have dtypes of their own, and any choice of options."""
    sizes = st.one_of(st.integers(0, 40), st.sampled_from([48, 63, 64, 65, 128, 200]))
    shapes = [(size,) for size in draw(st.lists(sizes, min_size=1, max_size=6))]
    narrow = list(DTYPES)[:3]
    operands = {"amsgrad": draw(st.booleans()), "ema": draw(st.booleans())}
    flags = {name: True for name in FLAGS if draw(st.booleans())}
    if not operands["ema"]:
        flags.pop("ema_overwrite", None)
    seed = draw(st.integers(0, 1000))
    tree: dict[str, Any] = {}
    for i, shape in enumerate(shapes):
        param, grad = (draw(st.sampled_from(narrow)) for _ in range(2))
        for kind, column in leaves([shape], param, grad, **operands, seed=seed + i).items():
            tree.setdefault(kind, []).extend(column)
    if draw(st.booleans()):
        tree["leaf_scale"] = np.linspace(0.5, 1.5, len(shapes), dtype=np.float32)
    groups = [draw(st.integers(0, 2)) for _ in shapes]
    h = hyper(3, APPLY=draw(st.sampled_from([0.0, 1.0])))
    return {"h": h, "tree": tree, "groups": groups, "flags": flags}


__all__ = [
    "ALIKE",
    "ALL",
    "BATCHES",
    "BATCH_SHAPES",
    "FOR_CHANGES",
    "MIXED",
    "NESTED",
    "OPTIONS",
    "PLAIN",
    "SHAPES",
    "Batch",
    "Dtypes",
    "Nested",
    "Options",
    "cases",
    "name_of",
    "split",
    "wide",
]
