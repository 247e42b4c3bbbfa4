"""One test for each private surface of JAX that this package stands on: ``_jax_private.py``.
Where one fails, it says what changed, what it was, and who uses it for what; mend it there.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
import types
from typing import Any

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib import xla_client
import numpy as np
import pytest
from sources import tree_of
from surfaces import (
    AUTO,
    PACKAGE,
    WAYS,
    aval,
    lower_kernel,
    lower_plainly,
    lower_sharded,
    probe,
    seen_by,
    surface,
)

from adamw_xla_lowering import _jax_private as private
from adamw_xla_lowering.rules import partitioned

# ------------------------------------------------------------------------------------ types


@surface(
    "ShapedArray.mat and PartitionSpec.unreduced",
    "sets of mesh axes",
    "primitive.py, norms.py",
    "refusing a gradient that is a sum still pending",
)
def test_reduced_axes() -> None:
    assert private.reduced_axes(aval((8,))) == frozenset()
    assert private.reduced_axes(aval((8,), None, unreduced={"x"})) == {"x"}


@surface(
    "ShapedArray.mat.varying",
    "the manual axes that a value varies over, of a type that takes them alone",
    "primitive.py, norms.py",
    "the types of results under shard_map(check_vma=True)",
)
def test_varying_like() -> None:
    seen = []

    def look(x: Any) -> Any:
        one = jnp.ones(())
        seen.append((jax.typeof(one), jax.typeof(x), jax.typeof(x[0] * one)))
        return x

    manual = jax.shard_map(look, mesh=AUTO, in_specs=P("x"), out_specs=P("x"))
    jax.jit(manual).trace(jax.ShapeDtypeStruct((8,), np.float32))
    same, varying, product = seen[0]
    assert private.varying_like(same, [same]) is same
    assert private.varying_like(same, [same, varying]) == product
    assert product.mat.varying == {"x"}
    constant = jax.typeof(np.ones((), np.float32))  # of no mesh
    assert private.varying_like(constant, [constant, varying]) == product


@surface(
    "ShapedArray.memory_space",
    "a jax.memory.Space, Host for what a sharding says is in pinned_host",
    "primitive.py, norms.py",
    "refusing operands that lie in host memory",
)
def test_is_on_host() -> None:
    there = jax.device_put(np.ones(3), jax.memory.Space.Host)
    place = NamedSharding(jax.make_mesh((1,), ("x",)), P(), memory_kind="pinned_host")
    struct = jax.ShapeDtypeStruct((3,), np.float32, sharding=place)
    seen = jax.jit(lambda *xs: xs).trace(there, struct, np.ones(3)).jaxpr.in_avals
    assert list(map(private.is_on_host, seen)) == [True, True, False]


@surface(
    "ShapedArray.update",
    "taking memory_space",
    "primitive.py",
    "the types of a state that is offloaded",
)
def test_on_host() -> None:
    moved = private.on_host(aval((8, 3), "x"))
    assert private.is_on_host(moved)
    assert moved.update(memory_space=jax.memory.Space.Device) == aval((8, 3), "x")


@surface(
    "ShapedArray.sharding.spec",
    "iterable, shorter than the rank where the rest is None",
    "primitive.py",
    "refusing leaves that are sharded otherwise than their params",
)
def test_spec_of() -> None:
    assert private.spec_of(aval((8, 3, 2), "x")) == ("x", None, None)
    assert private.spec_of(jax.typeof(np.ones((3, 2)))) == (None, None)
    short = types.SimpleNamespace(shape=(8, 3), sharding=types.SimpleNamespace(spec=P("x")))
    assert private.spec_of(short) == ("x", None)  # as it was made


@surface(
    "ShapedArray.update and NamedSharding.update",
    "taking shape, sharding and spec, and keeping all else",
    "primitive.py, norms.py",
    "the types of results with a batch",
)
def test_with_shape_and_spec() -> None:
    one = aval((8, 3), "x")
    wide = private.with_shape_and_spec(one, (5, 8, 3), (None, "x", None))
    assert wide == aval((5, 8, 3), None, "x", None)
    assert private.with_shape_and_spec(one, one.shape, ()) is one
    assert one.update(weak_type=False, dtype=np.dtype(np.float64)).dtype == np.float64


@surface(
    "ShapedArray.sharding.spec",
    "one entry for each dimension of a batch",
    "primitive.py, norms.py",
    "the partition of a batch that some operands share",
)
def test_batch_spec() -> None:
    members = [aval((1, 3)), aval((8, 3), "x")]
    assert private.batch_spec((8,), members) == ("x",)
    assert private.batch_spec((8,), [aval((8, 3))]) == (None,)


@surface(
    "ShapedArray.to_tangent_aval and ad.Zero",
    "the type of a tangent, and a symbolic zero of it",
    "rules/autodiff.py",
    "letting zero tangents pass",
)
def test_zero_tangent() -> None:
    zero = private.zero_tangent(jnp.ones(3))
    assert isinstance(zero, ad.Zero)
    assert (zero.aval.shape, zero.aval.dtype) == ((3,), np.float32)
    assert private.zero_tangent(jnp.ones(3, jnp.int32)).aval.dtype == jax.dtypes.float0


# ------------------------------------------------------------------- rules and contexts


@surface(
    "pe.dce_rules",
    "rule(used, eqn) up to 0.11, rule(used, live, eqn) from 0.12",
    "primitive.py",
    "dropping leaves whose results nobody uses",
)
def test_register_dead_code_rule() -> None:
    primitive, asked = probe(), []

    def rule(used: list[bool], eqn: Any) -> Any:
        asked.append(used)
        return [True, False], eqn.replace(
            invars=eqn.invars[:1], outvars=eqn.outvars[:1], params=eqn.params
        )

    private.register_dead_code_rule(primitive, rule)
    closed = jax.make_jaxpr(lambda x, y: primitive.bind(x, y))(1.0, 2.0)
    smaller, used = pe.dce_jaxpr(closed.jaxpr, [True, False])
    assert asked == [[True, False]]
    assert used == [True, False]
    assert [len(eqn.invars) for eqn in smaller.eqns] == [1]


@surface(
    "LoweringRuleContext.module_context.platforms",
    "the names of the platforms that a program is lowered for",
    "platforms.py, errors.py, rules/partitioned.py",
    "choosing each platform's lowering",
)
def test_platforms_of() -> None:
    for platforms in (("cpu",), ("cuda",), ("cpu", "tpu")):
        lower = functools.partial(lower_plainly, platforms=platforms)
        assert seen_by(private.platforms_of, lower) == platforms


@surface(
    "LoweringRuleContext.module_context.module and .symbol_table",
    "an MLIR module, and a table that renames what would stand there twice",
    "stablehlo.py",
    "the private functions that composites decompose into",
)
def test_functions_of() -> None:
    def look(ctx: Any) -> list[str]:
        module, symbols = private.functions_of(ctx)
        names = []
        for _ in range(2):
            with ir.InsertionPoint(module.body):
                function = func.FuncOp("surface", ([], []), visibility="private")
            symbols.insert(function)
            with ir.InsertionPoint(function.add_entry_block()):
                func.ReturnOp([])
            names.append(function.name.value)
        return names

    first, second = seen_by(look, lower_plainly)
    assert first == "surface"
    assert second != first


@surface(
    "LoweringRuleContext.module_context.lowering_parameters.for_export",
    "True under jax.export alone",
    "cpu/kernel.py",
    "leaving the kernel out of exported programs",
)
def test_is_exporting() -> None:
    def export(f: Any) -> None:
        jax.export.export(jax.jit(f))(np.ones(8, np.float32))

    assert seen_by(private.is_exporting, export) is True
    assert seen_by(private.is_exporting, lower_plainly) is False


@surface(
    "LoweringRuleContext.module_context.axis_context",
    "with num_devices, or with manual_axes and mesh",
    "cpu/kernel.py, gpu/",
    "calling a kernel only where a device holds whole operands",
)
@pytest.mark.parametrize("way", WAYS)
def test_devices_hold_whole_operands(way: str) -> None:
    whole = seen_by(private.devices_hold_whole_operands, WAYS[way])
    assert whole == (way in ("one device", "manual"))


@surface(
    "LoweringRuleContext.module_context.axis_context",
    "with num_devices, or with manual_axes and mesh",
    "rules/partitioned.py",
    "asking XLA to partition a kernel",
)
@pytest.mark.parametrize("way", WAYS)
def test_partitions_automatically(way: str) -> None:
    assert seen_by(private.partitions_automatically, WAYS[way]) == (way == "partitioned")


# ------------------------------------------------------------------------------ partitioners


@surface(
    "xla_client.HloSharding and Shape",
    "with replicate, tile, tuple_sharding; dimensions and numpy_dtype",
    "rules/partitioned.py",
    "the shards that each device updates",
)
def test_hlo_sharding() -> None:
    shape = xla_client.Shape.array_shape(np.dtype(np.float32), (8, 3))
    whole = private.HloSharding.replicate()
    tile = whole.tile(shape)
    assert (tuple(tile.dimensions()), tile.numpy_dtype()) == ((8, 3), np.float32)
    pair = xla_client.Shape.tuple_shape([shape, shape])
    packed = private.HloSharding.tuple_sharding(pair, [whole, whole])
    assert len(packed.tuple_elements()) == len(pair.tuple_shapes()) == 2


@surface(
    "xla_client.register_custom_call_partitioner, or what its callbacks are called with",
    "(shapes, shardings, result shape, result sharding, backend config)",
    "rules/partitioned.py",
    "a kernel in a program that XLA partitions",
)
def test_register_partitioner() -> None:
    private.register_partitioner("surface_probe", lambda *args: None)
    theirs = importlib.import_module("jax._src.custom_partitioning")
    wanted = inspect.signature(theirs._custom_partitioning_partition)
    ours = inspect.signature(partitioned._partition)
    assert len(ours.parameters) == len(wanted.parameters), wanted


@surface(
    "jax_use_shardy_partitioner",
    "a setting, on by default",
    "rules/partitioned.py",
    "refusing GSPMD, which cannot partition a kernel",
)
def test_uses_shardy() -> None:
    assert private.uses_shardy() is True
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        assert private.uses_shardy() is False
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


# ------------------------------------------------------------------------------ dialects


@surface(
    "where MLIR's bindings look for a dialect's Python module",
    "jaxlib.mlir.dialects, at each operation, again and again where it is not found",
    "gpu/call.py",
    "lowering the GPU's kernels quickly",
)
def test_name_dialect_module(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    finder = types.SimpleNamespace(find_spec=lambda name, *rest: searched.append(name))
    monkeypatch.setattr("sys.meta_path", [finder, *sys.meta_path])
    lower_kernel()
    assert not [name for name in searched if name.endswith(".tt")]


@surface(
    "ShapedArray.mat, and manual_axis_type of jax.ShapeDtypeStruct",
    "the manual axes that a value, or what jax.eval_shape has of it, varies over",
    "_inside/update.py",
    "loops whose devices differ on whether to go round",
)
def test_varying_axes() -> None:
    seen = []

    def look(x: Any) -> Any:
        seen.extend([jnp.ones(()), x, jax.eval_shape(jnp.sin, x)])
        seen[:] = map(private.varying_axes, seen)
        return x

    manual = jax.shard_map(look, mesh=AUTO, in_specs=P("x"), out_specs=P("x"))
    jax.jit(manual).trace(jax.ShapeDtypeStruct((8,), np.float32))
    assert seen == [frozenset(), {"x"}, {"x"}]


@surface(
    "jax.sharding.get_abstract_mesh()",
    "with names, sizes and types of axes, Manual among them inside of shard_map",
    "_inside/update.py, _inside/across.py",
    "looking there alone at varying axes, and which ones a norm is summed over",
)
def test_manual_axes() -> None:
    seen: list[Any] = []
    for lower in WAYS.values():
        lower(lambda x: seen.append(private.manual_axes()) or x)  # type: ignore[func-returns-value]
    assert seen == [{}, {}, {"x": 2, "y": 2}, {"x": 2}]


@surface(
    "the type of jax.lax.axis_index",
    "varying with check_vma=True alone",
    "_inside/across.py",
    "asking whether types tell which leaves are sharded",
)
@pytest.mark.parametrize("vma", [True, False])
def test_types_say_varying(vma: bool) -> None:
    seen: list[bool] = []

    def look(x: Any) -> Any:
        seen.append(private.types_say_varying(private.manual_axes()))
        return x

    for axes in ({"x"}, {"x", "y"}):
        specs: dict[str, Any] = {"in_specs": P("x"), "out_specs": P("x"), "axis_names": axes}
        lower_sharded(jax.shard_map(look, mesh=AUTO, check_vma=vma, **specs))
    assert seen == [vma] * 2


@surface(
    "the attributes tf.aliasing_output and jax.buffer_donor of main's arguments",
    "there when the body is lowered",
    "donation.py",
    "writing over what is given away alone",
)
def test_donated_arguments() -> None:
    struct = jax.ShapeDtypeStruct((8,), np.float32)
    for donated in ((), (0,), (1,), (0, 1)):

        def lower(f: Any, donated: tuple[int, ...] = donated) -> Any:
            jitted = jax.jit(lambda x, y: (f(x), y), donate_argnums=donated)
            return jitted.trace(struct, struct).lower(lowering_platforms=("cpu",))

        found = seen_by(lambda ctx: list(private.donated_arguments(ctx).values()), lower)
        assert found == [i in donated for i in range(2)]


def test_every_private_surface_has_its_test() -> None:
    """A function of ``_jax_private.py`` is tested here by its name."""
    body = tree_of(PACKAGE / "_jax_private.py").body
    functions = [x.name for x in body if isinstance(x, ast.FunctionDef)]
    values = [x.target.id for x in body if isinstance(x, ast.AnnAssign)]
    names = [*functions, *(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", x).lower() for x in values)]
    assert not [x for x in names if x[0] != "_" and f"test_{x}" not in globals()]
