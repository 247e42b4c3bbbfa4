"""The update's StableHLO against the goldens in ``filecheck/``.

Each golden says what a reader of a dump may rely on: one composite line per leaf with
its options, one private function per kind of leaf, and the arithmetic in its order.
"""

from __future__ import annotations

import functools
from pathlib import Path
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import adamw_xla as ax
from adamw_xla.lowering import NUM_SLOTS, adamw_update

GOLDENS = Path(__file__).parent / "filecheck"


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {"a": struct(2, 3), "b": struct(2, 3), "c": struct(4, dtype=jnp.bfloat16)}


def lowered(**options: Any) -> str:
    config = ax.AdamW(**options)
    state = jax.eval_shape(lambda p: ax.adamw_init(p, config), PARAMS)

    def step(params: Any, grads: Any, state: Any) -> Any:
        return ax.adamw_step(params, grads, state, config, implementation="xla")

    return jax.jit(step).lower(PARAMS, PARAMS, state).as_text()


def lowered_delta() -> str:
    """What a GradientTransformation returns: nothing is rounded to the params' dtype."""
    zeros = [jnp.zeros(p.shape) for p in PARAMS.values()]
    step = functools.partial(adamw_update, delta=True, implementation="xla")
    params = list(PARAMS.values())
    return jax.jit(step).lower(struct(1, NUM_SLOTS), params, params, zeros, zeros).as_text()


def lowered_batch() -> str:
    """Eight replicas, each with a learning rate, params and gradients; ``m`` is shared."""
    params = {"a": struct(8, 2, 3)}
    shared = {"a": struct(2, 3)}

    def step(rate: Any, p: Any, g: Any, m: Any, v: Any) -> Any:
        state = ax.AdamWState(jnp.zeros((), jnp.int32), m, v)
        new, state = ax.adamw_step(
            p, g, state, ax.AdamW(), learning_rate=rate, implementation="xla"
        )
        return new, state.m, state.v

    batched = jax.vmap(step, in_axes=(0, 0, 0, None, 0))
    return jax.jit(batched).lower(struct(8), params, params, shared, params).as_text()


CASES = {
    "plain": lambda: lowered(),
    "mask": lambda: lowered(weight_decay_mask={"a": True, "b": False, "c": False}),
    "amsgrad": lambda: lowered(amsgrad=True),
    "ema": lambda: lowered(use_ema=True),
    "ema_overwrite": lambda: lowered(use_ema=True, ema_overwrite_frequency=10),
    "clipvalue": lambda: lowered(clipvalue=0.5),
    "clipnorm": lambda: lowered(clipnorm=0.5),
    "global_clipnorm": lambda: lowered(global_clipnorm=0.5),
    "skip": lambda: lowered(skip_nonfinite=True),
    "epsilon_root": lambda: lowered(epsilon_root=1e-3),
    "nesterov": lambda: lowered(nesterov=True),
    "delta": lowered_delta,
    "batched": lowered_batch,
}


def filecheck(golden: Path, text: str) -> str:
    """What FileCheck has against ``text``; empty when it matches."""
    command = [sys.executable, "-m", "filecheck", str(golden)]
    run = subprocess.run(command, input=text, capture_output=True, text=True)
    return "" if run.returncode == 0 else run.stdout + run.stderr


def test_every_golden_has_a_case() -> None:
    assert {path.stem for path in GOLDENS.glob("*.mlir")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    text = CASES[case]()
    assert not (complaint := filecheck(GOLDENS / f"{case}.mlir", text)), f"{complaint}\n{text}"


def test_a_golden_refuses_another_case() -> None:
    assert filecheck(GOLDENS / "amsgrad.mlir", CASES["plain"]())
