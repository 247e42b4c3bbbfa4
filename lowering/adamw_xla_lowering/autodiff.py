"""The update is not differentiable; these rules say so and name what is."""

from collections.abc import Sequence
from typing import Any, NoReturn

from jax.extend.core import Primitive
from jax.interpreters import ad

from ._jax_private import zero_tangent
from .contract import UPDATE_NAME, UpdateSpec


class UpdateNotDifferentiableError(TypeError):
    """A derivative of ``adamw_update`` was asked for."""


def _refuse(*args: Any, spec: UpdateSpec, **_: Any) -> NoReturn:
    del args, spec
    raise UpdateNotDifferentiableError(
        f"`{UPDATE_NAME}` has no derivative: it is lowered to kernels that compute one "
        "optimizer step only. To differentiate through a step (meta-learning, "
        "hyperparameter gradients) use `adamw_xla.reference.adamw_step`, the same update "
        "in jax.numpy; to cut the derivative, wrap the inputs in `jax.lax.stop_gradient`."
    )


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spec: UpdateSpec) -> Any:
    # JAX binds without asking this rule when every tangent is a symbolic zero, except
    # under transformations that call rules by hand; for those, zeros pass here too.
    if not all(isinstance(t, ad.Zero) for t in tangents):
        _refuse(spec=spec)
    from .primitive import adamw_update_p  # the primitive registers this rule

    results = adamw_update_p.bind(*primals, spec=spec)
    return results, [zero_tangent(x) for x in results]


def register(primitive: Primitive) -> None:
    """Installs the refusals."""
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _refuse
