"""``shard_alike_p``: a value that XLA is to shard as it shards another, whatever that is.

Under ``jit`` with automatic axes only the compiler knows how an argument is sharded. Shardy has
groups of values that are sharded alike, and JAX no public function for them since 0.11 (0.10 has
``jax.experimental.shard_alike``).
"""

from collections.abc import Iterator, Sequence
import itertools
from typing import Any
from weakref import WeakKeyDictionary

import jax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.interpreters import batching, mlir

from .._jax_private import functions_of, uses_shardy
from . import autodiff
from .batching import to_front

_FIRST_GROUP = 1 << 40  # out of the way of others that count from 0
_groups: WeakKeyDictionary[Any, Iterator[int]] = WeakKeyDictionary()


def shard_alike(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x`` in the sharding of ``like``, which may be known to the compiler alone.

    A value has one sharding: one that is computed elsewhere and then moved goes through
    ``jax.lax.optimization_barrier`` first. Without Shardy, XLA's older partitioner chooses.

    Args:
      x: any array.
      like: one of its shape.

    Returns:
      ``x``.
    """
    result: jax.Array = shard_alike_p.bind(x, like)
    return result


def _impl(x: jax.Array, like: jax.Array) -> jax.Array:
    return jax.device_put(x, like.sharding)


def _lower(ctx: mlir.LoweringRuleContext, x: ir.Value, like: ir.Value) -> Sequence[ir.Value]:
    if uses_shardy():
        module, _ = functions_of(ctx)
        # Numbered anew in each module: the same program is the same text, and cached as such.
        group = next(_groups.setdefault(module, itertools.count(_FIRST_GROUP)))
        for value in (x, like):
            sdy.ShardingGroupOp(value, group)
    return [x]


def _batch(operands: Sequence[jax.Array], dims: Sequence[int | None]) -> tuple[jax.Array, Any]:
    if None in dims:
        return operands[0], dims[0]
    return shard_alike(*map(to_front, operands, dims)), 0


shard_alike_p = Primitive("shard_alike")
shard_alike_p.def_impl(_impl)
shard_alike_p.def_abstract_eval(lambda x, like: x)
autodiff.register(shard_alike_p)
batching.primitive_batchers[shard_alike_p] = _batch
# Each equation is a group of its own, and may not share the text of another's.
mlir.register_lowering(shard_alike_p, _lower, cacheable=False)
