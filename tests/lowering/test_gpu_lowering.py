"""XLA:GPU's own lowering: its numbers, run on the CPU, and the groups that it makes."""

from __future__ import annotations

import functools
import re
import types
from typing import Any

from bounded import assert_within
from checks.tables import ALIKE
from cpu_oracle import check, expected, hyper, leaves, split
from elsewhere import run_as
import jax
import jax.numpy as jnp
import pytest

import adamw_xla as ax
from adamw_xla_lowering import adamw_update
from adamw_xla_lowering.gpu import merge

OPTIONS: list[dict[str, bool]] = [
    {},
    {"amsgrad": True, "clip_value": True},
    {"ema": True, "ema_overwrite": True, "skip": True},
    {"nesterov": True, "epsilon_root": True},
]


def update(tree: dict[str, Any], **flags: Any) -> Any:
    """The update on flat operands, so that ``run_as`` can pass them."""
    kinds = list(tree)

    def flat(h: Any, *columns: Any) -> Any:
        result = adamw_update(h, **dict(zip(kinds, columns, strict=True)), **flags)
        return [column for column in result if column is not None]

    return flat


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("param", ["float32", "bfloat16"])
def test_matches_the_formulas(param: str, options: dict[str, bool]) -> None:
    operands, flags = split(options)
    tree = leaves(ALIKE, param, **operands)
    groups = [i % 2 for i in range(len(ALIKE))]
    h = hyper(2)
    columns = run_as("cuda", update(tree, groups=groups, **flags), h, *tree.values())
    kinds = [kind for kind in tree if kind != "grads"]
    got = types.SimpleNamespace(**dict(zip(kinds, columns, strict=True)))
    check(got, h, tree, groups, **flags)


def test_under_vmap_with_an_unbatched_leaf() -> None:
    h, tree = hyper(batch=(3,)), leaves([(3, 2, 5), (3, 10)])
    shared = tree["m"][0][0]

    def one(h: Any, p: Any, g: Any, m: Any, v: Any) -> Any:
        return adamw_update(h, p, g, [shared, m[0]], v)[:3]

    batched = jax.vmap(one)
    columns = [tree["params"], tree["grads"], [tree["m"][1]], tree["v"]]
    got = run_as("cuda", batched, h, *columns)
    for replica in range(3):
        for i in range(2):
            leaf = {kind: column[i][replica] for kind, column in tree.items()}
            leaf["m"] = shared if i == 0 else leaf["m"]
            want = expected(h[replica, 0], leaf)
            for kind, column in zip(("params", "m", "v"), got, strict=True):
                assert_within(column[i][replica], want[kind], f"{kind}[{i}]")


def lowered(shapes: list[tuple[int, ...]], **options: Any) -> str:
    config = ax.AdamW(**options)
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    state = jax.eval_shape(functools.partial(ax.adamw_init, config=config), params)
    step = jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config))
    return step.trace(params, params, state).lower(lowering_platforms=("cuda",)).as_text()


def groups(text: str) -> list[int]:
    """How many leaves each anchor has, the anchors in the order of their first use."""
    anchors = re.findall(r"(%\w+) = stablehlo.optimization_barrier %\w+ : tensor<2xf32>", text)
    composites = [x for x in text.splitlines() if '"adamw_xla.update"' in x]
    return [sum(f"{anchor}," in line for line in composites) for anchor in anchors]


def test_groups_are_as_few_and_as_even_as_can_be() -> None:
    assert sorted(groups(lowered([(768,)] * 74))) == [12, 12, 12, 12, 13, 13]
    assert groups(lowered([(6,), (2, 3), (3, 2)])) == [3]  # one size, whatever the shape
    assert groups(lowered([(6,), (7,)])) == []  # nothing to merge
    assert sorted(groups(lowered([(768,)] * 74, use_ema=True))) == [9, 9, 9, 9, 9, 9, 10, 10]


def test_very_large_leaves_are_not_merged() -> None:
    large = (merge.MAX_MERGED_ELEMENTS + 1,)
    assert groups(lowered([large] * 3)) == []
    assert groups(lowered([(merge.MAX_MERGED_ELEMENTS,)] * 3)) == [3]


def test_the_scalars_are_left_to_the_compiler() -> None:
    """In an array behind a barrier they would be read from memory by every thread."""
    assert not re.search(r"optimization_barrier .*x16xf32>", lowered([(4,)] * 2))


def test_accumulation_needs_no_conditional() -> None:
    """XLA:GPU copies whatever goes through one."""
    text = lowered([(4,)] * 3, gradient_accumulation_steps=2)
    assert "stablehlo.while" in text
    assert not re.search(r"stablehlo\.(case|if)\b", text)
    assert text.count('"adamw_xla.update"') == 3
