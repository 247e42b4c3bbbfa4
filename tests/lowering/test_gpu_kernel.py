"""The GPU's kernel, interpreted: its numbers, its bounds, and where it may not be used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cpu_oracle import DTYPES, assert_close, expected, hyper, leaves
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.export
import numpy as np
import pytest
from triton_interpreter import Interpreted

from adamw_xla_lowering import adamw_update, gpu_kernel
from adamw_xla_lowering.triton_builder import Launch

FLAGS = ("ema_overwrite", "clip_value", "skip", "epsilon_root", "nesterov")
KINDS = ("params", "m", "v", "v_max", "ema")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interpreted]:
    monkeypatch.setattr(gpu_kernel, "LAUNCHES", {80: Launch(block=64, num_warps=1)})
    yield Interpreted().install(monkeypatch)
    jax.clear_caches()


def update(h: Any, tree: dict[str, Any], **flags: Any) -> dict[str, Any]:
    def native(h: Any, tree: dict[str, Any]) -> Any:
        return adamw_update(h, **tree, implementation="native", **flags)

    result = jax.jit(native)(h, tree)
    return {kind: getattr(result, kind) for kind in KINDS if getattr(result, kind) is not None}


def check(h: Any, tree: dict[str, Any], param: str, **flags: Any) -> None:
    """Compares every leaf with the formulas."""
    n = len(tree["params"])
    scale = tree.get("leaf_scale")
    got = update(h, tree, **flags)
    groups = flags.pop("groups", [0] * n)
    for i in range(n):
        leaf = {kind: column[i] for kind, column in tree.items() if kind != "leaf_scale"}
        factor = 1.0 if scale is None else float(scale[i])
        oracle = {k: flags[k] for k in ("clip_value", "ema_overwrite", "skip") if k in flags}
        want = expected(h[groups[i]], leaf, leaf_scale=factor, **oracle)
        for kind, column in got.items():
            assert column[i].shape == leaf[kind].shape
            assert column[i].dtype == leaf[kind].dtype
            assert_close(column[i], want[kind], f"{kind}[{i}]", leaf["params"].dtype.name)


SHAPES = [(6,), (2, 3), (), (0, 4), (1,), (64,), (65,), (128,), (5, 16), (15,), (200,)]


def test_a_plain_tree_is_one_kernel(interpreted: Interpreted) -> None:
    check(hyper(), leaves(SHAPES), "float32")
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
        "flags": {name: draw(st.booleans()) for name in FLAGS[:3]},
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
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(cases())
    def run(case: dict[str, Any]) -> None:
        tree: dict[str, Any] = mixed(case)
        if case["leaf_scale"]:
            n = len(case["shapes"])
            tree["leaf_scale"] = np.linspace(0.5, 1.5, n).astype(np.float32)
        flags = {name: on for name, on in case["flags"].items() if on}
        if "ema" not in tree:
            flags.pop("ema_overwrite", None)
        interpreted.kernels.clear()
        check(hyper(3, APPLY=case["apply"]), tree, "float32", groups=case["groups"], **flags)
        empty = all(0 in shape for shape in case["shapes"])
        assert len(interpreted.kernels) == (0 if empty else 1)

    run()
