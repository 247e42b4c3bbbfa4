"""The GPU's kernels: how many there are, how leaves are cut up, and where they may not be used."""

from __future__ import annotations

from collections.abc import Iterator
import functools
import math
import re
from typing import Any

from cpu_oracle import DTYPES, check, hyper, leaves
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from triton_interpreter import Interpreted, buffer, run

from adamw_xla_lowering import NativeUnavailableError, UpdateResult, adamw_update, small_unit
from adamw_xla_lowering.gpu import call as gpu_call
from adamw_xla_lowering.gpu import kernel as gpu_kernel
from adamw_xla_lowering.gpu.pieces import Kind, Launch, Leaf, cut
from adamw_xla_lowering.gpu.triton.builder import norm_kernel
from adamw_xla_lowering.rules import partitioned


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interpreted]:
    monkeypatch.setattr(gpu_kernel, "LAUNCHES", {80: Launch(block=64, num_warps=1)})
    yield Interpreted().install(monkeypatch)
    jax.clear_caches()


def update(h: Any, tree: dict[str, Any], groups: Any = None, **flags: Any) -> UpdateResult:
    return adamw_update(h, **tree, groups=groups, implementation="native", **flags)


def test_a_tree_is_one_kernel(interpreted: Interpreted) -> None:
    """Whatever its dtypes, and under ``vmap``; and none where there is nothing to update."""
    trees = [leaves([(3, 65), (3,), (3, 0)], dtype) for dtype in ("bfloat16", "float32")]
    tree = {kind: trees[0][kind] + trees[1][kind] for kind in trees[0]}
    empty = {kind: [x[..., :0] for x in column] for kind, column in tree.items()}
    batched = jax.vmap(update, in_axes=(0, 0))
    summed = functools.partial(update, sums="tree", grad_sums=True)
    for f, h, operands, kernels in (
        (update, hyper(), tree, 1),
        (summed, hyper(), tree, 2),  # and one that adds what its programs have summed
        (batched, hyper(batch=(3,)), tree, 1),
        (update, hyper(), empty, 0),
    ):
        interpreted.kernels.clear()
        jax.jit(f).lower(h, operands)
        assert len(interpreted.kernels) == kernels


