"""Kernels write over what the program owns, and over nothing that they would have to copy first."""

from __future__ import annotations

from collections.abc import Callable
import re
from typing import Any

from cpu_oracle import OPTIONS, hyper, leaves, require_native, split
import jax
import numpy as np
import pytest

import adamw_xla as ax
from adamw_xla_lowering import adamw_update
from adamw_xla_lowering.contract import CPU_TARGET_NAME, UpdateSpec
from adamw_xla_lowering.primitive import adamw_update_p
from adamw_xla_lowering.rules import eager

SHAPE, LEAVES = (1000,), 2
KINDS = ("params", "grads", "m", "v")
NONE: tuple[str, ...] = ()
ALL = ("params", "m", "v")


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


def update(params: Any, m: Any, v: Any, grads: Any) -> Any:
    return adamw_update(hyper(), params, grads, m, v, implementation="native")[:3]


def nested(params: Any, m: Any, v: Any, grads: Any) -> Any:
    return jax.jit(update)(params, m, v, grads)


def viewed(params: Any, m: Any, v: Any, grads: Any) -> Any:
    tree = jax.tree.map(lambda x: x.reshape(10, 100), (params, m, v, grads))
    new = update(*jax.lax.optimization_barrier(tree))  # type: ignore[no-untyped-call]
    return jax.tree.map(lambda x: x.reshape(SHAPE), new)


def computed(params: Any, m: Any, v: Any, grads: Any) -> Any:
    return update([2 * p for p in params], m, v, grads)


def started(params: Any, m: Any, v: Any, grads: Any) -> Any:
    del m, v
    zeros = [np.zeros(SHAPE, np.float32) for _ in params]
    constant = [np.arange(SHAPE[0], dtype=np.float32) for _ in params]
    return update(params, [jax.numpy.zeros_like(x) for x in zeros], constant, grads)


def if_any(params: Any, m: Any, v: Any, grads: Any) -> Any:
    old = params, m, v
    return jax.lax.cond(grads[0][0] > 0, lambda x: update(*x, grads), lambda x: x, old)


def looped(params: Any, m: Any, v: Any, grads: Any) -> Any:
    def go_on(carry: Any) -> Any:
        return carry[0][0][0] > 0

    return jax.lax.while_loop(go_on, lambda x: update(*x, grads), (params, m, v))


def scanned(params: Any, m: Any, v: Any, grads: Any) -> Any:
    return jax.lax.scan(lambda x, _: (nested(*x, grads), None), (params, m, v), None, length=3)[0]


def in_a_branch_of_a_scan(params: Any, m: Any, v: Any, grads: Any) -> Any:
    return jax.lax.scan(lambda x, _: (if_any(*x, grads), None), (params, m, v), None, length=3)[0]


def batched(params: Any, m: Any, v: Any, grads: Any) -> Any:
    tree = jax.tree.map(lambda x: x.reshape(5, 20, 10), (params, m, v, grads))
    return jax.tree.map(lambda x: x.reshape(SHAPE), jax.vmap(jax.vmap(update))(*tree))


def repeated(params: Any, m: Any, v: Any, grads: Any) -> Any:
    """One param for all members: its result is larger than it."""
    column = lambda xs: [x.reshape(10, 100) for x in xs]  # noqa: E731
    ours = jax.vmap(update, in_axes=(None, 0, 0, 0))
    return ours([p[:100] for p in params], column(m), column(v), column(grads))


