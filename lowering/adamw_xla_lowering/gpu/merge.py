"""The update on GPUs: StableHLO that XLA:GPU merges into few kernels.

A kernel launch takes longer than the update of a small leaf, and XLA:GPU makes one
kernel per leaf unless it is shown how to merge them. Its multi-output fusion joins loops
over equally many elements that read one *array* in common, up to 94 operands and results
for each kernel. (Its horizontal fusion, which would join loops of any sizes, does not run
in jaxlib 0.10: twenty ``2*x + 1`` of different sizes stay twenty kernels.) Hence:

- Leaves are flattened, so that those of one size are one loop whatever their shapes, and
  groups of equally many such leaves are one kernel's code, which is compiled once.
- Each group reads an array of its own, the *anchor*: ones, behind an optimization
  barrier without which they would be folded away. Its values say which group it is, or
  equal ones would become one and the compiler would cut the groups where it liked.
- The step's scalars are left to XLA. What is constant becomes part of the code, and what
  is not is computed by one small kernel, together with the new count; in an array they
  would be read from memory by every thread, and make a kernel more.
- A group holds what one kernel may have, and is cut evenly.
"""

from collections.abc import Iterator, Sequence
import math
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir
import numpy as np

from .._jax_private import devices_hold_whole_operands
from ..contract import UpdateSpec, cut_evenly, join_results
from ..stablehlo import Tree, with_shardings
from ..sums import beside
from . import sums as own_sums
from .rows import flat_shape, reshape

MAX_FUSION_OPERANDS = 94
"""How many operands and results XLA:GPU was seen to let one fusion have, together."""

MAX_MERGED_ELEMENTS = 1 << 25
"""Larger leaves are kernels of their own: a launch is nothing beside 0.9 GB of traffic,
and many streams in one kernel may cost more than it saves. On an H100, four
leaves of 64 M elements took 1.02 times as long in one kernel as in four."""


def lower(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: UpdateSpec
) -> Sequence[ir.Value]:
    """Lowers the whole tree, in groups of leaves that XLA:GPU will merge."""
    flatten = devices_hold_whole_operands(ctx)  # elsewhere it could move shards
    is_summed = flatten and spec.sums is not None and spec.batch_rank == 0
    tree = Tree(ctx, operands, spec, own_sums.Pairs() if is_summed else None)
    results: list[Sequence[ir.Value]] = [()] * spec.num_leaves
    sums: list[Sequence[ir.Value]] = [()] * spec.num_leaves
    partial: dict[int, Sequence[ir.Value]] = {}
    for index, group in enumerate(_groups(tree, flatten)):
        ones = anchor(index, spec.batch_rank) if len(group) > 1 else None
        again = own_sums.again(tree, group[0], index) if is_summed else None
        for leaf in group:
            # A leaf by itself gains nothing; and a reshape would keep XLA from making one
            # sum of the caller's and of that which the average is taken of.
            if flatten and ones is not None:
                flat = [
                    reshape(x, flat_shape(x, spec.batch_rank)) for x in tree.values.leaves[leaf]
                ]
                new = tree.composite(leaf, flat, ones, again)
            else:
                new = tree.composite(leaf, anchor=ones, again=again)
            avals = tree.outs[leaf]
            new, sums[leaf] = new[: len(avals)], new[len(avals) :]
            shaped = [reshape(x, a.shape) for x, a in zip(new, avals, strict=True)]
            results[leaf] = with_shardings(ctx, shaped, avals)
        if is_summed:
            partial[group[0]] = own_sums.of_group([sums[leaf] for leaf in group])
    if is_summed:
        ordered = [partial[leaf] for leaf in sorted(partial)]
        return join_results(results, own_sums.result(ctx, spec, ordered))
    return join_results(results, beside.result(ctx, spec, sums) if spec.sums else None)


def _groups(tree: Tree, flatten: bool) -> Iterator[Sequence[int]]:
    """Leaves that can be one kernel, as many as fit, in groups of even length."""
    spec = tree.spec
    alike: dict[Any, list[int]] = {}
    for leaf, row in enumerate(tree.avals.leaves):
        kind: Any = tuple((x.dtype, math.prod(x.shape)) for x in row)
        alike.setdefault(kind if flatten else (kind, row[0].sharding.spec), []).append(leaf)
    streams = len(spec.operand_kinds) + len(spec.result_kinds)
    shared = 1 + spec.leaf_scale + _num_traced(tree.values.hyper) + len(spec.sum_kinds) // 2
    longest = max((MAX_FUSION_OPERANDS - shared) // streams, 1)
    if spec.sums == "leaves":  # each kernel has one sum
        longest = 1
    for leaves in alike.values():
        size = math.prod(tree.avals.leaves[leaves[0]][0].shape)
        yield from cut_evenly(leaves, 1 if size > MAX_MERGED_ELEMENTS else longest)


def _num_traced(x: ir.Value) -> int:
    """How many of the step's scalars are not known to the compiler, from where they are packed."""
    owner = x.owner
    if isinstance(owner, ir.Block):
        return 1
    if owner.operation.name == "stablehlo.concatenate":
        # Rows may have the same.
        return sum(map(_num_traced, {_unshaped(part) for part in owner.operands}))
    return int(owner.operation.name != "stablehlo.constant")


def _unshaped(x: ir.Value) -> ir.Value:
    owner = x.owner
    is_shape = not isinstance(owner, ir.Block) and owner.operation.name == "stablehlo.reshape"
    return owner.operands[0] if is_shape else x


def anchor(index: int, batch_rank: int) -> ir.Value:
    """An array of its own for each group; the first element is 1."""
    array = np.array([1.0, index + 2.0], np.float32).reshape((1,) * batch_rank + (2,))
    constant = hlo.constant(ir.DenseElementsAttr.get(array))
    return hlo.OptimizationBarrierOp([constant]).results[0]
