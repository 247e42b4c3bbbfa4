"""XLA:GPU's own lowering: the groups that it makes."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

import adamw_xla as ax
from adamw_xla_lowering.gpu import merge


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