CASES: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {
    "nothing donated": (update, NONE, NONE),
    "all donated": (update, ALL, ALL),
    "the state alone": (update, ("m", "v"), ("m", "v")),
    "the params alone": (update, ("params",), ("params",)),
    "views": (viewed, NONE, NONE),
    "views, donated": (viewed, ALL, ALL),
    "an intermediate": (computed, NONE, ("params",)),
    "zeros and a constant": (started, NONE, ("m",)),
    "a branch, donated": (if_any, ALL, ALL),
    "a jit within, of nobody knows what": (nested, NONE, ALL),
    "a jit within, donated": (nested, ALL, ALL),
    "a loop": (looped, NONE, ALL),
    "a loop, donated": (looped, ALL, ALL),
    "a scan": (scanned, NONE, ALL),
    "a branch of a scan": (in_a_branch_of_a_scan, NONE, ALL),
    "a batch": (batched, NONE, NONE),
    "a batch, donated": (batched, ALL, ALL),
    "a batch that shares params": (repeated, NONE, NONE),
    "a batch that shares params, donated": (repeated, ALL, ("m", "v")),
}


def written(text: str) -> set[tuple[int, int]]:
    """The kernel's operands that results are written over, each with its result, in StableHLO."""
    (call,) = (line for line in text.splitlines() if f"@{CPU_TARGET_NAME}" in line)
    return {
        (int(operand), int(result))
        for result, operand in re.findall(
            r"output_tuple_indices = \[(\d+)\],\s*operand_index = (\d+)", call
        )
    }


def expected(kinds: tuple[str, ...]) -> set[tuple[int, int]]:
    return {
        (1 + KINDS.index(kind) * LEAVES + i, ALL.index(kind) * LEAVES + i)
        for kind in kinds
        for i in range(LEAVES)
    }


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_over(case: str) -> None:
    function, donated, want = CASES[case]
    tree = leaves([SHAPE] * LEAVES)
    # JAX pairs donated operands with results of their type in order: keep the order.
    jitted = jax.jit(function, donate_argnums=tuple(ALL.index(kind) for kind in donated))
    lowered = jitted.lower(*(tree[kind] for kind in (*ALL, "grads")))
    assert written(lowered.as_text()) == expected(want)
    if function is update and donated in (NONE, ALL):
        text = lowered.compile().as_text()
        assert " copy(" not in text, text


def test_an_eager_call_copies_nothing() -> None:
    tree = leaves([SHAPE] * LEAVES)
    program = eager._jitted(adamw_update_p, UpdateSpec((0,) * LEAVES, implementation="native"))
    lowered = program.lower(hyper(), *(x for kind in KINDS for x in tree[kind]))
    assert written(lowered.as_text()) == set()
    assert " copy(" not in lowered.compile().as_text()


def test_a_state_that_is_given_alone() -> None:
    """JAX has ``m``'s array hold the new params and ``v``'s the new ``m``: one array to spare."""
    params = [jax.ShapeDtypeStruct((256, 256), np.float32)] * 12
    config = ax.AdamW()
    state = jax.eval_shape(lambda p: ax.adamw_init(p, config), params)
    step = jax.jit(
        lambda p, g, s: ax.adamw_step(p, g, s, config, implementation="native"), donate_argnums=2
    )
    memory = step.lower(params, params, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 12 * 256 * 256 * 4 + 4096


@pytest.mark.parametrize("param", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("options", "apply"),
    [*((o, 1.0) for o in OPTIONS), *((o, 0.0) for o in OPTIONS if "skip" in o)],
    ids=lambda x: str(x) if isinstance(x, float) else "+".join(x) or "plain",
)
def test_bits_do_not_depend_on_it(param: str, options: dict[str, bool], apply: float) -> None:
    operands, flags = split(options)
    tree = leaves([(1000,), (3, 5), (0,), ()], param, **operands)
    grads = tree.pop("grads")

    def step(tree: Any, grads: Any) -> dict[str, Any]:
        new = adamw_update(
            hyper(APPLY=apply), grads=grads, **tree, **flags, implementation="native"
        )
        return {kind: getattr(new, kind) for kind in tree}

    kept = jax.jit(step)(tree, grads)
    given = jax.jit(step, donate_argnums=0)(jax.tree.map(jax.numpy.array, tree), grads)
    jax.tree.map(np.testing.assert_array_equal, kept, given)
