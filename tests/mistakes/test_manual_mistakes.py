"""Mistakes inside of ``jax.shard_map``: whose parts are of one norm, and who has averaged what."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

MESH = AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
SPECS = {"layer": {"w": P(None, "model"), "b": P()}}
PARAMS = {"layer": {"w": jnp.ones((4, 8)), "b": jnp.ones(3)}}
NORMS: dict[str, dict[str, Any]] = {
    "global_clipnorm": {"global_clipnorm": 1.0},
    "clipnorm": {"clipnorm": 1.0},
    "skip_nonfinite": {"skip_nonfinite": True},
}
EVERY = tuple(MESH.axis_names)


def native(step: Any, options: dict[str, Any]) -> Callable[..., Any]:
    config = ax.AdamW(**options)
    return lambda p, g: step(p, g, ax.adamw_init(p, config), config)[0]


def through_optax(options: dict[str, Any]) -> Callable[..., Any]:
    solver = axo.adamw(0.1, **options)
    return lambda p, g: optax.apply_updates(p, solver.update(g, solver.init(p), p)[0])


FRONTS: dict[str, tuple[Callable[[dict[str, Any]], Callable[..., Any]], str]] = {
    "step": (functools.partial(native, ax.adamw_step), "the config"),
    "reference": (functools.partial(native, ax.reference.adamw_step), "the config"),
    "optax": (through_optax, "adamw"),
}


def clip(axis_names: Any) -> Callable[..., Any]:
    solver = axo.clip_by_global_norm(1.0, axis_names=axis_names)
    return lambda p, g: solver.update(g, solver.init(p), p)[0]


def trace(
    step: Callable[..., Any],
    *,
    vma: bool = True,
    varying: tuple[str, ...] = (),
    mesh: Any = MESH,
    specs: Any = SPECS,
    **options: Any,
) -> Any:
    """What shard_map makes of a step, traced; the gradients of some leaves vary over "data"."""

    def own(params: Any, grads: Any) -> Any:
        moved = {k: jax.lax.pcast(grads["layer"][k], "data", to="varying") for k in varying}
        return step(params, {"layer": grads["layer"] | moved})

    mapped = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(specs, specs),
        out_specs=specs,
        check_vma=vma,
        **options,
    )
    return jax.eval_shape(mapped, PARAMS, PARAMS)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("option", NORMS)
@pytest.mark.parametrize("vma", [True, False])
def test_nobody_says_whose_norm_it_is(refused: Any, front: str, option: str, vma: bool) -> None:
    make, what = FRONTS[front]
    text = refused(
        lambda: trace(make(NORMS[option]), vma=vma),
        ValueError,
        f"axis_names: {option} needs to know",
        f"{what} does not say",
        "or axis_names=() where each device",
    )
    # The advice is followed.
    code = re.search(r"(?<=axis_names=)(\(.*?\)|specs)", text)
    assert code
    said = eval(code[0], {"specs": SPECS})
    assert said == (EVERY if vma else SPECS)
    for names in (said, ()) if not vma else (said,):
        trace(make(NORMS[option] | {"axis_names": names}), vma=vma)
    trace(make({}), vma=vma)  # no norm: nothing to say
    one = AbstractMesh((1, 1), EVERY, (AxisType.Auto,) * 2)
    trace(make(NORMS[option]), vma=vma, mesh=one)
    jax.eval_shape(make(NORMS[option]), PARAMS, PARAMS)


@pytest.mark.parametrize("vma", [True, False])
def test_a_clip_in_front_is_as_careful(refused: Any, vma: bool) -> None:
    said = ("axis_names: clip_by_global_norm needs", "clip_by_global_norm does not say")
    refused(lambda: trace(clip(None), vma=vma), ValueError, *said)
    trace(clip(EVERY if vma else SPECS), vma=vma)
    refused(lambda: trace(clip(EVERY), varying=("w",)), ValueError, "grads['layer']['w']: varies")
    refused(lambda: axo.clip_by_global_norm(1.0, axis_names="x"), TypeError, "axis_names", "'x'")


Wrong = tuple[Any, dict[str, Any], str]
# axis_names, how it is traced -> what the error says
WRONG: dict[str, Wrong] = {
    "no axis": (
        ("data", "fsdp"),
        {},
        "axis_names: 'fsdp' is no axis of this mesh | has 'data', 'model'",
    ),
    "no axis, in a spec": (
        {"layer": {"w": P(None, "tp"), "b": P()}},
        {"vma": False},
        "axis_names: 'tp' is no axis of this mesh | has 'data', 'model'",
    ),
    "not manual": (
        ("data", "model"),
        {"axis_names": {"data"}, "specs": P()},
        "'model' is an axis of the mesh that is not manual here | leave it out | Manual is 'data'",
    ),
    "names where types do not tell": (
        ("data", "model"),
        {"vma": False},
        "with check_vma=False types do not tell | 'data', 'model' | tree of PartitionSpecs",
    ),
    "a leaf said to be whole": (
        {"layer": P()},
        {},
        "says () of params['layer']['w'] | by its type varies over ('model',) | in_specs",
    ),
    "a leaf said to be split": (
        {"layer": {"w": ("model",), "b": ("data",)}},
        {},
        "says ('data',) of params['layer']['b'] | by its type varies over () | in_specs",
    ),
    "another tree": (
        {"layer": {"w": P(None, "model")}},
        {"vma": False},
        "axis_names: lacks ['layer']['b'], which params has",
    ),
    "one more": (
        {"layer": {**SPECS["layer"], "c": ("data", "model")}},
        {"vma": False},
        "axis_names: has ['layer']['c'], which params lacks",
    ),
    "not averaged": (
        EVERY,
        {"varying": ("b",)},
        "grads['layer']['b']: varies over 'data', which params['layer']['b'] does not | "
        "jax.lax.pmean(grads, ('data',))",
    ),
    "not averaged, and a tree": (
        SPECS,
        {"varying": ("w", "b")},
        "grads['layer']['b']: varies over 'data', which | jax.lax.pmean(grads, ('data',))",
    ),
}


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_axes_that_do_not_fit(refused: Any, front: str, case: Wrong) -> None:
    axis_names, how, parts = case
    step = FRONTS[front][0]({"global_clipnorm": 1.0, "axis_names": axis_names})
    refused(lambda: trace(step, **how), ValueError, *parts.split(" | "))


def test_gradients_that_are_averaged_as_the_error_says() -> None:
    step = FRONTS["step"][0]({"global_clipnorm": 1.0, "axis_names": EVERY})

    def averaging(p: Any, g: Any) -> Any:
        return step(p, jax.lax.pmean(g, ("data",)))

    trace(averaging, varying=("w", "b"))


def test_names_are_checked_where_no_norm_is_needed_too(refused: Any) -> None:
    step = FRONTS["step"][0]({"axis_names": ("fsdp",)})
    refused(lambda: trace(step), ValueError, "'fsdp' is no axis of this mesh")
    jax.eval_shape(step, PARAMS, PARAMS)  # here is no mesh


@pytest.mark.parametrize("inside", [True, False])
def test_an_axis_of_vmap_is_none_of_a_mesh(refused: Any, inside: bool) -> None:
    step = FRONTS["step"][0]({"global_clipnorm": 1.0, "axis_names": ("members",)})

    def many(p: Any, g: Any) -> Any:
        rates = jnp.ones(3)
        scaled = jax.vmap(lambda r: step(p, jax.tree.map(lambda x: r * x, g)), axis_name="members")
        return jax.tree.map(lambda x: x[0], scaled(rates))

    call: Any = functools.partial(trace, many) if inside else lambda: many(PARAMS, PARAMS)
    refused(call, ValueError, "'members' is an axis of jax.vmap", "norm of its own. Leave it out")


KINDS: dict[str, tuple[Any, str]] = {
    "a name": ("data", "axis_names must be a tuple of names | got 'data' | ('data',)"),
    "a number": (1, "axis_names must be a tuple of names | got 1"),
    "a list of names": (["data"], "axis_names[0] must be a tuple of names | got 'data'"),
    "a number in a tree": ({"w": ("data",), "b": 0}, "axis_names['b'] must | got 0"),
    "a bare name in a tree": ({"w": "data"}, "axis_names['w'] must | got 'data' | ('data',)"),
    "unconstrained": (
        {"w": P("data", P.UNCONSTRAINED)},
        "axis_names['w'] must be a tuple of names | UNCONSTRAINED",
    ),
    "a mesh": (MESH, "axis_names must be a tuple of names | one name is ('data',)"),
}


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_what_axis_names_may_not_be(refused: Any, case: tuple[Any, str]) -> None:
    value, parts = case
    for make in (ax.AdamW, functools.partial(axo.adamw, 0.1)):
        refused(lambda make=make: make(axis_names=value), TypeError, *parts.split(" | "))


def test_what_it_may_be() -> None:
    """As names, sets and shardings come; kept so that the config can be a key and compared."""
    there = NamedSharding(MESH, P("data"))
    assert ax.AdamW(axis_names={"model", "data"}).axis_names == ("data", "model")
    assert ax.AdamW(axis_names={"w": there}).axis_names == {"w": P("data")}
    assert ax.AdamW(axis_names=EVERY).axis_names == EVERY
    for value in (EVERY, (), P("data"), SPECS, [P(), ("data",)], None):
        config = ax.AdamW(axis_names=value)
        again = jax.tree.unflatten(jax.tree.structure(config), jax.tree.leaves(config))
        assert again == config == dataclasses.replace(config)
        assert hash(again) == hash(config)
        assert again.axis_names == value
    assert ax.AdamW(axis_names=P("data")) != ax.AdamW(axis_names=("data",))
    assert np.shape(ax.AdamW(axis_names=()).learning_rate) == ()


@pytest.mark.parametrize("vma", [True, False])
def test_specs_are_of_all_leaves_or_of_those_that_are_trained(vma: bool) -> None:
    """The frozen leaf stands in front of the other: its spec is not taken for that one's."""
    trained = {"layer": {**SPECS["layer"], "b": None}}
    kept = [(SPECS, True), (SPECS, False), (trained, False)]
    for names, has_state in [*kept, (EVERY, True), (EVERY, False)] if vma else kept:
        config = ax.AdamW(global_clipnorm=1.0, axis_names=names)

        def step(p: Any, g: Any, config: ax.AdamW = config, has_state: bool = has_state) -> Any:
            own, grads = ({"layer": {"w": x["layer"]["w"], "b": None}} for x in (p, g))
            state = ax.adamw_init(p if has_state else own, config)
            return ax.adamw_step(p, grads, state, config)[0]

        mapped = jax.shard_map(
            step, mesh=MESH, in_specs=(SPECS, SPECS), out_specs=SPECS, check_vma=vma
        )
        text = str(jax.make_jaxpr(mapped)(PARAMS, PARAMS))
        assert re.findall(r"psum\w*\[\s*axes=\((.*?)\)", text) == ["'model',"], text
