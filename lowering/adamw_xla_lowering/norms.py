"""``adamw_sum_of_squares_p``: the squared L2 norm of a whole tree, as one equation.

Squares overflow where numbers are far from it (in float32 from 1.8e19 on). So there are two
sums: of the squares, and of squares in a unit so small that nothing finite overflows. The first
is taken where it is finite, else the second: a norm is right for every finite gradient.

Clipping by the global norm, clipping each leaf by its own, and the search for a gradient
that is not finite all need nothing else. As one equation it traces in the time of one
leaf, and a platform can read the tree in fewer kernels than one or two per leaf.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching
import jax.numpy as jnp
import numpy as np

from . import platforms
from ._jax_private import (
    batch_spec,
    is_on_host,
    reduced_axes,
    varying_like,
    with_shape_and_spec,
)
from .contract import (
    NORM_NAME,
    PARAM_DTYPES,
    Implementation,
    NormSpec,
    check_implementation,
    dtype_names,
    small_unit,
)
from .rules import autodiff, eager, partitioned_norm
from .rules.batching import to_front


class Squares(NamedTuple):
    """A sum of squares, whose root divided by ``unit`` is a norm.

    Attributes:
      sum: of ``(unit * scale * x)**2``; infinite or NaN only where a ``scale * x`` is.
      unit: 1, or where the sum of ``(scale * x)**2`` would overflow ``contract.small_unit``.
    """

    sum: jax.Array
    unit: jax.Array

    @staticmethod
    def chosen(plain: jax.Array, small: jax.Array) -> "Squares":
        """The one of two sums, in units of 1 and ``small_unit``, that did not overflow."""
        fits = jnp.isfinite(plain)
        unit = jnp.where(fits, 1.0, small_unit(plain.dtype)).astype(plain.dtype)
        return Squares(jnp.where(fits, plain, small), unit)

    def in_both_units(self) -> jax.Array:
        """[2, ...]: the sums in units of 1 and ``small_unit``, to be added to others.

        Where one is known in the small unit alone, the other is infinite, and where in units of 1
        alone, what underflows on the way is nothing beside a total that needs the small unit.
        """
        # Twice, and by no constant, which the compiler might square first: the square is no number.
        factor = small_unit(self.sum.dtype) / self.unit
        plain = jnp.where(self.unit == 1, self.sum, jnp.inf)
        return jnp.stack([plain, self.sum * factor * factor])


def adamw_sum_of_squares(
    scale: jax.Array,
    leaves: Sequence[jax.Array],
    *,
    per_leaf: bool = False,
    implementation: Implementation | None = None,
) -> Squares:
    """Sums ``(scale * x)**2`` over the elements of all leaves, or of each, in a unit that fits.

    Args:
      scale: a scalar, float32 or float64; the arithmetic and the result are of its dtype.
      leaves: arrays of any shape and of the dtypes that params may have.
      per_leaf: one sum per leaf.
      implementation: that of the update which it is for; with "native" a platform's own
        kernel makes the sum where it can, and otherwise StableHLO.

    Returns:
      Scalars, or [leaves] with ``per_leaf``. Of up to 2^39 elements; what is, scaled or not, below
      the root of the smallest normal number of the dtype (float32: 1.1e-19) counts as 0.

    Raises:
      TypeError: a leaf's or the scale's dtype does not fit.
      ValueError: an unknown ``implementation``.
      UpdateNotDifferentiableError: where a derivative is asked for.
    """
    check_implementation(implementation)
    if not leaves:
        shape = (0,) if per_leaf else ()
        return Squares(jnp.zeros(shape, scale.dtype), jnp.ones(shape, scale.dtype))
    spec = NormSpec(per_leaf, implementation=implementation)
    return Squares(*adamw_sum_of_squares_p.bind(scale, *leaves, spec=spec))


# ------------------------------------------------------------------------------- the rules


def _abstract_eval(scale: Any, *leaves: Any, spec: NormSpec) -> list[Any]:
    if scale.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"{NORM_NAME}: scale has dtype {scale.dtype}; expected float32 or float64.")
    for i, leaf in enumerate(leaves):
        if leaf.dtype not in PARAM_DTYPES:
            raise TypeError(f"{NORM_NAME}: leaf {i} has dtype {leaf.dtype}; use {dtype_names()}.")
        if axes := reduced_axes(leaf):
            raise TypeError(f"{NORM_NAME}: leaf {i} is a sum pending over {sorted(axes)}.")
        if is_on_host(leaf) or is_on_host(scale):
            found = f"leaf {i}" if is_on_host(leaf) else "scale"
            raise TypeError(
                f"{NORM_NAME}: {found} lies in host memory; bring it to the device's "
                "(see jax.device_put(..., jax.memory.Space.Device))."
            )
    r = spec.batch_rank
    members = (scale, *leaves)
    batch = np.broadcast_shapes(*(x.shape[:r] for x in members)) if r else ()
    tail = (len(leaves),) if spec.per_leaf else ()
    partition = (*batch_spec(batch, members), *(None for _ in tail))
    aval = with_shape_and_spec(scale, (*batch, *tail), partition, members)
    return [varying_like(aval.update(weak_type=False), members)] * 2


def _batch(
    operands: Sequence[jax.Array], dims: Sequence[int | None], *, spec: NormSpec
) -> tuple[list[jax.Array], list[int]]:
    moved = map(to_front, operands, dims)
    batched = dataclasses.replace(spec, batch_rank=spec.batch_rank + 1)
    return adamw_sum_of_squares_p.bind(*moved, spec=batched), [0, 0]


# ---------------------------------------------------------------------------- registration

adamw_sum_of_squares_p = Primitive(NORM_NAME)
adamw_sum_of_squares_p.multiple_results = True
adamw_sum_of_squares_p.def_abstract_eval(_abstract_eval)
autodiff.register(adamw_sum_of_squares_p)
eager.register(adamw_sum_of_squares_p)
batching.primitive_batchers[adamw_sum_of_squares_p] = _batch
partitioned_norm.register(adamw_sum_of_squares_p)
platforms.register_norm(adamw_sum_of_squares_p)
