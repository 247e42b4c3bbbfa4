"""Train steps of a model of three leaves: where params and state lie, and whose AdamW it is."""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

import adamw_xla as ax

SHAPES = {"b": (512,), "u": (256, 512), "w": (512, 256)}
ELEMENTS = sum(map(math.prod, SHAPES.values()))
ROWS = 64
"""Of a batch of all devices."""

CUT, WHOLE = {k: P("x") for k in SHAPES}, {k: P() for k in SHAPES}
COLUMNS = {"b": P(), "u": P("x"), "w": P(None, "x")}


class Layout(NamedTuple):
    """How all of it lies on a mesh of the one axis x."""

    params: dict[str, P]
    state: dict[str, P]
    batch: P = P("x")
    hidden: P = P("x")
    in_host: bool = False


LAYOUTS = {
    "data": Layout(WHOLE, WHOLE),
    "fsdp": Layout(CUT, CUT),
    "tensor": Layout(COLUMNS, COLUMNS, P(), P(None, "x")),
    "zero1": Layout(WHOLE, CUT),
    "zero1 in host": Layout(WHOLE, CUT, in_host=True),
}


class Optimizer(NamedTuple):
    """One's AdamW.

    Attributes:
      state: shapes of the state.
      places: shardings of it, given those of the moments of each param.
      update: params, gradients and state to new params and state.
    """

    state: Any
    places: Callable[[Any, Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


def ours(params: Any, layout: Layout, mesh: Mesh) -> Optimizer:
    """Clipped by the norm; it streams a state in host memory by itself."""
    config = ax.AdamW(global_clipnorm=1.0)
    kept = {"offload": True} if layout.in_host else {}

    def places(moments: Any, scalar: Any) -> Any:
        return ax.AdamWState(scalar, moments, moments)

    def update(params: Any, grads: Any, state: Any) -> Any:
        if layout.in_host:
            kept["state_shardings"] = places(at(mesh, layout.state, True), at(mesh, P()))
        return ax.adamw_step(params, grads, state, config, **kept)

    state = jax.eval_shape(functools.partial(ax.adamw_init, config=config), params)
    return Optimizer(state, places, update)


def of_optax(params: Any, layout: Layout, mesh: Mesh) -> Optimizer:
    adamw = optax.adamw(1e-3)
    state = jax.eval_shape(adamw.init, params)

    def places(moments: Any, scalar: Any) -> Any:
        return (state[0]._replace(count=scalar, mu=moments, nu=moments), *state[1:])

    def update(params: Any, grads: Any, state: Any) -> Any:
        updates, state = adamw.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Optimizer(state, places, update)


def of_keras(params: Any, layout: Layout, mesh: Mesh) -> Optimizer:
    """Keras' own, its variables a plain list, as its guide to custom loops on JAX has them."""
    import keras

    variables = {k: keras.Variable(jnp.zeros(x.shape), name=k) for k, x in params.items()}
    adamw = keras.optimizers.AdamW(1e-3)
    adamw.build([*variables.values()])
    state = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in adamw.variables]

    def places(moments: Any, scalar: Any) -> Any:
        return [moments.get(x.path.split("/")[-1].split("_")[0], scalar) for x in adamw.variables]

    def update(params: Any, grads: Any, state: Any) -> Any:
        given = ([tree[key] for key in params] for tree in (grads, params))
        new, state = adamw.stateless_apply(state, *given)
        return dict(zip(params, new, strict=True)), state

    return Optimizer(state, places, update)


OPTIMIZERS = {"ours": ours, "optax": of_optax, "keras": of_keras}


def at(mesh: Mesh, specs: Any, in_host: bool = False) -> Any:
    """Specs as shardings."""
    kind = "pinned_host" if in_host else None
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec, memory_kind=kind), specs)


def lowered(
    mesh: Mesh, who: str, layout: Layout, *, donate: bool = True, gathered: bool = False
) -> Any:
    """A train step for the mesh's devices; if ``gathered`` one that hands out its moments whole."""
    params = {k: jax.ShapeDtypeStruct(shape, "float32") for k, shape in SHAPES.items()}
    optimizer = OPTIMIZERS[who](params, layout, mesh)
    here = optimizer.places(at(mesh, layout.state), at(mesh, P()))
    there = optimizer.places(at(mesh, layout.state, layout.in_host), at(mesh, P()))
    wanted = optimizer.places(at(mesh, WHOLE), at(mesh, P())) if gathered else there
    fetches = layout.in_host and who != "ours"

    def loss(params: Any, x: jax.Array) -> jax.Array:
        if layout.params is CUT:
            params = jax.lax.with_sharding_constraint(params, at(mesh, WHOLE))
        hidden = jnp.tanh(x @ params["w"])
        hidden = jax.lax.with_sharding_constraint(hidden, at(mesh, layout.hidden))
        return jnp.mean((hidden @ params["u"] + params["b"]) ** 2)

    def train_step(params: Any, state: Any, x: jax.Array) -> Any:
        grads = jax.grad(loss)(params, x)
        grads = jax.lax.with_sharding_constraint(grads, at(mesh, layout.state))
        if fetches:  # as JAX' guide to offloading does it
            state = jax.device_put(state, here)
        params, state = optimizer.update(params, grads, state)
        return params, jax.device_put(state, there) if fetches else state

    jitted = jax.jit(
        train_step,
        donate_argnums=(0, 1) if donate else (),
        in_shardings=(at(mesh, layout.params), there, at(mesh, layout.batch)),
        out_shardings=(at(mesh, layout.params), wanted),
    )
    x = jax.ShapeDtypeStruct((ROWS, SHAPES["w"][0]), "float32")
    state = jax.tree.map(lambda x, place: x.update(sharding=place), optimizer.state, there)
    platform = mesh.devices.flat[0].platform
    return jitted.trace(params, state, x).lower(lowering_platforms=(platform,))
