"""A state that lies in host memory: a few leaves at a time are on the device.

The equation is still one. It is lowered to equations of runs of leaves, between copies of
their state to the device and back; which of the copies run beside which updates is XLA's
choice. XLA:GPU and XLA:TPU copy all that they can before the first update, until the whole
state is on the device, whatever stands between (they forget optimization barriers before
they order operations). So there each run is the body of a loop of one round, which XLA
enters when the one before is done: copies overlap inside of a run. XLA:GPU has a single
queue for them in any case (its programs of jaxlib 0.10 to 0.12 say so), and loses no more
than the update's own time.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import mlir
import jax.numpy as jnp
import numpy as np

from .._jax_private import varying_axes
from ..contract import (
    NUM_BESIDE_STATE,
    UpdateSpec,
    compute_dtype,
    join_leaves,
    join_results,
    split_operands,
    split_results,
)

Row: TypeAlias = tuple[jax.Array, ...]
"""What belongs to one leaf."""

Made: TypeAlias = tuple[list[Row], list[jax.Array]]
"""A run's results, and its sums where there are some."""

MIN_RUN_BYTES = 16 << 20
"""Smaller leaves travel together: a copy has to pay for its start."""


def lower(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: UpdateSpec, in_turn: bool
) -> Sequence[ir.Value]:
    """Lowers the whole tree, run after run; ``in_turn`` each waits for the one before."""
    function = functools.partial(_streamed, spec=spec, in_turn=in_turn)
    results: Sequence[ir.Value] = mlir.lower_fun(function, True)(ctx, *operands)
    return results


def _streamed(*operands: jax.Array, spec: UpdateSpec, in_turn: bool) -> list[jax.Array]:
    leaves = split_operands(spec, operands).leaves
    sizes = [sum(map(_bytes, row[NUM_BESIDE_STATE:])) for row in leaves]
    # The largest leaf passes whole. In loops, where each run waits for the one before, as
    # much goes along with every other.
    bound = max(*sizes, MIN_RUN_BYTES) if in_turn else MIN_RUN_BYTES
    runs = list(_runs(sizes, bound))
    if not in_turn or len(runs) == 1:
        return _joined(spec, [_updated(operands, spec, run) for run in runs])
    # What XLA does not know to be 0: it would dissolve a loop whose rounds it can count.
    turn = jax.lax.optimization_barrier(jnp.zeros(2, np.int32))[0]
    made = []
    for number, run in enumerate(runs):
        turn, new = _in_turn(turn, number, operands, spec, run)
        made.append(new)
    return _joined(spec, made)


def _joined(spec: UpdateSpec, made: Sequence[Made]) -> list[jax.Array]:
    """The equation's results, from those of its runs."""
    rows = [row for own, _ in made for row in own]
    sums = [x for _, own in made for x in own]
    if spec.sums == "leaves":
        sums = [jnp.concatenate(sums, axis=spec.batch_rank)]
    return join_results(rows, functools.reduce(jnp.add, sums) if sums else None)


def _bytes(x: jax.Array) -> int:
    return math.prod(x.shape) * int(x.dtype.itemsize)


def _runs(sizes: Sequence[int], bound: int) -> Iterator[list[int]]:
    """Neighbours in the tree, of at most ``bound`` bytes together where one is not more."""
    run: list[int] = []
    filled = 0
    for leaf, size in enumerate(sizes):
        if run and filled + size > bound:
            yield run
            run, filled = [], 0
        run.append(leaf)
        filled += size
    yield run


def _in_turn(
    turn: jax.Array, number: int, operands: Sequence[jax.Array], spec: UpdateSpec, run: list[int]
) -> tuple[jax.Array, Made]:
    """The run's results, made in place once ``turn`` is its number; and the next turn."""
    places = _places(spec)

    def update(carry: tuple[jax.Array, Made]) -> tuple[jax.Array, Made]:
        given = list(operands)
        for leaf, row in zip(run, carry[1][0], strict=True):
            for place, x in list(zip(places, row, strict=True))[spec.delta :]:
                given[place + leaf] = x
        return carry[0] + 1, _updated(given, spec, run)

    rows = []
    for leaf in run:
        first, *state = (operands[place + leaf] for place in places)
        if spec.delta:
            first = jnp.zeros_like(first, compute_dtype(operands[spec.num_scalars + leaf].dtype))
        rows.append((first, *map(_to_host, state)))
    _, (_, summed) = jax.eval_shape(update, (turn, (rows, [])))
    first_sums = [jnp.zeros(x.shape, x.dtype) for x in summed]
    after: Any = jax.eval_shape(update, (turn, (rows, first_sums)))
    carry = jax.tree.map(_varying, (turn, (rows, first_sums)), after)
    made: tuple[jax.Array, Made] = jax.lax.while_loop(
        lambda carry: carry[0] == number, update, carry
    )
    return made


def _places(spec: UpdateSpec) -> list[int]:
    """For each result of leaf 0 the operand that it replaces."""
    kinds = [spec.operand_kinds.index(kind) for kind in spec.replaced_kinds]
    return [spec.num_scalars + kind * spec.num_leaves for kind in kinds]


def _varying(x: jax.Array, after: Any) -> jax.Array:
    """In ``shard_map``, what a loop carries varies from the first round on."""
    missing = tuple(varying_axes(after) - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _updated(operands: Sequence[jax.Array], spec: UpdateSpec, run: list[int]) -> Made:
    """The results for the leaves of a run."""
    values = split_operands(spec, operands)
    own = dataclasses.replace(spec.of_leaves(run), offload=False)
    here = [[_to_device(x) for x in values.leaves[i][NUM_BESIDE_STATE:]] for i in run]
    # Leaves that read the same numbers would be merged to one kernel, and wait for each other.
    hyper, here = jax.lax.optimization_barrier((values.hyper, here))
    scalars = [hyper]
    if values.leaf_scale is not None:
        bounds = (run[0], run[-1] + 1)
        scalars.append(jax.lax.slice_in_dim(values.leaf_scale, *bounds, axis=spec.batch_rank))
    rows = [
        (*values.leaves[i][:NUM_BESIDE_STATE], *state) for i, state in zip(run, here, strict=True)
    ]
    (primitive,) = _primitives
    results, sums = split_results(own, primitive.bind(*scalars, *join_leaves(rows), spec=own))
    rows = [(first, *map(_to_host, state)) for first, *state in results]
    return rows, [] if sums is None else [sums]


def _to_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)


def _to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Host)


_primitives: list[Primitive] = []


def register(primitive: Primitive) -> None:
    """Says whose equation each run is."""
    _primitives.append(primitive)
