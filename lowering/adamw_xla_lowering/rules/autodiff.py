"""The step is not differentiable; these rules say so and name what is."""

from collections.abc import Sequence
import functools
from typing import Any, NoReturn

from jax.extend.core import Primitive
from jax.interpreters import ad

from .._jax_private import zero_tangent


class UpdateNotDifferentiableError(TypeError):
    """A derivative of ``adamw_update``, or of the norms it needs, was asked for."""


def _refuse(primitive: Primitive, *args: Any, **params: Any) -> NoReturn:
    del args, params
    raise UpdateNotDifferentiableError(
        f"`{primitive.name}` has no derivative: it is lowered to kernels that compute one "
        "optimizer step only. To differentiate through a step (meta-learning, "
        "hyperparameter gradients) use `adamw_xla.reference.adamw_step`, the same update "
        "in jax.numpy; to cut the derivative, wrap the inputs in `jax.lax.stop_gradient`."
    )


def _jvp(
    primitive: Primitive, primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> Any:
    # JAX binds without asking this rule when every tangent is a symbolic zero, except
    # under transformations that call rules by hand; for those, zeros pass here too.
    if not all(isinstance(t, ad.Zero) for t in tangents):
        _refuse(primitive)
    results = primitive.bind(*primals, **params)
    return results, [zero_tangent(x) for x in results]


def register(primitive: Primitive) -> None:
    """Installs the refusals."""
    ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive)
    ad.primitive_transposes[primitive] = functools.partial(_refuse, primitive)
