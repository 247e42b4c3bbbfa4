"""Mistakes with shardings: of another mesh, tree or config, or of no sharding at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

MESH = AbstractMesh((4, 2), ("data", "model"))
OTHER = AbstractMesh((8,), ("data",))
WHOLE = NamedSharding(MESH, P())
CONFIG, AVERAGING = ax.AdamW(), ax.AdamW(use_ema=True)
PARAMS = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
STATE = ax.adamw_init(PARAMS, CONFIG)
BUILD = "adamw_xla.sharding.state_shardings(params, config)"
place = ax.sharding


def structs(**shapes: Any) -> Any:
    return {"layer": {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}}


SHAPES = structs(w=(2, 3), b=(3,))


def spread(value: Any = WHOLE, **leaves: Any) -> Any:
    return {"layer": {"w": value, "b": value} | leaves}


PLACES = place.state_shardings(spread(), CONFIG)


def step(places: Any, config: ax.AdamW = CONFIG) -> Any:
    state = ax.adamw_init(PARAMS, config)
    return ax.adamw_step(PARAMS, PARAMS, state, config, state_shardings=places)


# a call -> its error: what it was, where, and what to do
CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an axis that the mesh lacks": (
        lambda: place.zero1(MESH, "dta", SHAPES),
        ValueError,
        "zero1 | has no axis 'dta' | did you mean 'data'?",
    ),
    "an axis like no other": (
        lambda: place.zero1(MESH, ("data", "x"), SHAPES),
        ValueError,
        "zero1 | has no axis 'x' | it has ('data', 'model')",
    ),
    "a name for a mesh": (
        lambda: place.zero1("data", MESH, SHAPES),
        TypeError,
        "zero1 | mesh must be a jax.sharding.Mesh | got str",
    ),
    "a number for an axis": (
        lambda: place.zero1(MESH, 0, SHAPES),
        TypeError,
        "zero1 | axis must be the name of one, or several | got int",
    ),
    "no axis": (
        lambda: place.zero1(MESH, (), SHAPES),
        ValueError,
        "zero1 | axis must name one, or several and each once | got ()",
    ),
    "an axis twice": (
        lambda: place.zero1(MESH, ("data", "data"), SHAPES),
        ValueError,
        "zero1 | axis must name one, or several and each once | got ('data', 'data')",
    ),
    "a size in words": (
        lambda: place.zero1(MESH, "data", SHAPES, min_size="1MB"),
        TypeError,
        "zero1 | min_size must be a number of elements | got '1MB'",
    ),
    "no params": (lambda: place.zero1(MESH, "data"), TypeError, "zero1: lacks params"),
    "a leaf that the axis does not divide": (
        lambda: place.zero1(MESH, "data", structs(w=(5001, 7), b=(3,))),
        ValueError,
        "params['layer']['w'] | shape (5001, 7) | the 4 devices of 'data' | strict=False",
    ),
    "params of another mesh": (
        lambda: place.zero1(
            MESH,
            "data",
            {"w": jax.ShapeDtypeStruct((8, 8), "float32", sharding=NamedSharding(OTHER, P()))},
        ),
        ValueError,
        "params['w'] | on the mesh {'data': 8} | {'data': 4, 'model': 2} | the mesh of the params",
    ),
    "shardings for params": (
        lambda: place.zero1(MESH, "data", spread()),
        TypeError,
        "params['layer']['b'] | must be an array | got jax.sharding.NamedSharding",
    ),
    "specs": (
        lambda: place.state_shardings(spread(P("data")), CONFIG),
        TypeError,
        "params['layer']['b'] | is a PartitionSpec | jax.sharding.NamedSharding(mesh, P('data'",
    ),
    "numpy's arrays": (
        lambda: place.state_shardings(spread(np.ones(3)), CONFIG),
        TypeError,
        "params['layer']['b'] | got numpy.ndarray | give a jax.sharding.Sharding",
    ),
    "traced params": (
        lambda: jax.jit(lambda p: place.state_shardings(p, CONFIG).count)(PARAMS),
        TypeError,
        "params['layer']['b'] | is traced | outside of the traced function",
    ),
    "nothing": (lambda: place.state_shardings({}, CONFIG), ValueError, "params | has no leaf"),
    "a state for params": (
        lambda: place.state_shardings(STATE, CONFIG),
        TypeError,
        "params: got an AdamWState | state_shardings(params_or_shardings, config)",
    ),
    "no config": (
        lambda: place.state_shardings(PARAMS, 0.1),
        TypeError,
        "config must be an adamw_xla.AdamW | got float | AdamW(learning_rate=...)",
    ),
    "swapped": (
        lambda: place.abstract_state(CONFIG, PARAMS),
        TypeError,
        "params: got an AdamW | abstract_state(params, config)",
    ),
    "integers": (
        lambda: place.abstract_state({"w": jax.ShapeDtypeStruct((3,), "int32")}, CONFIG),
        TypeError,
        "params['w'] | int32 | float32",
    ),
    "an abstract state of other shardings": (
        lambda: place.abstract_state(SHAPES, AVERAGING, state_shardings=PLACES),
        ValueError,
        "state_shardings.ema | the shardings lack it | another config | " + BUILD,
    ),
    "a tree for a state's": (
        lambda: step(spread()),
        TypeError,
        "state_shardings | must be an AdamWState of shardings | got dict | " + BUILD,
    ),
    "of a config that has less": (
        lambda: step(PLACES, AVERAGING),
        ValueError,
        "state_shardings.ema | the shardings lack it | another config | " + BUILD,
    ),
    "of a config that has more": (
        lambda: step(place.state_shardings(spread(), AVERAGING)),
        ValueError,
        "state_shardings.ema | the shardings have it | another config | " + BUILD,
    ),
    "of other params": (
        lambda: step(place.state_shardings({"layer": {"w": WHOLE}}, CONFIG)),
        ValueError,
        "state_shardings.m | lacks ['layer']['b'] | the tree structure of params",
    ),
    "specs in a state": (
        lambda: step(ax.AdamWState(count=WHOLE, m=spread(), v=spread(b=P("data")))),
        TypeError,
        "state_shardings.v['layer']['b'] | is a PartitionSpec | NamedSharding(mesh, P('data'",
    ),
    "of a dimension that is not there": (
        lambda: step(place.state_shardings(spread(b=NamedSharding(MESH, P(None, "data"))), CONFIG)),
        ValueError,
        "state_shardings.m['layer']['b'] | cannot cut params['layer']['b'], of shape",
    ),
    "the state that is traced": (
        lambda: jax.jit(
            lambda s: ax.adamw_step(PARAMS, PARAMS, s, CONFIG, state_shardings=s)[1].count
        )(STATE),
        TypeError,
        "state_shardings.count | is traced | outside of the traced function",
    ),
    "shapes for init": (
        lambda: ax.adamw_init(SHAPES, CONFIG),
        TypeError,
        "params['layer']['b'] | a shape without values | adamw_xla.sharding.abstract_state",
    ),
    "shapes for init, with an average": (
        lambda: ax.adamw_init(SHAPES, AVERAGING),
        TypeError,
        "params['layer']['b'] | a shape without values | adamw_xla.sharding.abstract_state",
    ),
    "shapes for the drop-in's init, with an average": (
        lambda: axo.adamw(0.1, use_ema=True).init(SHAPES),
        TypeError,
        "params['layer']['b'] | ShapeDtypeStruct",
    ),
    "specs for the drop-in": (
        lambda: axo.adamw(0.1, state_shardings=spread(P())),
        TypeError,
        "state_shardings['layer']['b'] | is a PartitionSpec | NamedSharding(mesh, P())",
    ),
    "another tree for the drop-in": (
        lambda: axo.adamw(0.1, state_shardings={"layer": {"w": WHOLE}}).init(PARAMS),
        ValueError,
        "state_shardings: lacks ['layer']['b'] | the tree structure of params",
    ),
    "a state's for the drop-in": (
        lambda: axo.adamw(0.1, state_shardings=PLACES),
        TypeError,
        "state_shardings: must be a tree | like the params | got adamw_xla.AdamWState | zero1(mesh",
    ),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_calls(refused: Any, case: Any) -> None:
    call, error, parts = case
    refused(call, error, *parts.split(" | "), kept=(PARAMS, STATE))


@pytest.mark.parametrize("axis", ["data", "model", None])
def test_manual_axes(refused: Any, axis: str | None) -> None:
    """Also a state that is cut over the others: XLA would abort."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    places = place.state_shardings(spread(NamedSharding(mesh, P(axis))), CONFIG)

    def mapped(params: Any) -> Any:
        state = ax.adamw_init(params, CONFIG)
        return ax.adamw_step(params, params, state, CONFIG, state_shardings=places)[0]

    inside = jax.shard_map(mapped, mesh=mesh, axis_names={"data"}, in_specs=P(), out_specs=P())
    refused(
        lambda: jax.jit(inside)(PARAMS),
        ValueError,
        "state_shardings.m['layer']['b']",
        "jax.shard_map",
        "['data'] are manual",
        "leave state_shardings out",
        "jax.lax.psum_scatter",
    )
