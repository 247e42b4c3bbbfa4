"""``vmap`` of the update: any subset of operands, nested as deep as one likes.

A batched update is an update whose operands have one more leading dimension. An
operand that is not batched gets size 1 there, which costs nothing, and the lowering
broadcasts it inside the fused loop, so it is read once and never materialized.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching
import jax.numpy as jnp

from ..contract import UpdateSpec, split_operands

Dim = int | None


def to_front(x: jax.Array, dim: Dim) -> jax.Array:
    """``x`` with its batch in front, of size 1 where it has none."""
    return jax.lax.expand_dims(x, (0,)) if dim is None else jnp.moveaxis(x, dim, 0)


def _batch(
    primitive: Primitive, operands: Sequence[jax.Array], dims: Sequence[Dim], *, spec: UpdateSpec
) -> tuple[list[jax.Array], list[Dim]]:
    results = primitive.bind(
        *map(to_front, operands, dims),
        spec=dataclasses.replace(spec, batch_rank=spec.batch_rank + 1),
    )
    at = split_operands(spec, dims)
    every = at.hyper is not None or at.leaf_scale is not None
    batched = [every or any(d is not None for d in leaf) for leaf in at.leaves]
    batched = batched * len(spec.result_kinds) + [any(batched)] * (spec.sums is not None)
    values = [
        x if is_batched else jax.lax.squeeze(x, (0,))
        for x, is_batched in zip(results, batched, strict=True)
    ]
    return values, [0 if is_batched else None for is_batched in batched]


def register(primitive: Primitive) -> None:
    """Installs the ``vmap`` rule."""
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
