"""What every part of the update agrees on: names, hyper slots, operand order.

The arithmetic, per element and in the leaf's compute dtype (float64 for float64
params, float32 for all others), written with the slots of ``hyper`` in capitals:

    g  <- GRAD_SCALE * leaf_scale * g
    g  <- clamp(g, -CLIP_VALUE, CLIP_VALUE)                      (clip_value)
    m  <- BETA_1*m + ONE_MINUS_BETA_1*g
    v  <- BETA_2*v + ONE_MINUS_BETA_2*g*g
    w  <- max(v_max, v), v_max <- w                              (amsgrad; else w = v)
    w  <- w + EPSILON_ROOT                                       (epsilon_root)
    s  <- STEP_SIZE*m + GRAD_STEP_SIZE*g                         (nesterov; else STEP_SIZE*m)
    s  <- s / (sqrt(w)*V_CORRECTION + EPSILON)
    d  <- DECAY_RATE*p, but 0 where p*s < 0 (cautious)
    p  <- p - (d + s)
    e  <- EMA_MOMENTUM*e + ONE_MINUS_EMA_MOMENTUM*p              (ema)
    p  <- e where EMA_OVERWRITE != 0                             (ema_overwrite)
    all results <- what they replace where APPLY == 0            (skip)
    the first result is p's change, in the compute dtype         (delta; else p)

With ``sums`` there are sums of squares over each leaf, or over the tree: of g as it came
(``grads``, and in a small unit ``small_grads``), of the new p as it is stored (``params``; with
``delta``, as it will be), and of what is added to p before it is rounded (``updates``).

With ``words`` m and v come from one word of 16 bits, and go back into one, rounded; with
``stochastic`` and ``split_master`` the new p is rounded, or cut in two: ``formats/`` says how.

The complements have slots of their own because ``1 - float32(0.999)`` is wrong in
the fifth digit. The decay is a rate that is subtracted and not a factor
``1 - lr*wd``: in float32 that factor rounds to 1 below lr*wd = 3e-8, and is off by
up to half at fine-tuning rates.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import enum
import itertools
import os
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax.numpy as jnp
import numpy as np

UPDATE_NAME = "adamw_update"
"""The primitive's name: jaxprs, HLO metadata and profiles show it."""

NORM_NAME = "adamw_sum_of_squares"
"""The name of the primitive that the norms are made of."""

COMPOSITE_NAME = "adamw_xla.update"
"""The name of the ``stablehlo.composite`` that stands for one leaf's update."""

CPU_TARGET_NAME = "adamw_xla_update_cpu"
"""The target of the CPU kernel's custom call, as HLO dumps and profiles show it."""

Item = TypeVar("Item")
Implementation: TypeAlias = Literal["xla", "native"]
Sums: TypeAlias = Literal["tree", "leaves"]

PARAM_DTYPES = (
    np.dtype(jnp.bfloat16),
    np.dtype(np.float16),
    np.dtype(np.float32),
    np.dtype(np.float64),
)
"""Dtypes that params, gradients and optimizer state may have."""


def dtype_names() -> str:
    """Those dtypes, for an error message."""
    *names, last = (dtype.name for dtype in PARAM_DTYPES)
    return f"{', '.join(names)} or {last}"


class Slot(enum.IntEnum):
    """Columns of ``hyper``; csrc/slice.h repeats this order, and cpu/library.py compares."""

    GRAD_SCALE = 0
    STEP_SIZE = 1
    V_CORRECTION = 2
    DECAY_RATE = 3
    BETA_1 = 4
    ONE_MINUS_BETA_1 = 5
    BETA_2 = 6
    ONE_MINUS_BETA_2 = 7
    EPSILON = 8
    CLIP_VALUE = 9
    EMA_MOMENTUM = 10
    ONE_MINUS_EMA_MOMENTUM = 11
    EMA_OVERWRITE = 12
    APPLY = 13
    EPSILON_ROOT = 14
    GRAD_STEP_SIZE = 15
    SALT = 16


NUM_SLOTS = len(Slot)

NUM_BESIDE_STATE = 2
"""A leaf's operands begin with its param and its gradient; the others are its state."""


STATE_KINDS = ("m", "v", "words", "v_max", "ema", "remainder")
"""What a leaf may keep from step to step beside its param, in operand order."""


