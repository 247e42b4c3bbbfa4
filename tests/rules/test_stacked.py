"""Leaves that hold layers along axis 0: what is made of them is what is made of a list of layers.

Run one on eight devices by hand: ``PYTHONPATH=tests/helpers
XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/rules/test_stacked.py NAME``.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from pathlib import Path
import re
from typing import Any

from comparing import close, same
from cpu_oracle import require_native
from eight_devices import assert_passed, main
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
from small import equations

import adamw_xla as ax
from adamw_xla._inside.processes import _text
import adamw_xla.optax as axo

SHAPES = {
    "blocks": {"b": (4, 4), "g": (4,), "w": (4, 6, 4)},
    "dec": {"w": (2, 3, 4)},
    "head": (8,),
    "out": (4, 4),
}
"""All but the head hold layers, and leaves of as many are no neighbours."""

WAYS: dict[str, Any] = {
    "patterns": ("blocks", "^dec/", "out"),
    "one pattern": "locks|dec|out",
    "a callable": lambda path, leaf: path == "blocks/g" or leaf.ndim > 1,
    "a prefix": {"blocks": True, "dec": {"w": True}, "head": False, "out": True},
}
STACKED = WAYS["patterns"]


def tree(seed: int) -> Any:
    """Small integers times a power of two for each layer: sums of squares are exact."""
    rng = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> Any:
        sizes = 2.0 ** (np.arange(shape[0]) % 4 - 3)
        x = rng.integers(-4, 5, shape) * sizes.reshape(-1, *[1] * (len(shape) - 1))
        return jnp.asarray(x, jnp.float32)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def listed(value: Any) -> Any:
    """Layers in lists, in place of stacks; of a state in all of its fields."""
    if isinstance(value, ax.AdamWState):
        fields = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
        return ax.AdamWState(**{name: listed(x) for name, x in fields.items()})
    if not isinstance(value, dict):
        return value
    stacks = jax.tree.map(list, {k: x for k, x in value.items() if k != "head"})
    return stacks | {"head": value["head"]}


def few(value: Any) -> Any:
    """Of a tree two leaves, one of them a stack."""
    return {k: value[k] for k in ("dec", "head")}


def of_matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


COMMON: dict[str, Any] = {
    "learning_rate": 0.1,
    "weight_decay": 0.25,
    "clipnorm": 1.0,
    "weight_decay_mask": of_matrices,
    "groups": (ax.Group(lambda path, leaf: leaf.shape == (4,), scale=0.5),),
}
"""By dimensions: of a layer."""

FORMATS: dict[str, dict[str, Any]] = {
    "moments": {"amsgrad": True, "use_ema": True, "skip_nonfinite": True},
    "words": {"state_format": "word16", "nesterov": True},
    "masters": {"state_format": "word16", "master": "split"},
    "accumulated": {"gradient_accumulation_steps": 2, "skip_spikes": ax.SpikeRule(window=4)},
}


# ------------------------------------------------------------------- as a list of layers


def trained(config: ax.AdamW, dtype: Any, of: Any, **options: Any) -> Any:
    params = of(jax.tree.map(lambda x: x.astype(dtype), tree(0)))
    state, info = ax.adamw_init(params, config), None
    step = jax.jit(functools.partial(ax.adamw_step, config=config, **options))
    for seed in (1, 2, 3, 4):
        params, state, *info = step(params, of(tree(seed)), state)
    return params, state, info


@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_is_trained_as_the_list_of_its_layers(name: str) -> None:
    """To the bit, by the kernel: XLA contracts multiply-adds as its loops fall."""
    require_native()
    dtype = jnp.bfloat16 if name == "masters" else jnp.float32
    config = ax.AdamW(**COMMON, **FORMATS[name])
    stacked = dataclasses.replace(config, stacked=STACKED)
    params, state, _ = trained(stacked, dtype, lambda x: x)
    layers, of_layers, _ = trained(config, dtype, listed)
    same((listed(params), listed(state)), (layers, of_layers))


def test_what_a_step_tells_is_the_same_too() -> None:
    config = ax.AdamW(clipnorm=1.0, skip_nonfinite=True)
    stacked = dataclasses.replace(config, stacked="dec")
    one = trained(stacked, jnp.float32, few, return_info="per_leaf")
    other = trained(config, jnp.float32, lambda x: listed(few(x)), return_info="per_leaf")
    (told,), (of_list,) = one[2], other[2]
    close((listed(one[0]), listed(one[1])), other[:2])
    close(*(dataclasses.replace(x, per_leaf=None) for x in (told, of_list)))
    for name, norms in vars(told.per_leaf).items():
        close(listed(norms), getattr(of_list.per_leaf, name))
    assert 0 < told.clip_factor < 1
    (whole,) = trained(stacked, jnp.float32, few, return_info=True)[2]
    close(whole, dataclasses.replace(told, per_leaf=None))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_norms_of_each_layer_need_no_clip(options: dict[str, Any]) -> None:
    config = ax.AdamW(stacked=STACKED, **options)
    params, _, (info,) = trained(config, jnp.float32, lambda x: x, return_info="per_leaf")
    want = jax.tree.map(lambda x: np.sqrt(np.sum(np.square(np.float64(x)))), listed(params))
    norms = listed(info.per_leaf.param_norm)
    assert jax.tree.structure(norms) == jax.tree.structure(want)
    for got, expected in zip(jax.tree.leaves(norms), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_reference_has_the_same_derivatives() -> None:
    def slopes(config: ax.AdamW, of: Any) -> Any:
        params = of(tree(0))
        state = ax.adamw_init(params, config)

        def total(grads: Any) -> Any:
            new, _ = ax.reference.adamw_step(params, grads, state, config)
            return sum(jnp.sum(x * x) for x in jax.tree.leaves(new))

        return jax.jit(jax.grad(total))(of(tree(1)))

    config = ax.AdamW(0.1, clipnorm=1.0, epsilon=0.5)
    stacked = dataclasses.replace(config, stacked="dec")
    close(listed(slopes(stacked, few)), slopes(config, lambda x: listed(few(x))))


def test_without_stacked_a_stack_is_one_leaf() -> None:
    config = ax.AdamW(clipnorm=1.0)
    params = tree(0)
    step = jax.jit(ax.adamw_step, static_argnames="config")
    _, state = step(params, tree(1), ax.adamw_init(params, config), config)
    for x in jax.tree.leaves(state.m):
        assert np.linalg.norm(x) <= 0.1 * (1 + 1e-6)
    stacked = dataclasses.replace(config, stacked=STACKED)
    _, state = step(params, tree(1), ax.adamw_init(params, stacked), stacked)
    norms = np.linalg.norm(np.reshape(state.m["blocks"]["w"], (4, -1)), axis=1)
    assert norms.max() <= 0.1 * (1 + 1e-6)
    assert np.sum(norms > 0.099) >= 2


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_say_it_is_the_same_program(way: str) -> None:
    def program(stacked: Any) -> str:
        config = ax.AdamW(**COMMON, stacked=stacked)
        state = ax.adamw_init(params, config)
        return str(jax.make_jaxpr(functools.partial(ax.adamw_step, config=config))(*args, state))

    params = tree(0)
    args = params, tree(1)
    assert program(WAYS[way]) == program(STACKED)


def test_leaves_of_as_many_layers_are_one_equation_and_without_clipnorm_all_are() -> None:
    def found(**options: Any) -> list[Any]:
        config = ax.AdamW(stacked=STACKED, **options)
        state = ax.adamw_init(params, config)
        step = functools.partial(ax.adamw_step, config=config)
        made = equations(jax.make_jaxpr(step)(params, tree(1), state).jaxpr)
        return sorted(
            (eqn.params["spec"].num_leaves, eqn.params["spec"].batch_rank) for eqn in made
        )

    params = tree(0)
    assert found(clipnorm=1.0) == [(1, 0), (1, 1), (4, 1)]
    assert found(global_clipnorm=1.0) == found() == [(6, 0)]


def test_a_population_of_stacks() -> None:
    def run(rate: Any) -> Any:
        config = ax.AdamW(rate, clipnorm=1.0, stacked=STACKED)
        params = tree(0)
        return ax.adamw_step(params, tree(1), ax.adamw_init(params, config), config)[0]

    rates = jnp.array([0.1, 0.01])
    close(jax.jit(jax.vmap(run))(rates), jax.tree.map(lambda *x: jnp.stack(x), *map(run, rates)))


# ------------------------------------------------------------------------ eight devices

FULL = ax.AdamW(
    0.1, clipnorm=1.0, stacked=STACKED, skip_nonfinite=True, skip_spikes=ax.SpikeRule(window=4)
)
SPECS = {
    "of layers": {"b": P("x"), "g": P("x"), "w": P("x", None, "y"), "dec": P("y"), "head": P()},
    "of others": {"b": P(None, "x"), "g": P(), "w": P(None, "y"), "dec": P(None, None, "x")},
}


def specs_of(name: str) -> Any:
    of = {"head": P("x")} | SPECS[name]
    blocks = {k: of[k] for k in "bgw"}
    return {"blocks": blocks, "dec": {"w": of["dec"]}, "head": of["head"], "out": P()}


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


@functools.cache
def wanted() -> Any:
    return jax.jit(functools.partial(ax.adamw_step, config=FULL))(
        tree(0), tree(1), ax.adamw_init(tree(0), FULL)
    )


def partitioned(kind: AxisType) -> None:
    for name in SPECS:
        where, specs = mesh_of(kind), specs_of(name)
        places = jax.tree.map(lambda spec: NamedSharding(where, spec), specs)  # noqa: B023
        with jax.set_mesh(where):
            params, grads = (jax.device_put(tree(seed), places) for seed in (0, 1))
            step = jax.jit(functools.partial(ax.adamw_step, config=FULL))
            made = step(params, grads, ax.adamw_init(params, FULL))
        close(made, wanted())
        lies = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), made[0], places)
        assert all(jax.tree.leaves(lies))


def moved() -> None:
    """ZeRO-1, and a state in host memory."""
    where = mesh_of(AxisType.Auto)
    params, grads = (jax.device_put(tree(seed), NamedSharding(where, P())) for seed in (0, 1))
    cut = ax.sharding.zero1(where, "x", params, min_size=0, strict=False)
    on_host = ax.sharding.state_shardings(params, FULL, memory_kind="pinned_host")
    at = {"state_shardings": ax.sharding.state_shardings(cut, FULL)}
    for places, how in ((at["state_shardings"], at), (on_host, {"offload": True})):
        state = jax.device_put(ax.adamw_init(params, FULL), places)
        step = jax.jit(functools.partial(ax.adamw_step, config=FULL, **how))
        close(step(params, grads, state), wanted())


def by_hand() -> None:
    """In ``shard_map`` a layer is whole, or specs say that it is cut, and not the stack."""

    def step(name: str, names: Any, vma: bool) -> Any:
        config = dataclasses.replace(FULL, axis_names=names)
        specs = specs_of(name)
        state = ax.adamw_init(tree(0), config)
        trees = {x: specs for x in ("m", "v")}
        held = dataclasses.replace(jax.tree.map(lambda x: P(), state), **trees)
        body = functools.partial(ax.adamw_step, config=config)
        mapped = jax.shard_map(
            body,
            mesh=mesh_of(AxisType.Auto),
            in_specs=(specs, specs, held),
            out_specs=(specs, held),
            check_vma=vma,
        )
        return jax.jit(mapped)(tree(0), tree(1), state)

    for vma in (True, False):
        close(step("of others", specs_of("of others"), vma), wanted())
        with pytest.raises(ValueError, match=r"axis 0 of params\['blocks'\]\['b'\], along which"):
            step("of layers", specs_of("of layers"), vma)
    for name in SPECS:
        with pytest.raises(ValueError, match=r"holds layers.* names do not say whether along axis"):
            step(name, ("x", "y"), True)


CHECKS: dict[str, Callable[[], None]] = {
    "automatic": functools.partial(partitioned, AxisType.Auto),
    "explicit": functools.partial(partitioned, AxisType.Explicit),
    "moved": moved,
    "by_hand": by_hand,
}


QUICK = ["explicit", "by_hand"]
SLOW = ["automatic", "moved"]


@pytest.mark.parametrize("check", QUICK)
def test_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__), *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW)
def test_more_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__), *SLOW)


# -------------------------------------------------------------------------- config, optax


def test_configs_with_equal_stacks_are_equal() -> None:
    made = [ax.AdamW(stacked=x) for x in (None, "w", ("w", "b"), {"w": True}, {"w": False})]
    assert len({*made}) == 5
    assert made[1] == ax.AdamW(stacked=["w"])
    assert made[3] == ax.AdamW(stacked={"w": np.bool_(True)})
    assert made[0] == ax.AdamW(stacked=())
    assert jax.tree.map(lambda x: x, made[3]) == made[3]
    assert len({_text("stacked", config.stacked) for config in made}) == 5
    assert _text("stacked", WAYS["a callable"]) == "a function"


def test_the_drop_in_for_optax_has_it() -> None:
    options = {"clipnorm": 1.0, "stacked": STACKED}
    config = ax.AdamW(0.1, 1e-4, epsilon=1e-8, epsilon_hat=False, **options)
    solver = axo.adamw(0.1, **options)
    params = tree(0)
    updates, _ = jax.jit(solver.update)(tree(1), solver.init(params), params)
    new, _ = ax.adamw_step(params, tree(1), ax.adamw_init(params, config), config)
    close(optax.apply_updates(params, updates), new)


def test_it_is_described() -> None:
    config = ax.AdamW(**COMMON, stacked=(*STACKED, "nothing"))
    groups, leaves = ax.describe_groups(tree(0), config).split("\n\n")
    assert [line.split()[2:4] for line in groups.splitlines()[1:]] == [["2", "32"], ["4", "132"]]
    assert [re.split("  +", line) for line in leaves.splitlines()[1:]] == [
        ["0", "blocks/b", "float32[4 x 4]", "no decay, by the mask"],
        ["-", "blocks/g", "float32[4 x]", "no decay, by the mask"],
        ["-", "blocks/w", "float32[4 x 6,4]"],
        ["-", "dec/w", "float32[2 x 3,4]"],
        ["-", "head", "float32[8]", "no decay, by the mask"],
        ["0", "out", "float32[4 x 4]", "no decay, by the mask"],
    ]


# ------------------------------------------------------------------------------- refusals

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "an axis": (0, TypeError, "stacked must be a regular expression .* got 0"),
    "compiled": (re.compile("w"), TypeError, r"give its \.pattern"),
    "compiled, in a tuple": (("b", re.compile("w")), TypeError, r"give its \.pattern"),
    "mixed": (("b", True), TypeError, "got True"),
    "bad pattern": ("w(", ValueError, r"stacked has 'w\(', .* no regular expression: .*re\.escape"),
    "one argument": (lambda path: True, TypeError, "callable from a leaf's path and the leaf"),
    "numbers": ({"w": 2}, TypeError, r"stacked\['w'\] must be .* got 2"),
}


@pytest.mark.parametrize(("stacked", "error", "text"), WRONG.values(), ids=WRONG)
def test_wrong_kinds(stacked: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ax.AdamW(stacked=stacked)


UNFIT: dict[str, tuple[Any, type[Exception], str]] = {
    "no path": ("block$", ValueError, r"stacked='block\$' matches no path .* are '.*blocks/"),
    "one of two": (("dec", "x"), ValueError, "stacked='x' matches no path in params"),
    "a scalar": (("^s$", "dec"), ValueError, r"params\['s'\] holds layers, but it is a scalar"),
    "no bool": (lambda path, leaf: 1, TypeError, "must return True or False.*'blocks/b'.* 1"),
    "another tree": ({"x": True}, ValueError, r"stacked: lacks \['blocks'\]\['b'\], which params"),
}


@pytest.mark.parametrize(("stacked", "error", "text"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_the_params(stacked: Any, error: type[Exception], text: str) -> None:
    params = tree(0) | {"s": jnp.ones(())}
    config, state = ax.AdamW(stacked=stacked), ax.adamw_init(params, ax.AdamW())
    for call in (
        lambda: ax.adamw_init(params, config),
        lambda: ax.adamw_step(params, params, state, config),
        lambda: ax.sharding.abstract_state(params, config),
    ):
        with pytest.raises(error, match=text):
            call()


if __name__ == "__main__":
    main(CHECKS)
