"""The squared norm in a program that XLA partitions: one sum over the devices.

Left to itself the partitioner sums each leaf over the devices that hold parts of it. XLA:GPU
and XLA:TPU then join sums over the same devices, XLA:CPU those that happen to be made side by
side; leaves that are cut in different ways, over some of the mesh' axes each, it joins
nowhere. Here each device adds up what it holds, of what several hold one counts it, and one
all-reduce makes the sum of all: two numbers.
"""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any, TypeAlias

import jax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import mlir
import numpy as np

from .._jax_private import (
    HloSharding,
    is_exporting,
    partitions_automatically,
    platforms_of,
    uses_shardy,
)
from ..contract import NormSpec, Shards
from ..norm_stablehlo import with_types
from . import called_back
from .called_back import Shardings, factor

TARGET_NAME = "adamw_xla_partitioned_norm"
"""The custom call in lowered programs, until XLA partitions them."""


def fits(ctx: mlir.LoweringRuleContext, spec: NormSpec) -> bool:
    """Whether XLA partitions the program by itself, and can be asked how; not for a batch."""
    return (
        partitions_automatically(ctx)
        and uses_shardy()
        and not is_exporting(ctx)
        and spec.batch_rank == 0
        and len(platforms_of(ctx)) == 1
        and all(isinstance(n, int) for aval in ctx.avals_in for n in aval.shape)
    )


def lower(ctx: mlir.LoweringRuleContext, *operands: ir.Value, spec: NormSpec) -> Sequence[ir.Value]:
    """Lowers the whole tree to a call that the partitioner replaces."""
    (platform,) = platforms_of(ctx)
    fields = dataclasses.asdict(dataclasses.replace(spec, shards=None))
    config = json.dumps({"platform": platform, **fields})
    rule = _sharding_rule(ctx.avals_in[1:], ctx.avals_out)
    results = called_back.call(ctx, TARGET_NAME, _partition, operands, rule, config)
    return with_types(ctx, results)


def _sharding_rule(leaves: Sequence[Any], results: Sequence[Any]) -> str:
    """Shardy's rule: no dimension of a leaf has to do with any other."""
    sizes: list[int] = []

    def factors(aval: Any) -> str:
        first = len(sizes)
        sizes.extend(aval.shape)
        return f"[{', '.join(factor(k) for k in range(first, len(sizes)))}]"

    whole = [factors(aval) for aval in results[:1]] * len(results)
    replicated = ", ".join(factor(k) for k in range(len(sizes)))
    operands = ", ".join(["[]", *map(factors, leaves)])
    extents = ", ".join(f"{factor(k)}={size}" for k, size in enumerate(sizes))
    needs = f" need_replication={{{replicated}}}" if replicated else ""
    return f"#sdy.op_sharding_rule<({operands})->({', '.join(whole)}) {{{extents}}}{needs}>"


# ------------------------------------------------------------------- XLA's callback


def _partition(
    shapes: Sequence[Any], shardings: Shardings, result: Any, result_sharding: Any, config: bytes
) -> tuple[bytes, list[Any], Any]:
    """The program of each device, on its operands as they are; the results are everywhere."""
    del result_sharding
    fields = json.loads(config)
    platform = fields.pop("platform")
    whole = HloSharding.replicate()
    args = [s if s is not None and s.is_tiled() else whole for s in shardings]
    args[0] = whole
    parts = [parts_of(s, shape) for s, shape in zip(args[1:], shapes[1:], strict=True)]
    spec = dataclasses.replace(NormSpec(**fields), shards=shards_of(parts))
    tiles = [s.tile(shape) for s, shape in zip(args, shapes, strict=True)]
    structs = [jax.ShapeDtypeStruct(t.dimensions(), np.dtype(t.numpy_dtype())) for t in tiles]
    packed = HloSharding.tuple_sharding(result, [whole] * len(result.tuple_shapes()))
    (primitive,) = _primitives

    def traced() -> Any:
        return jax.jit(lambda *xs: primitive.bind(*xs, spec=spec)).trace(*structs)

    return called_back.program(traced, platform), args, packed


Part: TypeAlias = tuple[tuple[bool, ...], Any]
"""For each device whether it counts its part of a leaf, (True,) of one that all have whole; and
the sizes of parts, if they are uneven."""


def shards_of(parts: Sequence[Part]) -> Shards | None:
    """How leaves lie on the devices; None where there is one, or all have all."""
    devices = max((len(counted) for counted, _ in parts), default=1)
    if devices == 1:
        return None
    alone = (True, *[False] * (devices - 1))
    counted, sizes = zip(*parts, strict=True)
    return Shards(tuple(c if len(c) > 1 else alone for c in counted), sizes)


def parts_of(sharding: Any, shape: Any) -> Part:
    """The parts of one leaf."""
    if not sharding.is_tiled():
        return (True,), None
    dims = shape.dimensions()
    tiling = sharding.tile_assignment_dimensions()
    devices = np.array(sharding.tile_assignment_devices()).reshape(*tiling[: len(dims)], -1)
    counted = np.zeros(devices.size, bool)
    counted[devices[..., 0].ravel()] = True
    tile = sharding.tile(shape).dimensions()
    if all(n == t * k for n, t, k in zip(dims, tile, tiling, strict=False)):
        return tuple(counted.tolist()), None
    sizes = np.zeros((devices.size, len(dims)), np.int64)
    for index in np.ndindex(*devices.shape[:-1]):
        own = [max(0, min(t, n - i * t)) for n, t, i in zip(dims, tile, index, strict=True)]
        sizes[devices[index]] = own
    return tuple(counted.tolist()), tuple(map(tuple, sizes.tolist()))


_primitives: list[Primitive] = []


def register(primitive: Primitive) -> None:
    """Says whose equation each device is to run."""
    _primitives.append(primitive)
