"""The GPU's kernel, interpreted: its numbers, its bounds, and where it may not be used."""

from __future__ import annotations

from collections.abc import Iterator
import functools
import math
import re
from typing import Any

from bounded import assert_within
from cpu_oracle import DTYPES, OPTIONS, check, expected, hyper, leaves, split
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from triton_interpreter import Interpreted, buffer, run

from adamw_xla_lowering import NativeUnavailableError, UpdateResult, adamw_update, small_unit
from adamw_xla_lowering.gpu import call as gpu_call
from adamw_xla_lowering.gpu import kernel as gpu_kernel
from adamw_xla_lowering.gpu.pieces import Kind, Launch, Leaf, cut
from adamw_xla_lowering.gpu.triton_builder import norm_kernel
from adamw_xla_lowering.rules import partitioned

FLAGS = ("ema_overwrite", "clip_value", "skip", "epsilon_root", "nesterov")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interpreted]:
    monkeypatch.setattr(gpu_kernel, "LAUNCHES", {80: Launch(block=64, num_warps=1)})
    yield Interpreted().install(monkeypatch)
    jax.clear_caches()


def update(h: Any, tree: dict[str, Any], **flags: Any) -> UpdateResult:
    step = functools.partial(adamw_update, implementation="native", **flags)
    return jax.jit(lambda h, tree: step(h, **tree))(h, tree)


def check_update(h: Any, tree: dict[str, Any], groups: Any = None, **flags: Any) -> None:
    """Compares every leaf with the formulas."""
    check(update(h, tree, groups=groups, **flags), h, tree, groups, **flags)


SHAPES = [(6,), (2, 3), (), (0, 4), (1,), (64,), (65,), (128,), (5, 16), (15,), (200,)]


def test_a_plain_tree_is_one_kernel(interpreted: Interpreted) -> None:
    check_update(hyper(), leaves(SHAPES))
    assert len(interpreted.kernels) == 1


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    sizes = st.one_of(st.integers(0, 40), st.sampled_from([48, 63, 64, 65, 128, 200]))
    shapes = [(size,) for size in draw(st.lists(sizes, min_size=1, max_size=6))]
    return {
        "shapes": shapes,
        "param": [draw(st.sampled_from(list(DTYPES)[:3])) for _ in shapes],
        "grad": [draw(st.sampled_from(list(DTYPES)[:3])) for _ in shapes],
        "groups": [draw(st.integers(0, 2)) for _ in shapes],
        "amsgrad": draw(st.booleans()),
        "ema": draw(st.booleans()),
        "leaf_scale": draw(st.booleans()),
        "apply": draw(st.sampled_from([0.0, 1.0])),
        "flags": {name: draw(st.booleans()) for name in FLAGS},
        "seed": draw(st.integers(0, 1000)),
    }


def mixed(case: dict[str, Any]) -> dict[str, list[Any]]:
    """A tree whose leaves have dtypes of their own."""
    tree: dict[str, list[Any]] = {}
    for i, (shape, param, grad) in enumerate(
        zip(case["shapes"], case["param"], case["grad"], strict=True)
    ):
        one = leaves(
            [shape], param, grad, "float32", case["amsgrad"], case["ema"], case["seed"] + i
        )
        for kind, column in one.items():
            tree.setdefault(kind, []).extend(column)
    return tree


def test_any_tree_and_options_match_the_formulas(interpreted: Interpreted) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(cases())
    def one(case: dict[str, Any]) -> None:
        tree: dict[str, Any] = mixed(case)
        if case["leaf_scale"]:
            n = len(case["shapes"])
            tree["leaf_scale"] = np.linspace(0.5, 1.5, n).astype(np.float32)
        flags = {name: on for name, on in case["flags"].items() if on}
        if "ema" not in tree:
            flags.pop("ema_overwrite", None)
        interpreted.kernels.clear()
        check_update(hyper(3, APPLY=case["apply"]), tree, groups=case["groups"], **flags)
        empty = all(0 in shape for shape in case["shapes"])
        assert len(interpreted.kernels) == (0 if empty else 1)

    one()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_each_option_matches_the_formulas(
    options: dict[str, bool], interpreted: Interpreted
) -> None:
    operands, flags = split(options)
    check_update(hyper(), leaves(SHAPES, **operands), **flags)


def test_what_is_skipped_keeps_its_bits(interpreted: Interpreted) -> None:
    tree = leaves(SHAPES, "bfloat16", ema=True)
    tree["grads"] = [np.full_like(x, np.nan) for x in tree["grads"]]
    got = update(hyper(APPLY=0.0), tree, skip=True)
    for kind in ("params", "m", "v", "ema"):
        for x, y in zip(getattr(got, kind), tree[kind], strict=True):
            assert np.asarray(x).tobytes() == y.tobytes()


def test_nan_and_infinity_stay_where_they_are(interpreted: Interpreted) -> None:
    tree = leaves([(70,)])
    tree["grads"][0][[3, 69]] = np.nan, np.inf
    check_update(hyper(CLIP_VALUE=10.0), tree, clip_value=True)


def test_float64(interpreted: Interpreted) -> None:
    with jax.enable_x64(True):
        tree: dict[str, list[Any]] = leaves([(70,)], "float64", state="float64")
        for kind, column in leaves([(70,)], "bfloat16").items():
            tree[kind] += column
        check_update(hyper(dtype=np.float64), tree)