class Shards(NamedTuple):
    """How leaves lie on the devices of which each sums its part.

    Attributes:
      counted: for each leaf, for each device whether it counts its part: of those that hold
        the same, one does.
      sizes: for each leaf None, or for each device the sizes of its part, the rest being padding.
    """

    counted: tuple[tuple[bool, ...], ...]
    sizes: tuple[tuple[tuple[int, ...], ...] | None, ...]


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """The static side of one update: what kind it is, never a number.

    Attributes:
      groups: for each leaf, the row of ``hyper`` that it reads.
      amsgrad: a ``v_max`` operand and result exist for each leaf.
      ema: an ``ema`` operand and result exist for each leaf.
      ema_overwrite: the EMA_OVERWRITE slot is looked at.
      clip_value: the CLIP_VALUE slot is looked at.
      skip: the APPLY slot is looked at.
      epsilon_root: the EPSILON_ROOT slot is looked at.
      nesterov: the GRAD_STEP_SIZE slot is looked at.
      cautious: an element decays only where that does not oppose its step.
      words: one word of 16 bits stands in place of each element's m and v, and the SALT slot
        is looked at.
      stochastic: new bfloat16 params are rounded stochastically; the SALT slot is looked at.
      split_master: an int16 ``remainder`` operand and result exist for each leaf; with a
        bfloat16 param it is the param's float32 master.
      delta: the first result is what to add to the param, not the new param.
      leaf_scale: an operand ``leaf_scale`` of shape [leaves] follows ``hyper``.
      sums: what sums of squares are of that the last result holds, [*batch, kinds] of the whole
        tree or [*batch, leaves, kinds] of each leaf, in the dtype of ``hyper``; None: no such
        result.
      grad_sums: the gradients' are among them.
      offload: a leaf's state may lie in host memory, and its results do.
      batch_rank: how many leading batch dimensions every operand has. An operand
        that does not vary along one of them has size 1 there.
      implementation: "xla", "native", or None for the platform's own choice.
      shards: with sums, the leaves are one device's parts, of even sizes, and the sums those of
        all devices.
    """

    groups: tuple[int, ...]
    amsgrad: bool = False
    ema: bool = False
    ema_overwrite: bool = False
    clip_value: bool = False
    skip: bool = False
    epsilon_root: bool = False
    nesterov: bool = False
    cautious: bool = False
    words: bool = False
    stochastic: bool = False
    split_master: bool = False
    delta: bool = False
    leaf_scale: bool = False
    sums: Sums | None = None
    grad_sums: bool = False
    offload: bool = False
    batch_rank: int = 0
    implementation: Implementation | None = None
    shards: Shards | None = None

    @property
    def num_leaves(self) -> int:
        """How many params the tree has."""
        return len(self.groups)

    @property
    def num_scalars(self) -> int:
        """How many operands stand before the leaves."""
        return 1 + self.leaf_scale

    @property
    def operand_kinds(self) -> tuple[str, ...]:
        """What each leaf brings, in operand order."""
        return ("params", "grads", *self.state_kinds)

    @property
    def result_kinds(self) -> tuple[str, ...]:
        """What each leaf gets back, in result order."""
        return ("updates" if self.delta else "params", *self.state_kinds)

    @property
    def sum_kinds(self) -> tuple[str, ...]:
        """What is squared and summed, in the order of the last result's columns."""
        if self.sums is None:
            return ()
        return (*("grads", "small_grads") * self.grad_sums, "params", "updates")

    @property
    def replaced_kinds(self) -> tuple[str, ...]:
        """What each result takes the place of: of its shape, and but for updates its dtype."""
        return ("grads" if self.delta else "params", *self.state_kinds)

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """What each leaf keeps from step to step, beside its param."""
        moments, others = not self.words, (self.amsgrad, self.ema, self.split_master)
        there = zip(STATE_KINDS, (moments, moments, self.words, *others), strict=True)
        return tuple(kind for kind, is_there in there if is_there)

    def of_leaves(self, leaves: Sequence[int]) -> "UpdateSpec":
        """The same kind of update, of some of the leaves."""
        return dataclasses.replace(self, groups=tuple(self.groups[i] for i in leaves))

    def options(self) -> dict[str, bool]:
        """The choices that a reader of a dump wants to see: what is computed, not where."""
        flags = [field.name for field in dataclasses.fields(self) if field.default is False]
        names = [name for name in flags if name not in ("offload", "grad_sums")]
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        chosen = [name for name, on in self.options().items() if on]
        rows = len(set(self.groups))
        shown = [f"leaves={self.num_leaves}", f"groups={rows}", *chosen]
        shown += [f"sums={self.sums}"] if self.sums else []
        shown += ["offload"] * self.offload
        if self.batch_rank:
            shown.append(f"batch_rank={self.batch_rank}")
        if self.implementation:
            shown.append(f"implementation={self.implementation}")
        return f"UpdateSpec({', '.join(shown)})"


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """The static side of a norm: one sum or one per leaf, and the rank of the batch in front.

    ``implementation`` is the update's; "native" means the kernel where there is one. With
    ``shards`` the leaves are one device's parts, and the sums those of all devices.
    """

    per_leaf: bool
    batch_rank: int = 0
    implementation: Implementation | None = None
    shards: Shards | None = None


class Operands(NamedTuple):
    """The flat operand list, cut up.

    ``leaves[i]`` holds leaf i's operands in the order of ``spec.operand_kinds``.
    """

    hyper: Any
    leaf_scale: Any | None
    leaves: list[tuple[Any, ...]]

    def of_leaves(self, leaves: Sequence[int]) -> list[Any]:
        """The flat list for some of the leaves, with what stands before them."""
        scalars = [self.hyper] if self.leaf_scale is None else [self.hyper, self.leaf_scale]
        return [*scalars, *join_leaves([self.leaves[i] for i in leaves])]


