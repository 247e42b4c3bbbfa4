"""One test for each surface of JAX and XLA that has a public name, and may change all the same.

Where one fails, it says what changed, what it was, and who uses it for what; mend it there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
import importlib
import inspect
from pathlib import Path
import re
from typing import Any

import jax
from jax.extend.mlir import ir, lower_with_sharding_in_types
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from sources import tree_of
from surfaces import (
    EXPLICIT,
    PACKAGE,
    lower_kernel,
    lower_plainly,
    probe,
    seen_by,
    surface,
)

import adamw_xla as ax
from adamw_xla_lowering import NUM_SLOTS, UpdateSpec
from adamw_xla_lowering.cpu import library
from adamw_xla_lowering.gpu import call as gpu_call
from adamw_xla_lowering.rules import partitioned


def names_used(path: Path) -> Iterator[tuple[str, str]]:
    """``(module, attribute)`` for each name of JAX's that a file reads."""
    tree = tree_of(path)
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(r"jax|jaxlib", node.module or ""):
            for alias in node.names:
                yield node.module, alias.name
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.ImportFrom) and any(a.name == "tt" for a in node.names):
            modules["tt"] = "jaxlib.triton.dialect"
    for node in ast.walk(tree):
        name = getattr(getattr(node, "value", None), "id", None)
        if isinstance(node, ast.Attribute) and name in modules:
            yield modules[name], node.attr


@surface(
    "a name of jax.extend, jax.interpreters or jaxlib",
    "there",
    "the file that the test's name says",
    "what stands there",
)
@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_names_that_a_file_uses(path: Path) -> None:
    for module, name in names_used(path):
        parent, _, last = module.rpartition(".")
        try:
            owner = importlib.import_module(module)
        except ImportError:  # a class, or a function
            owner = getattr(importlib.import_module(parent), last)
        if not hasattr(owner, name):
            importlib.import_module(f"{module}.{name}")


@surface(
    "the rules of a primitive",
    "jvp(primals, tangents, **params) and batch(operands, dims, **params)",
    "rules/autodiff.py, rules/batching.py, norms.py",
    "refusing derivatives, and vmap",
)
def test_rules_of_a_primitive() -> None:
    primitive = probe(lambda ctx, *xs: xs)
    ad.primitive_jvps[primitive] = lambda primals, tangents: (primitive.bind(*primals), tangents)
    batching.primitive_batchers[primitive] = lambda xs, dims: (primitive.bind(*xs), dims)

    def f(x: Any, y: Any) -> Any:
        return tuple(primitive.bind(x, y))

    _, (dx, dy) = jax.jit(lambda: jax.jvp(f, (1.0, 2.0), (3.0, 4.0)))()
    assert (dx, dy) == (3.0, 4.0)
    x, y = jax.jit(jax.vmap(f, in_axes=(0, None), out_axes=(0, None)))(jnp.ones(3), jnp.ones(2))
    assert (x.shape, y.shape) == ((3,), (2,))


@surface(
    "lower_with_sharding_in_types and LoweringRuleContext.replace",
    "(ctx, value, aval) -> value, and a context with other avals_in and avals_out",
    "stablehlo.py, norm_stablehlo.py, cpu/kernel.py, gpu/call.py",
    "results whose types say how they are sharded",
)
def test_lower_with_sharding_in_types() -> None:
    def rule(ctx: Any, *xs: Any) -> Any:
        other = ctx.replace(avals_in=[], avals_out=ctx.avals_out[:1])
        assert (other.avals_in, len(other.avals_out)) == ([], 1)
        return [
            lower_with_sharding_in_types(ctx, x, a) for x, a in zip(xs, ctx.avals_out, strict=True)
        ]

    primitive = probe(rule)
    place = NamedSharding(EXPLICIT, P("x"))
    traced = jax.jit(lambda x: primitive.bind(x, x)).trace(
        jax.ShapeDtypeStruct((8,), np.float32, sharding=place)
    )
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert text.count("sdy.sharding_constraint") == 2


