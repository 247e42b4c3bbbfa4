"""Train steps, on meshes and alone, for ``inspect_hlo --function meshed_steps:NAME``."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamw_xla as ax

DEVICES = 8
SHAPES = {"w": (512, 256), "u": (256, 512)}
MESH = AbstractMesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def _built(spec: P, **jit: Any) -> tuple[Any, Any]:
    config = ax.AdamW(global_clipnorm=1.0)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(MESH, spec if x.ndim else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def train_step(params: Any, state: ax.AdamWState, x: jax.Array) -> Any:
        def loss(p: Any) -> jax.Array:
            hidden = jax.lax.with_sharding_constraint(jnp.tanh(x @ p["w"]), P("data"))
            return jnp.mean((hidden @ p["u"]) ** 2)

        return ax.adamw_step(params, jax.grad(loss)(params), state, config)

    shapes = {k: jax.ShapeDtypeStruct(shape, "float32") for k, shape in SHAPES.items()}
    state = jax.eval_shape(functools.partial(ax.adamw_init, config=config), shapes)
    batch = jax.ShapeDtypeStruct((64, 512), "float32", sharding=NamedSharding(MESH, P("data")))
    args = jax.tree.map(placed, shapes), jax.tree.map(placed, state), batch
    return jax.jit(train_step, donate_argnums=(0, 1), **jit), args


def fsdp() -> tuple[Any, Any]:
    """Params and state cut over the mesh."""
    return _built(P("data"))


def alone(*donated: int, clip: float | None = None) -> tuple[Any, Any]:
    """A step on one device, on gradients that are given; nothing is donated."""
    config = ax.AdamW(global_clipnorm=clip)

    def step(params: Any, state: ax.AdamWState, grads: Any) -> Any:
        return ax.adamw_step(params, grads, state, config, implementation="xla")

    shapes = {k: jax.ShapeDtypeStruct(shape, "float32") for k, shape in SHAPES.items()}
    state = jax.eval_shape(functools.partial(ax.adamw_init, config=config), shapes)
    return jax.jit(step, donate_argnums=donated), (shapes, state, shapes)


def in_place() -> tuple[Any, Any]:
    """The same, with params and state donated."""
    return alone(0, 1)


def clipped() -> tuple[Any, Any]:
    """The same, with a norm before it."""
    return alone(0, 1, clip=1.0)


def filtered() -> tuple[Any, Any]:
    """What Equinox makes of a step whose model holds functions beside its arrays."""
    import equinox as eqx

    config = ax.AdamW()
    model = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
    state = ax.adamw_init(eqx.filter(model, eqx.is_array), config)

    @eqx.filter_jit(donate="all-except-first")
    def train_step(x: jax.Array, model: Any, state: ax.AdamWState, name: str) -> Any:
        params, static = eqx.partition(model, eqx.is_array)

        def loss(p: Any) -> jax.Array:
            return jnp.mean(jax.vmap(eqx.combine(p, static))(x) ** 2)

        params, state = ax.adamw_step(params, jax.grad(loss)(params), state, config)
        return eqx.combine(params, static), state, name

    return train_step, (jnp.ones((5, 8)), model, state, "it")


def elsewhere() -> tuple[Any, Any]:
    """Jitted with shardings of this machine."""
    own = jax.make_mesh((1,), ("data",))
    return _built(P("data"), in_shardings=NamedSharding(own, P()))


def mapped() -> tuple[Any, Any]:
    """With a mesh of this machine inside."""
    own = jax.make_mesh((1,), ("data",))
    _, args = _built(P())
    double = jax.shard_map(lambda x: 2 * x, mesh=own, in_specs=P("data"), out_specs=P("data"))
    return jax.jit(lambda params, state, x: double(x)), args


def two_meshes() -> tuple[Any, Any]:
    """A batch on another mesh than the params."""
    step, (params, state, batch) = _built(P("data"))
    other = AbstractMesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    batch = jax.ShapeDtypeStruct(batch.shape, batch.dtype, sharding=NamedSharding(other, P("x")))
    return step, (params, state, batch)
