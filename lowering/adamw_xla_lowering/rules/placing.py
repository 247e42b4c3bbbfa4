"""What XLA's partitioner is told of values under ``jit`` with automatic axes.

There only the compiler knows how an argument is sharded. Shardy has words for "as that one" and
for "another than that one", and JAX no public functions for them (up to 0.10 it had
``jax.experimental.shard_alike`` for the first). Without Shardy, the older partitioner chooses.
"""

from collections.abc import Iterator, Sequence
import hashlib
import itertools
from typing import Any
from weakref import WeakKeyDictionary

import jax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir

from .._jax_private import functions_of, partitions_automatically, uses_shardy
from . import autodiff
from .batching import to_front

_NEITHER_WAY = 0  # sdy.PropagationDirection.NONE
_GROUPS_OF_ALL = 1 << 62
_GROUPS_OF_ONE = 1 << 20
_groups: WeakKeyDictionary[Any, Iterator[int]] = WeakKeyDictionary()


def shard_apart(x: jax.Array) -> jax.Array:
    """``x`` as another value, whose sharding is not concluded from that of ``x``, nor the reverse.

    Where they come to differ, XLA moves it.
    """
    result: jax.Array = shard_apart_p.bind(x)
    return result


def shard_alike(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x``, sharded as ``like`` is, which has its shape.

    It says so of the value that ``x`` is: of one that is computed elsewhere, give
    ``shard_apart(x)``. In a jitted function that one program calls several times, it says so of
    all the calls' values together.
    """
    result: jax.Array = shard_alike_p.bind(x, like)
    return result


# ---------------------------------------------------------------------------- lowering


def _lower_apart(ctx: mlir.LoweringRuleContext, x: ir.Value) -> Sequence[ir.Value]:
    if not uses_shardy():
        return [x]
    direction = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _NEITHER_WAY)
    return list(sdy.PropagationBarrierOp(x, direction).results)


def _lower_alike(ctx: mlir.LoweringRuleContext, x: ir.Value, like: ir.Value) -> Sequence[ir.Value]:
    tie(ctx, x, like)
    return [x]


def tie(ctx: mlir.LoweringRuleContext, *values: ir.Value) -> None:
    """Has Shardy shard values of one shape alike; nothing where some axes are manual.

    There (jaxlib 0.10 to 0.12) XLA aborts on groups of which one is cut over manual axes outside.
    """
    if uses_shardy() and partitions_automatically(ctx):
        module, _ = functions_of(ctx)
        if module not in _groups:
            _groups[module] = itertools.count(_first_group(ctx))
        group = next(_groups[module])
        for value in values:
            sdy.ShardingGroupOp(value, group)


def _first_group(ctx: mlir.LoweringRuleContext) -> int:
    """Where a module's groups are numbered from.

    The same program is the same text, and cached as such. An exported one may be called in a
    program that has groups of its own, or others' (JAX's count from 0): so not all from one.
    """
    _, symbols = functions_of(ctx)
    main = symbols["main"].attributes if "main" in symbols else {}
    text = "".join(str(main[x]) for x in ("function_type", "arg_attrs") if x in main)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    runs = _GROUPS_OF_ALL // _GROUPS_OF_ONE
    return (1 + int.from_bytes(digest) % (runs - 1)) * _GROUPS_OF_ONE


# ------------------------------------------------------------------------ registration


def _batch_alike(operands: Sequence[jax.Array], dims: Sequence[int | None]) -> tuple[Any, Any]:
    if None in dims:
        return operands[0], dims[0]
    return shard_alike(*map(to_front, operands, dims)), 0


shard_apart_p = Primitive("shard_apart")
shard_apart_p.def_impl(lambda x: x)
shard_apart_p.def_abstract_eval(lambda x: x)
autodiff.register(shard_apart_p)
batching.defvectorized(shard_apart_p)
mlir.register_lowering(shard_apart_p, _lower_apart)

shard_alike_p = Primitive("shard_alike")
shard_alike_p.def_impl(lambda x, like: x)
shard_alike_p.def_abstract_eval(lambda x, like: x)
ad.primitive_jvps[shard_alike_p] = lambda primals, tangents: (shard_alike(*primals), tangents[0])
batching.primitive_batchers[shard_alike_p] = _batch_alike
# Each equation is a group of its own, and may not share the text of another's.
mlir.register_lowering(shard_alike_p, _lower_alike, cacheable=False)