@surface(
    "the syntax of #sdy.op_sharding_rule",
    "([i, j])->([i, j]) {i=1, j=2} need_replication={i}",
    "rules/partitioned.py",
    "telling Shardy which dimensions belong together",
)
def test_sharding_rule() -> None:
    spec = UpdateSpec(groups=(0,) * 9, leaf_scale=True)
    scalars = [jax.ShapeDtypeStruct(s, np.float32) for s in ((1, NUM_SLOTS), (9,))]
    leaves = [jax.ShapeDtypeStruct((2, 3), np.float32)] * (4 * 9)
    text = partitioned._sharding_rule(spec, [*scalars, *leaves], [])
    with mlir.make_ir_context():
        assert str(ir.Attribute.parse(text)) == text


@surface(
    "the custom call that Pallas hands a Triton kernel to XLA:GPU with",
    "__gpu$xla.gpu.triton, of API version 4, with these attributes",
    "gpu/call.py",
    "the GPU's kernels",
)
def test_triton_custom_call() -> None:
    theirs = importlib.import_module("jax._src.pallas.triton.pallas_call_registration")
    source = inspect.getsource(theirs)
    assert f'call_target_name="{gpu_call.TARGET_NAME}"' in source
    (given,) = re.findall(r"backend_config = dict\((.*?)\n  \)", source, re.S)
    wanted = dict(re.findall(r"^\s+(\w+)=(?:ir|mlir)\.(\w+)", given, re.M))
    kinds = {"StringAttr": ir.StringAttr, "i32_attr": ir.IntegerAttr, "BoolAttr": ir.BoolAttr}
    assert "api_version=4" in source

    module = lower_kernel().compiler_ir("stablehlo")
    operations = [
        op.operation
        for function in module.body.operations
        for op in function.regions[0].blocks[0].operations
    ]
    (call,) = [op for op in operations if op.name == "stablehlo.custom_call"]

    def version_of_theirs(ctx: Any) -> int:
        make = importlib.import_module("jax._src.interpreters.mlir").custom_call
        fields = {"debug": ir.BoolAttr.get(False)}
        call = make("probe", result_types=[], operands=[], backend_config=fields, api_version=4)
        return ir.IntegerAttr(call.attributes["api_version"]).value

    version = ir.IntegerAttr(call.attributes["api_version"]).value
    assert version == seen_by(version_of_theirs, lower_plainly)
    config = ir.DictAttr(call.attributes["mhlo.backend_config"])
    assert set(wanted) == {config[i].name for i in range(len(config))}
    for name, kind in wanted.items():
        kinds[kind](config[name])  # refuses an attribute of another kind


@surface(
    "the text of compiled HLO",
    "as hlo/_text.py describes it",
    "adamw_xla/hlo",
    "reports of kernels, bytes and aliases",
)
def test_hlo_text() -> None:
    params = {"w": jnp.ones((64, 8)), "b": jnp.ones(8)}
    config = ax.AdamW()
    step = jax.jit(
        lambda p, g, s: ax.adamw_step(p, g, s, config, implementation="xla"),
        donate_argnums=(0, 2),
    )
    compiled = step.lower(params, params, ax.adamw_init(params, config)).compile()
    report = ax.hlo.report(compiled)
    assert report.program.launches > 0
    assert not report.undonated
    assert len(report.leaves) == 2


@surface(
    "XLA's FFI",
    "of major version 0, running what was built for minor version 3",
    "csrc/adamw_ffi.cc, cpu/library.py",
    "the CPU's kernel",
)
def test_ffi_version() -> None:
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
    assert int(found["MAJOR"]) == 0
    assert int(found["MINOR"]) >= 3
    reason = library.unavailable_reason()
    assert reason is None or "no C++ compiler" in reason, reason
