"""How a test of a surface of JAX's says what changed, and what such tests look at JAX with."""

from __future__ import annotations

from collections.abc import Callable
import functools
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import adamw_xla_lowering
from adamw_xla_lowering import NUM_SLOTS, adamw_update

PACKAGE = Path(adamw_xla_lowering.__file__).parent
EXPLICIT = AbstractMesh((2,), ("x",), (AxisType.Explicit,))
AUTO = AbstractMesh((2, 2), ("x", "y"), (AxisType.Auto,) * 2)


def surface(what: str, was: str, used_in: str, purpose: str) -> Callable[[Any], Any]:
    """Says of whatever goes wrong in a test that it is JAX's change, and whom it concerns."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def told(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                raise AssertionError(
                    f"JAX changed {what} (was {was}): used in {used_in} for {purpose}. "
                    f"Now, in jax {jax.__version__}: {type(error).__name__}: {error}"
                ) from error

        return told

    return decorate


def aval(shape: tuple[int, ...], *spec: Any, mesh: Any = EXPLICIT, **marks: Any) -> Any:
    place = NamedSharding(mesh, P(*spec, **marks))
    return jax.core.ShapedArray(shape, np.dtype(np.float32), sharding=place)


def probe(rule: Callable[..., Any] | None = None) -> Primitive:
    """A primitive of two results, which are its two operands."""
    primitive = Primitive("surface_probe")
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *avals: list(avals))
    if rule is not None:
        mlir.register_lowering(primitive, rule, cacheable=False)
    return primitive


def seen_by(look: Callable[[Any], Any], lower: Callable[[Any], Any]) -> Any:
    """What ``look`` finds in the context while a probe is lowered."""
    found: list[Any] = []

    def rule(ctx: Any, *xs: Any) -> Any:
        found.append(look(ctx))
        return xs

    primitive = probe(rule)
    lower(lambda x: primitive.bind(x, x)[0])
    return found[-1]


def lower_plainly(f: Any, platforms: tuple[str, ...] = ("cpu",)) -> Any:
    traced = jax.jit(f).trace(jax.ShapeDtypeStruct((8,), np.float32))
    return traced.lower(lowering_platforms=platforms)


def lower_sharded(f: Any) -> Any:
    place = NamedSharding(AUTO, P("x"))
    traced = jax.jit(f).trace(jax.ShapeDtypeStruct((8,), np.float32, sharding=place))
    return traced.lower(lowering_platforms=("cpu",))


def lower_manual(f: Any, *axes: str) -> Any:
    manual = {"axis_names": set(axes)} if axes else {}
    mapped = jax.shard_map(f, mesh=AUTO, in_specs=P("x"), out_specs=P("x"), **manual)
    return lower_sharded(mapped)


WAYS = {
    "one device": lower_plainly,
    "partitioned": lower_sharded,
    "manual": lower_manual,
    "partly manual": lambda f: lower_manual(f, "x"),
}


def lower_kernel() -> Any:
    """The update of one leaf by the GPU's kernel, lowered."""

    def step(h: Any, x: Any) -> Any:
        tree = {kind: [x] for kind in ("params", "grads", "m", "v")}
        return adamw_update(h, **tree, implementation="native")

    traced = jax.jit(step).trace(np.ones((1, NUM_SLOTS), np.float32), np.ones(40, np.float32))
    return traced.lower(lowering_platforms=("cuda",))
