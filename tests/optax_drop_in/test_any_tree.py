"""Any tree that people train: every container, with leaves that no optimizer knows.

A call makes what the oracle makes, or one error that names what, where and what to do. Nothing
but its own leaves, and None where it was given None, goes through a container's constructor.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from comparing import ATOL, RTOL, same
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

eqx = pytest.importorskip("equinox")
flax = pytest.importorskip("flax")
nnx = pytest.importorskip("flax.nnx")

# ----------------------------------------------------------------------------------- trees


def check(node: Any) -> None:
    """What people write in ``__post_init__``: x is a vector, y and z are what you like."""
    if node.x.ndim != 1:
        raise ValueError("x must be a vector")


class Named(NamedTuple):
    x: Any
    y: Any
    z: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Checked:
    x: Any
    y: Any
    z: Any
    __post_init__ = check


@flax.struct.dataclass
class Struct:
    x: Any
    y: Any
    z: Any
    __post_init__ = check


class Module(eqx.Module):  # type: ignore[misc, name-defined]
    x: Any
    y: Any
    z: Any
    __check_init__ = check


CONTAINERS: dict[str, Callable[..., Any]] = {
    "dict": lambda *children: dict(zip("xyz", children, strict=True)),
    "list": lambda *children: [*children],
    "tuple": lambda *children: children,
    "NamedTuple": Named,
    "dataclass": Checked,
    "flax.struct": Struct,
    "eqx.Module": Module,
    "nnx.State": lambda *children: nnx.State(dict(zip("xyz", children, strict=True))),
    "FrozenDict": lambda *children: flax.core.FrozenDict(zip("xyz", children, strict=True)),
}
FOREIGN: dict[str, Any] = {
    "function": jax.nn.relu,
    "integers": jnp.arange(3),
    "host integers": np.arange(3),
    "key": jax.random.key(0),
    "string": "gelu",
    "flag": True,
    "number": 0.5,
    "complex": jnp.ones(3, complex),
}
HELD = ("trained", "frozen")
"""What has state: leaves with a gradient, and without one. The others are foreign, or None."""

LEAVES = st.sampled_from([*HELD, "none", *FOREIGN])


def nodes(child: Any) -> Any:
    """A container, and what it is made of."""
    return st.tuples(st.sampled_from([*CONTAINERS]), st.just("trained"), child, child)


def build(spec: Any, leaf: Callable[[str], Any]) -> Any:
    """A tree, by the containers' constructors."""
    if isinstance(spec, str):
        return leaf(spec)
    return CONTAINERS[spec[0]](*(build(child, leaf) for child in spec[1:]))


def kinds(spec: Any) -> list[str]:
    return [spec] if isinstance(spec, str) else [x for child in spec[1:] for x in kinds(child)]


def values(kept: tuple[str, ...], dtype: str, seed: int, others: Any = None) -> Any:
    """The leaves of these kinds; of two calls with one seed, the same."""
    rng = np.random.default_rng(seed)

    def leaf(kind: str) -> Any:
        value = rng.uniform(0.5, 1.0, 3).astype(jnp.dtype(dtype))
        return value if kind in kept else (others or {}).get(kind)

    return leaf


def doubles(tree: Any) -> list[Any]:
    return [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)]


def applied(model: Any, updates: Any) -> Any:
    """The model with the updates added where there are any, in its own dtypes."""
    leaves, treedef = jax.tree.flatten(model)
    pairs = zip(leaves, treedef.flatten_up_to(updates), strict=True)
    return treedef.unflatten(
        p if u is None else (jnp.asarray(p) + u).astype(jnp.asarray(p).dtype) for p, u in pairs
    )


# ----------------------------------------------------------------------------------- calls

OPTIONS: list[dict[str, Any]] = [{}, {"gradient_accumulation_steps": 2, "use_ema": True}]
NUMBERS = {"learning_rate": 0.125, "weight_decay": 0.25}