def test_too_many_leaves_are_split_into_few_kernels(
    interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = leaves([(3,)] * 9)
    tree["leaf_scale"] = np.linspace(0.5, 1.5, 9).astype(np.float32)
    monkeypatch.setattr(gpu_kernel, "MAX_POINTERS", 2 + 7 * 4)
    groups = [i % 2 for i in range(9)]
    step = jax.jit(functools.partial(update, groups=groups, sums="leaves"))
    got = step(hyper(2), tree)
    check(got, hyper(2), tree, groups)
    assert len(interpreted.kernels) == 3 * 2
    squares = [np.sum(np.square(x, dtype=np.float64)) for x in got.params]
    np.testing.assert_allclose(got.sums[:, 0], squares, rtol=1e-6)  # each leaf's own


def test_very_large_leaves_are_cut_without_overflow() -> None:
    kind = Kind((np.dtype(np.float32),), ())
    size = 5 * 2**31 + 3
    whole, rest = cut([Leaf(kind, size)], 1024)
    assert (whole.pieces[0].length, rest.pieces[0].length) == (size - 3, 3)
    assert rest.pieces[0].start == size - 3
    assert rest.end == size // 1024 + 1


@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize("scale", [np.float32(0.5), np.float64(0.5)], ids=["float32", "float64"])
@pytest.mark.parametrize("is_large", [False, True], ids=["", "overflows"])
def test_partial_sums(span: int, scale: Any, is_large: bool) -> None:
    rng = np.random.default_rng(0)
    sizes, dtypes = [1, 64, 200, 1000, 7], ["float32", "bfloat16", "float32", "float16", "float64"]
    arrays = [rng.standard_normal(n).astype(DTYPES[d]) for n, d in zip(sizes, dtypes, strict=True)]
    if is_large:
        large = 2 if scale.dtype == np.float32 else 4
        arrays[large] = arrays[large] * scale.dtype.type(np.sqrt(np.finfo(scale.dtype).max) * 1e9)
    tree = [Leaf(Kind((x.dtype,), ()), x.size) for x in arrays]
    kernel = norm_kernel(tree, scale.dtype, Launch(64, 1), span)
    sums = buffer(np.full(kernel.programs, np.nan, scale.dtype))
    run(kernel, [buffer(scale), *map(buffer, arrays), sums])
    assert (sums.writes == 1).all()
    # Negative sums are in the small unit; all are compared in that of the large ones.
    small = small_unit(scale.dtype)
    unit = small if is_large else 1.0
    found = math.fsum(-s if s < 0 else s * unit * unit for s in sums.data.astype(np.float64))
    assert np.any(sums.data < 0) == is_large
    want = math.fsum(y for x in arrays for y in (0.5 * unit * x.astype(np.float64)) ** 2)
    # No term is negative, so the sum is off by no more roundings than one of them meets: in
    # the dtype (which the square doubles), its square, the walk, the halving, and in `want`.
    roundings = 2 + 1 + (span - 1) + math.log2(64) + 1
    assert abs(found - want) <= roundings * np.finfo(scale.dtype).eps / 2 * want


def lowered(platforms: tuple[str, ...] = ("cuda",), **flags: Any) -> str:
    traced = jax.jit(lambda h, t: adamw_update(h, **t, **flags)).trace(hyper(), leaves([(8,)]))
    return traced.lower(lowering_platforms=platforms).as_text()


def lowered_for_two(f: Any) -> str:
    """``f`` of a leaf whose first dimension is sharded over two devices."""
    mesh = jax.sharding.AbstractMesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, P("x"))
    struct = jax.ShapeDtypeStruct((8,), np.float32, sharding=place)
    tree = {kind: [struct] for kind in ("params", "grads", "m", "v")}
    if f is None:
        in_specs = (P(), P("x"))
        f = jax.shard_map(update, mesh=mesh, in_specs=in_specs, out_specs=P("x"))
    return jax.jit(f).trace(hyper(), tree).lower(lowering_platforms=("cuda",)).as_text()


def test_each_device_launches_one_kernel_under_shard_map() -> None:
    text = lowered_for_two(None)
    calls = re.findall(rf"{re.escape(gpu_call.TARGET_NAME)}\(.*-> \((.*)\)", text)
    assert calls == ["tensor<4xf32>, tensor<4xf32>, tensor<4xf32>"]


def test_a_partitioned_program_calls_back() -> None:
    """No kernel for whole operands, which no device holds: see test_partitioned.py."""
    text = lowered_for_two(update)
    assert text.count(f"@{partitioned.TARGET_NAME}(") == 1
    assert gpu_call.TARGET_NAME not in text


def test_the_kernel_must_be_asked_for() -> None:
    target = gpu_call.TARGET_NAME
    assert target in lowered(implementation="native")
    assert target not in lowered()
    assert target not in lowered(implementation="xla")


def test_refusals_say_why() -> None:
    with pytest.raises(NativeUnavailableError, match="has no kernel for cuda, tpu"):
        lowered(platforms=("cuda", "tpu"), implementation="native")
    with pytest.raises(NativeUnavailableError, match="has no kernel for rocm"):
        lowered(platforms=("rocm",), implementation="native")
    with pytest.raises(NativeUnavailableError, match="better fused by XLA"):
        lowered(implementation="native", delta=True)


def test_refuses_where_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_call, "unavailable_reason", lambda: "this is a test")
    with pytest.raises(NativeUnavailableError, match="cannot run here: this is a test"):
        lowered(implementation="native")
    assert "composite" in lowered()
