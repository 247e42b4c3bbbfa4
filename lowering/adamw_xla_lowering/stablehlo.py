"""The update as StableHLO: one named composite per leaf, for every platform.

Leaves that agree in shapes and dtypes share one private function, the decomposition
of their composites. A compiler that knows ``adamw_xla.update`` may replace it; any
other inlines the decomposition, and fuses it into one loop.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, TypeAlias

from jax.extend.mlir import ir, lower_with_sharding_in_types
from jax.extend.mlir.dialects import func
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir
import jax.numpy as jnp

from . import arithmetic
from ._jax_private import functions_of
from .contract import (
    COMPOSITE_NAME,
    UPDATE_NAME,
    Slot,
    UpdateSpec,
    compute_dtype,
    join_results,
    split_operands,
    split_results,
)
from .formats.hlo_ops import HloOps
from .norm_stablehlo import converted
from .sums import beside

Slots: TypeAlias = Callable[[Slot], ir.Value]
"""The value of a column of ``hyper``, for every element."""


def lower(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: UpdateSpec
) -> Sequence[ir.Value]:
    """Lowers the whole tree: one composite per leaf."""
    rows, sums = lower_leaves(ctx, operands, spec, range(spec.num_leaves))
    return join_results(rows, beside.result(ctx, spec, sums) if spec.sums else None)


def lower_leaves(
    ctx: mlir.LoweringRuleContext,
    operands: Sequence[ir.Value],
    spec: UpdateSpec,
    leaves: Sequence[int],
) -> tuple[list[list[ir.Value]], list[list[ir.Value]]]:
    """Lowers some of the leaves; returns the results of each, and the sums of each."""
    tree = Tree(ctx, operands, spec)
    rows, sums = [], []
    for leaf in leaves:
        new = tree.composite(leaf)
        outs = tree.outs[leaf]
        rows.append(with_shardings(ctx, new[: len(outs)], outs))
        sums.append(new[len(outs) :])
    return rows, sums


class Tree:
    """One equation being lowered: its parts, what its leaves share, and how they are summed."""

    def __init__(
        self,
        ctx: mlir.LoweringRuleContext,
        operands: Sequence[ir.Value],
        spec: UpdateSpec,
        summing: beside.Summing | None = None,
    ) -> None:
        _check_static(ctx, spec)
        self.ctx, self.spec, self.summing = ctx, spec, summing or beside.Summing()
        self.values, self.avals = split_operands(spec, operands), split_operands(spec, ctx.avals_in)
        self.outs, _ = split_results(spec, ctx.avals_out)
        self._rows: dict[int, ir.Value] = {}
        self._functions: dict[Any, func.FuncOp] = {}

    def composite(
        self,
        leaf: int,
        values: Sequence[ir.Value] | None = None,
        anchor: ir.Value | None = None,
        again: ir.Value | None = None,
    ) -> list[ir.Value]:
        """The composite of one leaf.

        Args:
          leaf: its index.
          values: what stands for its operands, reshaped behind the batch; None: themselves.
          anchor: an array of ones for the gradient to be multiplied by (``gpu/merge.py`` says why).
          again: a one, [1, 1], times which ``hyper`` is another value: what is summed is computed
            once more by that (``gpu/sums.py`` says why).

        Returns:
          The results, of the shapes that ``values`` make, and behind them the leaf's sums.
        """
        values = self.values.leaves[leaf] if values is None else values
        scalars = [self._row(self.spec.groups[leaf])]
        if self.values.leaf_scale is not None:
            scalars.append(slice_at(self.values.leaf_scale, leaf))
        if anchor is not None:
            scalars.append(anchor)
        if again is not None:
            scalars.append(again)
        function = self._function(leaf, [*scalars, *values], again is not None)
        options = {name: ir.BoolAttr.get(on) for name, on in self.spec.options().items()}
        i64 = ir.IntegerType.get_signless(64)
        attributes = {
            **options,
            "group": ir.IntegerAttr.get(i64, self.spec.groups[leaf]),
            "leaf": ir.IntegerAttr.get(i64, leaf),
            **(
                {"sums": ir.StringAttr.get(" ".join(self.spec.sum_kinds))} if self.spec.sums else {}
            ),
        }
        op = hlo.CompositeOp(
            function.type.results,
            [*scalars, *values],
            ir.StringAttr.get(COMPOSITE_NAME),
            composite_attributes=ir.DictAttr.get(attributes),
            decomposition=ir.FlatSymbolRefAttr.get(function.name.value),
        )
        return list(op.results)

    def _row(self, group: int) -> ir.Value:
        if group not in self._rows:
            self._rows[group] = _row(self.values.hyper, self.spec.batch_rank, group)
        return self._rows[group]

    def _function(self, leaf: int, args: Sequence[ir.Value], is_twice: bool) -> func.FuncOp:
        """The decomposition for these operands; leaves of the same types share one."""
        types = tuple(x.type for x in args)
        rank, outs = self.spec.batch_rank, self.outs[leaf]
        own = ir.RankedTensorType(types[-1]).shape[rank:]
        shape = (*outs[0].shape[:rank], *own)
        if (shape, types) not in self._functions:
            results = [
                ir.RankedTensorType.get(shape, mlir.dtype_to_ir_type(aval.dtype)) for aval in outs
            ]
            dtype = mlir.dtype_to_ir_type(compute_dtype(self.avals.leaves[leaf][0].dtype))
            is_narrow = self.avals.leaves[leaf][0].dtype == jnp.bfloat16
            loop = _Loop(shape, dtype, rank, is_narrow)
            summing = self.summing if self.spec.sums else None
            results += summing.types(self.spec, shape, dtype) if summing else []
            function = _decomposition(
                self.ctx, self.spec, loop, types, results, summing, is_twice=is_twice
            )
            self._functions[shape, types] = function
        return self._functions[shape, types]


def with_shardings(
    ctx: mlir.LoweringRuleContext, values: Sequence[ir.Value], avals: Sequence[Any]
) -> list[ir.Value]:
    """In explicit mode, the results' shardings are part of their types."""
    if avals[0].sharding.mesh.empty:
        return list(values)
    return [lower_with_sharding_in_types(ctx, x, a) for x, a in zip(values, avals, strict=True)]