def split_operands(spec: UpdateSpec, operands: Sequence[Any]) -> Operands:
    """Cuts a flat operand list (or one of avals, or of batch axes) into its parts."""
    leaf_scale = operands[1] if spec.leaf_scale else None
    leaves = split_leaves(operands[spec.num_scalars :], spec.num_leaves)
    return Operands(operands[0], leaf_scale, leaves)


def split_results(spec: UpdateSpec, results: Sequence[Any]) -> tuple[list[tuple[Any, ...]], Any]:
    """The flat result list (or one of avals), as one tuple per leaf, and the sums or None."""
    n = spec.num_leaves * len(spec.result_kinds)
    return split_leaves(results[:n], spec.num_leaves), results[n] if spec.sums else None


def join_results(leaves: Sequence[Sequence[Any]], sums: Any) -> list[Any]:
    """What ``split_results`` cut up."""
    return join_leaves(leaves) if sums is None else [*join_leaves(leaves), sums]


def split_leaves(flat: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    """The flat order of ``n`` leaves -> one tuple per leaf; ``join_leaves`` undoes it."""
    return list(zip(*(flat[i : i + n] for i in range(0, len(flat), n)), strict=True))


def join_leaves(leaves: Sequence[Sequence[Any]]) -> list[Any]:
    """One tuple per leaf -> the flat order: all params, then all of the next kind."""
    return [x for column in zip(*leaves, strict=True) for x in column]


def cut_evenly(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    """Cuts into as few runs of at most ``most`` as possible, about equally long."""
    count = -(-len(items) // most)
    cuts = [i * len(items) // count for i in range(count + 1)]
    yield from (items[a:b] for a, b in itertools.pairwise(cuts))


def num_operands(spec: UpdateSpec) -> int:
    """How many operands the equation has."""
    return spec.num_scalars + spec.num_leaves * len(spec.operand_kinds)


def operand_name(spec: UpdateSpec, index: int) -> str:
    """A name for error messages: ``hyper``, ``leaf_scale``, or such as ``grads[3]``."""
    if index < spec.num_scalars:
        return ("hyper", "leaf_scale")[index]
    kind, leaf = divmod(index - spec.num_scalars, spec.num_leaves)
    return f"{spec.operand_kinds[kind]}[{leaf}]"


def small_unit(dtype: Any) -> float:
    """A power of two, so small that squares of what is multiplied by it cannot overflow.

    Nor can the sum of 2^39 of them, for whatever is finite in ``dtype``, float32 or float64.
    """
    return float(2.0 ** -(np.finfo(dtype).maxexp // 2 + 20))


def compute_dtype(param_dtype: Any) -> np.dtype[Any]:
    """The dtype of the arithmetic on a param of this dtype."""
    return np.dtype(np.float64 if param_dtype == np.float64 else np.float32)


def aliases(spec: UpdateSpec, avals_in: Sequence[Any], avals_out: Sequence[Any]) -> dict[int, int]:
    """Operand index -> that of the result which takes its place: all but what a batch repeats."""
    n = spec.num_leaves
    kinds = [spec.operand_kinds.index(kind) for kind in spec.replaced_kinds]
    pairs = (
        (spec.num_scalars + kind * n + leaf, r * n + leaf)
        for r, kind in enumerate(kinds)
        for leaf in range(n)
    )
    return {i: o for i, o in pairs if avals_in[i].shape == avals_out[o].shape}


def is_one_leaf(
    spec: UpdateSpec, scalars: Sequence[Any], row: Sequence[Any], out: Sequence[Any]
) -> bool:
    """Whether a leaf's batch only makes it larger: nothing repeats, and one row serves all.

    Args:
      spec: of the equation.
      scalars: the avals of ``hyper`` and what follows it.
      row: those of the leaf's operands.
      out: those of its results.
    """
    r = spec.batch_rank
    return all(set(x.shape[:r]) <= {1} for x in scalars) and all(
        x.shape[:r] == out[0].shape[:r] for x in row
    )


def check_implementation(implementation: Any) -> None:
    """Raises ValueError unless it is one of ``Implementation``, or None."""
    if implementation not in (None, "xla", "native"):
        raise ValueError(f'implementation must be None, "xla" or "native", got {implementation!r}.')


IMPLEMENTATION_VARIABLE = "ADAMW_XLA_IMPLEMENTATION"
"""Environment variable that says what ``implementation=None`` means: xla or native.

It is read when a program is lowered; what is compiled already stays as it is.
"""


def default_implementation() -> Implementation | None:
    """What the environment says; None leaves the choice to the platform."""
    match os.environ.get(IMPLEMENTATION_VARIABLE, ""):
        case "xla":
            return "xla"
        case "native":
            return "native"
        case "":
            return None
        case other:
            raise ValueError(f"{IMPLEMENTATION_VARIABLE} must be xla or native, got {other!r}")