BATCHES = {
    "leaves": (None, {"params", "grads", "m", "v"}),
    "hyper": (0, {"params", "grads", "m", "v"}),
    "gradients": (None, {"grads"}),
    "rates": (0, {"m"}),
}


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("shape", [(5, 7), (64,), (65,)], ids=str)
def test_under_vmap(case: str, shape: tuple[int, ...], interpreted: Interpreted) -> None:
    hyper_axis, batched = BATCHES[case]
    rows = hyper(2, (3,)) if hyper_axis == 0 else hyper(2)
    wide = leaves([(3, *shape)] * 2)
    tree = {k: col if k in batched else [x[0] for x in col] for k, col in wide.items()}
    axes = (hyper_axis, {k: 0 if k in batched else None for k in tree})

    def one(h: Any, t: Any) -> Any:
        return adamw_update(h, **t, groups=[1, 0], implementation="native")[:3]

    columns = jax.jit(jax.vmap(one, in_axes=axes))(rows, tree)
    for replica in range(3):
        row = rows[replica] if hyper_axis == 0 else rows
        for i in range(2):
            leaf = {k: col[i][replica] if k in batched else col[i] for k, col in tree.items()}
            want = expected(row[1 - i], leaf)
            for kind, column in zip(("params", "m", "v"), columns, strict=True):
                assert_within(column[i][replica], want[kind], f"{kind}[{i}]")
    assert len(interpreted.kernels) == 1


def test_under_two_vmaps_that_share_nothing(interpreted: Interpreted) -> None:
    """The operands have different parts of the batch: each finds its own member."""
    tree = leaves([(6,)])
    tree["m"] = [np.stack([tree["m"][0], -tree["m"][0]])]
    grads = np.arange(18, dtype=np.float32).reshape(3, 6) / 7

    def one(m: Any, g: Any) -> Any:
        operands = {**tree, "m": [m], "grads": [g]}
        return adamw_update(hyper(), **operands, implementation="native")[:3]

    inner = jax.vmap(one, in_axes=(0, None))
    columns = jax.jit(jax.vmap(inner, in_axes=(None, 0)))(tree["m"][0], grads)
    for a in range(3):
        for b in range(2):
            leaf = {"params": tree["params"][0], "v": tree["v"][0]}
            want = expected(hyper()[0], leaf | {"m": tree["m"][0][b], "grads": grads[a]})
            for kind, column in zip(("params", "m", "v"), columns, strict=True):
                assert_within(column[0][a, b], want[kind], kind)


def test_too_many_leaves_are_split_into_few_kernels(
    interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = leaves([(3,)] * 9)
    tree["leaf_scale"] = np.linspace(0.5, 1.5, 9).astype(np.float32)
    monkeypatch.setattr(gpu_kernel, "MAX_POINTERS", 2 + 7 * 4)
    check_update(hyper(2), tree, groups=[i % 2 for i in range(9)])
    assert len(interpreted.kernels) == 3


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


def native(h: Any, tree: dict[str, Any]) -> Any:
    return adamw_update(h, **tree, implementation="native")


def lowered(platforms: tuple[str, ...] = ("cuda",), **flags: Any) -> str:
    traced = jax.jit(lambda h, t: adamw_update(h, **t, **flags)).trace(hyper(), leaves([(8,)]))
    return traced.lower(lowering_platforms=platforms).as_text()


def lowered_for_two(update: Any) -> str:
    """``update`` of a leaf whose first dimension is sharded over two devices."""
    mesh = jax.sharding.AbstractMesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, P("x"))
    struct = jax.ShapeDtypeStruct((8,), np.float32, sharding=place)
    tree = {kind: [struct] for kind in ("params", "grads", "m", "v")}
    if update is None:
        in_specs = (P(), P("x"))
        update = jax.shard_map(native, mesh=mesh, in_specs=in_specs, out_specs=P("x"))
    return jax.jit(update).trace(hyper(), tree).lower(lowering_platforms=("cuda",)).as_text()


def test_each_device_launches_one_kernel_under_shard_map() -> None:
    text = lowered_for_two(None)
    calls = re.findall(rf"{re.escape(gpu_call.TARGET_NAME)}\(.*-> \((.*)\)", text)
    assert calls == ["tensor<4xf32>, tensor<4xf32>, tensor<4xf32>"]


def test_a_partitioned_program_calls_back() -> None:
    """No kernel for whole operands, which no device holds: see test_partitioned.py."""
    text = lowered_for_two(native)
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


def test_under_three_vmaps_of_which_an_operand_has_two(interpreted: Interpreted) -> None:
    tree = leaves([(6,)])
    rng = np.random.default_rng(1)
    m = rng.standard_normal((2, 3, 6)).astype(np.float32)
    grads = rng.standard_normal((4, 6)).astype(np.float32)

    def one(m: Any, g: Any) -> Any:
        operands = {**tree, "m": [m], "grads": [g]}
        return adamw_update(hyper(), **operands, implementation="native")[:3]

    last = jax.vmap(one, in_axes=(0, None))
    middle = jax.vmap(last, in_axes=(None, 0))
    columns = jax.jit(jax.vmap(middle, in_axes=(0, None)))(m, grads)
    for a, b, c in np.ndindex(2, 4, 3):
        leaf = {kind: tree[kind][0] for kind in ("params", "v")}
        want = expected(hyper()[0], leaf | {"m": m[a, c], "grads": grads[b]})
        for kind, column in zip(("params", "m", "v"), columns, strict=True):
            assert_within(column[0][a, b, c], want[kind], kind)
