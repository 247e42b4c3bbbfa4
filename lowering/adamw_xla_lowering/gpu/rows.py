"""Shapes by which XLA:GPU reduces a leaf in few kernels: rows that one kernel adds up each."""

from collections.abc import Sequence
import functools
import itertools
import math

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

MAX_ROW = 8192
"""XLA:GPU splits longer row reductions into two kernels."""

MIN_ROWS = 256
"""With fewer, XLA:GPU would not fuse what makes the rows: too few blocks for a device."""

MIN_THINNED = 512
"""So few sums need not be made fewer before the last reduction, which adds 8,192 as fast."""

MIN_ROW = 128
"""Shorter rows are worse than the compiler's own two stages."""


def flat_shape(x: ir.Value, batch_rank: int) -> list[int]:
    """The shape of ``x`` with one dimension behind the batch."""
    shape = ir.RankedTensorType(x.type).shape
    return [*shape[:batch_rank], math.prod(shape[batch_rank:])]


def reshape(x: ir.Value, shape: Sequence[int]) -> ir.Value:
    """``x`` of another shape; itself if it has that shape."""
    kind = ir.RankedTensorType(x.type)
    if list(kind.shape) == list(shape):
        return x
    return hlo.reshape(ir.RankedTensorType.get(list(shape), kind.element_type), x)


def row_length(n: int, most: int = MAX_ROW) -> int:
    """How long rows are best of which ``n`` numbers are made; below ``MIN_ROW``: none are good."""
    longest = min(max(n // MIN_ROWS, MIN_ROW), most)
    return next((c for c in range(longest, 0, -1) if n % c == 0), 1)


def thinned(x: ir.Value) -> ir.Value:
    """[n] -> [k] with the same sum and a smaller k, by whatever kernel reads it."""
    kind = ir.RankedTensorType(x.type)
    (n,) = kind.shape
    k = next((k for k in range(8, 1, -1) if n % k == 0 and n // k >= MIN_THINNED), 1)
    ones = mlir.dense_int_array([1])
    bounds = [mlir.dense_int_array([i * (n // k)]) for i in range(k + 1)]
    parts = [hlo.slice(x, low, high, ones) for low, high in itertools.pairwise(bounds)]
    return functools.reduce(hlo.add, parts)


def halved(x: ir.Value) -> ir.Value:
    """[n, k] -> [k] with the sums over n, a power of two, by whatever kernel reads them."""
    n, k = ir.RankedTensorType(x.type).shape
    while n > 1:
        n //= 2
        low, middle, high = (mlir.dense_int_array(i) for i in ([0, 0], [n, 0], [n, k]))
        last, ones = mlir.dense_int_array([2 * n, k]), mlir.dense_int_array([1, 1])
        x = hlo.add(hlo.slice(x, low, high, ones), hlo.slice(x, middle, last, ones))
    return reshape(x, [k])