@settings(max_examples=200)
@given(
    spec=nodes(st.one_of(LEAVES, nodes(LEAVES))),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    options=st.sampled_from(OPTIONS),
    drop_in=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_call_makes_what_the_oracle_makes(
    spec: Any, dtype: str, options: dict[str, Any], drop_in: bool, seed: int
) -> None:
    model = build(spec, values(HELD, dtype, seed, FOREIGN))
    trained = build(spec, values(HELD, dtype, seed))
    grads = build(spec, values(("trained",), dtype, seed + 1))
    config = ax.AdamW(**NUMBERS, **options, epsilon_hat=not drop_in)
    solver: Any = axo.adamw(**NUMBERS, **options, eps=config.epsilon)
    state: Any = solver.init(trained) if drop_in else ax.adamw_init(trained, config)
    names = {field.name for field in dataclasses.fields(oracle.Options)} - {"mask"}
    exact = oracle.Options(**{name: getattr(config, name) for name in names})
    want, known = doubles(trained), oracle.init(doubles(trained))
    slopes = jax.tree.structure(trained).flatten_up_to(grads)
    slopes = [None if g is None else g.astype(np.float64) for g in slopes]
    new = model
    for _ in range(options.get("gradient_accumulation_steps", 1)):
        want, known, _ = oracle.step(want, slopes, known, exact)
        if drop_in:
            updates, state = solver.update(grads, state, model)
            assert jax.tree.structure(updates) == jax.tree.structure(grads)
            new = applied(model, updates)
        else:
            new, state = ax.adamw_step(new, grads, state, config)
    assert jax.tree.structure(new) == jax.tree.structure(model)
    found = [kind for kind in kinds(spec) if kind != "none"]
    ours = []
    for kind, x, y in zip(found, jax.tree.leaves(new), jax.tree.leaves(model), strict=True):
        assert x is y if kind != "trained" else x.dtype == jax.dtypes.canonicalize_dtype(dtype)
        ours += [x] if kind in HELD else []
    native = state.native() if drop_in else state
    if config.use_ema:
        averages = ax.adamw_finalize(model, native, config)
        assert jax.tree.structure(averages) == jax.tree.structure(model)
    half_a_unit = 0 if dtype == "float64" else float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(doubles(ours), want, RTOL + half_a_unit, ATOL)
    for name in ("m", "v", "ema", "accumulated"):
        tree = getattr(native, name)
        if tree is not None:
            assert jax.tree.structure(tree) == jax.tree.structure(trained)
            np.testing.assert_allclose(doubles(tree), getattr(known, name), RTOL, ATOL)


FOREIGN_LEAVES = st.sampled_from([*FOREIGN])
MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "init with what is not trained": (FOREIGN, TypeError, "None stands for no leaf"),
    "a gradient of what is not trained": (FOREIGN, TypeError, "None stands for no leaf"),
    "a gradient without state": (("frozen",), ValueError, "give it state there"),
    "a gradient of another shape": (("frozen",), ValueError, "must be (3,)"),
}


@settings(max_examples=60)
@given(
    spec=st.tuples(
        st.sampled_from([*CONTAINERS]),
        st.just("trained"),
        st.just("frozen"),
        st.one_of(FOREIGN_LEAVES, nodes(FOREIGN_LEAVES)),
    ),
    mistake=st.sampled_from([*MISTAKES]),
    drop_in=st.booleans(),
)
def test_a_mistake_is_one_error_with_three_parts(spec: Any, mistake: str, drop_in: bool) -> None:
    solver, config = axo.adamw(**NUMBERS), ax.AdamW(**NUMBERS)
    about, error, to_do = MISTAKES[mistake]
    model = build(spec, values(HELD, "float32", 0, FOREIGN))
    slope = np.ones(4 if mistake.endswith("shape") else 3, np.float32)
    slopes = {kind: slope for kind in about if not mistake.startswith("init")}
    grads = build(spec, values(("trained",), "float32", 1, slopes))
    held = ("trained",) if mistake.endswith("state") else HELD
    start = build(spec, values(held, "float32", 0, FOREIGN if mistake.startswith("init") else {}))
    paths = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(model)]
    where = next(k for k, kind in zip(paths, kinds(spec), strict=True) if kind in about)
    calls: dict[bool, Any] = {
        True: lambda: solver.update(grads, solver.init(start), model),
        False: lambda: ax.adamw_step(model, grads, ax.adamw_init(start, config), config),
    }
    with pytest.raises(error) as caught:
        calls[drop_in]()
    what, _, rest = str(caught.value).partition(where)
    assert what in ("params", "grads", "opt_state.mu" if drop_in else "state.m")
    assert to_do in rest


# ------------------------------------------------------------ constructors that check, masks


@pytest.mark.parametrize("container", [Checked, Struct, Module])
def test_no_placeholder_meets_a_constructor(container: Any) -> None:
    """With a mask's prefix, without a gradient, between updates and under optax' wrapper."""
    params = [container(jnp.ones(3), jnp.ones(2), None), jnp.ones(3)]
    grads = [container(jnp.ones(3), None, None), jnp.ones(3)]
    mask = [True, False]
    for options in OPTIONS:
        solver = axo.adamw(0.1, mask=mask, **options)
        updates, _ = jax.jit(solver.update)(grads, solver.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        config = ax.AdamW(weight_decay_mask=mask, **options)
        state = ax.adamw_init(params, config)
        new, state = jax.jit(ax.adamw_step)(params, grads, state, config)
        if config.use_ema:
            averages = ax.adamw_finalize(new, state, config)
            assert jax.tree.structure(new) == jax.tree.structure(averages)
    many = optax.MultiSteps(axo.adamw(0.1, mask=mask), 2)
    updates, _ = jax.jit(many.update)(params, many.init(params), params)
    same(updates, jax.tree.map(jnp.zeros_like, params))


@pytest.mark.parametrize(
    "mask",
    [
        lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        {"w": True, "b": False, "f": None, "n": None},
        {"w": True, "b": False, "f": True, "n": False},
    ],
    ids=["function", "of what is trained", "of the model"],
)
def test_a_mask_is_of_what_has_state(mask: Any) -> None:
    trained = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "f": None, "n": None}
    zeros = jax.tree.map(jnp.zeros_like, trained)
    solver = axo.adamw(0.1, weight_decay=0.5, mask=mask)
    model = trained | {"f": jax.nn.relu, "n": jnp.arange(3)}
    updates, _ = solver.update(zeros, solver.init(trained), model)
    assert np.all(updates["w"] < 0)
    assert not np.any(updates["b"])