def _check_static(ctx: mlir.LoweringRuleContext, spec: UpdateSpec) -> None:
    for aval in ctx.avals_in:
        if not all(isinstance(size, int) for size in aval.shape):
            raise NotImplementedError(
                f"{UPDATE_NAME}: symbolic shapes ({aval.str_short()}) are not supported; "
                "export with the model's concrete shapes."
            )


# ------------------------------------------------------------------------ decomposition


@dataclasses.dataclass(frozen=True)
class _Loop:
    """One leaf's elementwise computation: where values of the slots become tensors."""

    shape: tuple[int, ...]
    dtype: ir.Type
    batch_rank: int
    is_narrow: bool

    @functools.cached_property
    def ops(self) -> HloOps:
        return HloOps(self.shape, self.dtype, self.spread)

    def operand(self, x: ir.Value) -> ir.Value:
        """A leaf operand, in the arithmetic's dtype and with the whole batch."""
        is_integer = isinstance(ir.RankedTensorType(x.type).element_type, ir.IntegerType)
        dtype = ir.IntegerType.get_signless(32) if is_integer else self.dtype
        return self.spread(converted(x, dtype), range(len(self.shape)))

    def scalar(self, row: ir.Value, slot: int) -> ir.Value:
        """Column ``slot`` of ``row`` [*batch, ..., slots], for every element."""
        value = converted(slice_at(row, slot), self.dtype)
        batch = ir.RankedTensorType(value.type).shape[: self.batch_rank]
        value = hlo.reshape(ir.RankedTensorType.get(batch, self.dtype), value)
        return self.spread(value, range(self.batch_rank))

    def spread(self, x: ir.Value, dims: Sequence[int] = ()) -> ir.Value:
        kind = ir.RankedTensorType(x.type)
        if tuple(kind.shape) == self.shape:
            return x
        whole = ir.RankedTensorType.get(self.shape, kind.element_type)
        return hlo.broadcast_in_dim(whole, x, mlir.dense_int_array(list(dims)))


def _decomposition(
    ctx: mlir.LoweringRuleContext,
    spec: UpdateSpec,
    loop: _Loop,
    operands: Sequence[ir.Type],
    results: Sequence[ir.Type],
    summing: beside.Summing | None,
    *,
    is_twice: bool,
) -> func.FuncOp:
    """The private function of one leaf: ``(row, [scale], [anchor], [again], leaf...)``."""
    module, symbols = functions_of(ctx)
    with ir.InsertionPoint(module.body):
        kind = (list(operands), list(results))
        function = func.FuncOp(UPDATE_NAME, kind, visibility="private")
    symbols.insert(function)
    with ir.InsertionPoint(function.add_entry_block()):
        n = len(spec.operand_kinds)
        row, *scales = function.arguments[:-n]
        again = scales.pop() if is_twice else None
        leaf = dict(zip(spec.operand_kinds, function.arguments[-n:], strict=True))

        def slot(name: Slot) -> ir.Value:
            return loop.scalar(row, name)

        def slot_again(name: Slot) -> ir.Value:
            return slot(name) if again is None else hlo.multiply(slot(name), loop.scalar(again, 0))

        def made(slot: Slots) -> tuple[list[ir.Value], dict[str, ir.Value]]:
            new = _update(loop, spec, slot, scales, leaf)
            stored = [
                converted(new[kind], ir.RankedTensorType(result).element_type)
                for kind, result in zip(spec.result_kinds, results, strict=False)
            ]
            return _skip(loop, spec, slot, stored, leaf) if spec.skip else stored, new

        stored, new = made(slot)
        sums = []
        if summing:
            summed, new = made(slot_again) if is_twice else (stored, new)
            squares = _squares(loop, spec, slot_again, leaf, summed[0], new["added"])
            sums = summing.made(spec, squares)
        func.ReturnOp([*stored, *sums])
    return function


def _squares(
    loop: _Loop,
    spec: UpdateSpec,
    slot: Slots,
    leaf: dict[str, ir.Value],
    first: ir.Value,
    added: ir.Value,
) -> list[ir.Value]:
    """What is summed of the leaf; ``first`` is its first result."""
    if spec.skip:
        apply = loop.ops.is_set(slot(Slot.APPLY))
        added = hlo.select(apply, added, loop.ops.number(0.0))
    params = loop.operand(first)
    if spec.delta:
        params = hlo.add(loop.operand(leaf["params"]), params)
    values = {"grads": loop.operand(leaf["grads"]), "params": params, "updates": added}
    return beside.squares(spec, values, loop.spread)


def _update(
    loop: _Loop,
    spec: UpdateSpec,
    slot: Slots,
    scales: Sequence[ir.Value],
    operands: dict[str, ir.Value],
) -> dict[str, ir.Value]:
    return arithmetic.update(
        loop.ops,
        spec,
        slot,
        {kind: loop.operand(value) for kind, value in operands.items()},
        (loop.scalar(scale, 0) for scale in scales),
        is_narrow=loop.is_narrow,
    )


def _skip(
    loop: _Loop,
    spec: UpdateSpec,
    slot: Slots,
    stored: Sequence[ir.Value],
    operands: dict[str, ir.Value],
) -> list[ir.Value]:
    """Keeps what was there, bit for bit, where the APPLY slot is 0."""
    apply = loop.ops.is_set(slot(Slot.APPLY))
    kept = []
    for kind, new in zip(spec.result_kinds, stored, strict=True):
        old = loop.ops.number(0.0) if kind == "updates" else operands[kind]
        shape = ir.RankedTensorType(new.type).shape
        if ir.RankedTensorType(old.type).shape != shape:
            dims = mlir.dense_int_array(list(range(len(shape))))
            old = hlo.broadcast_in_dim(new.type, old, dims)
        kept.append(hlo.select(apply, new, old))
    return kept


# ------------------------------------------------------------------------ slices of hyper


def slice_at(x: ir.Value, index: int) -> ir.Value:
    """``x[..., index : index+1]``."""
    shape = list(ir.RankedTensorType(x.type).shape)
    return _slice(x, [0] * (len(shape) - 1) + [index], [*shape[:-1], index + 1])


def _row(x: ir.Value, batch_rank: int, group: int) -> ir.Value:
    """Row ``group`` of a [*batch, groups, slots] tensor, as [*batch, 1, slots]."""
    shape = list(ir.RankedTensorType(x.type).shape)
    if shape[batch_rank] == 1:
        return x
    low = [0] * batch_rank + [group, 0]
    high = shape[:batch_rank] + [group + 1, shape[-1]]
    return _slice(x, low, high)


def _slice(x: ir.Value, low: list[int], high: list[int]) -> ir.Value:
    ones = mlir.dense_int_array([1] * len(low))
    return hlo.slice(x, mlir.dense_int_array(low), mlir.dense_int_array(high), ones)
