"""What the primitives refuse, and what their lowerings leave to StableHLO."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamw_xla_lowering import NUM_SLOTS, NativeUnavailableError, adamw_sum_of_squares, adamw_update
from adamw_xla_lowering.contract import CPU_TARGET_NAME
from adamw_xla_lowering.cpu import kernel as cpu
from adamw_xla_lowering.cpu import library as native
from adamw_xla_lowering.gpu import call as gpu_call
from adamw_xla_lowering.gpu import norm_kernel as gpu_norm


def leaves(shape: tuple[int, ...], n: int = 1) -> dict[str, list[Any]]:
    rng = np.random.default_rng(0)
    kinds = ("params", "grads", "m", "v")
    return {k: [jnp.asarray(rng.random(shape), jnp.float32) for _ in range(n)] for k in kinds}


def test_a_group_below_zero_is_refused() -> None:
    hyper = jnp.ones((2, NUM_SLOTS))
    with pytest.raises(ValueError, match=r"groups\[1\] is -1; must be a row of hyper"):
        adamw_update(hyper, **leaves((3,), 2), groups=[0, -1])


def test_an_unknown_implementation_is_refused() -> None:
    fast: Any = "fast"
    with pytest.raises(ValueError, match=r"implementation must be .* got 'fast'"):
        adamw_update(jnp.ones((1, NUM_SLOTS)), **leaves((3,)), implementation=fast)
    with pytest.raises(ValueError, match=r"implementation must be .* got 'fast'"):
        adamw_sum_of_squares(jnp.float32(1), [jnp.ones(3)], implementation=fast)


# ------------------------------------------------------------------------ short rows on CPUs


def calls(rows: int, size: int, batched: bool = True, **options: Any) -> tuple[int, Any, Any]:
    """How many kernel calls an update of a batch is, and what it makes; StableHLO's beside."""
    hyper = jnp.linspace(0.1, 0.2, rows * NUM_SLOTS).reshape(rows, 1, NUM_SLOTS)
    tree = leaves((rows, size))

    def run(implementation: Any) -> Any:
        def one(h: Any, t: Any) -> Any:
            return adamw_update(h, **t, implementation=implementation)

        of_row = None if not batched else 0
        return jax.jit(jax.vmap(one, in_axes=(of_row, 0)))

    args = (hyper if batched else hyper[0], tree)
    text = run(options.get("implementation")).lower(*args).as_text()
    got = run(options.get("implementation"))(*args)
    return text.count(f"@{CPU_TARGET_NAME}("), got, run("xla")(*args)


@pytest.mark.skipif(not native.native_available(), reason="no CPU kernel")
@pytest.mark.parametrize(
    ("rows", "size", "options", "found"),
    [
        (cpu.MAX_SHORT_ROWS + 1, cpu.MIN_ROW_SIZE - 1, {}, 0),
        (cpu.MAX_SHORT_ROWS + 1, cpu.MIN_ROW_SIZE, {}, 1),
        (cpu.MAX_SHORT_ROWS, cpu.MIN_ROW_SIZE - 1, {}, 1),
        (cpu.MAX_SHORT_ROWS + 1, 1, {"implementation": "native"}, 1),
        (cpu.MAX_SHORT_ROWS + 1, 1, {"batched": False}, 1),
    ],
)
def test_many_short_rows_are_left_to_xla(
    rows: int, size: int, options: dict[str, Any], found: int
) -> None:
    number, got, want = calls(rows, size, **options)
    assert number == found
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2**-22)  # two ulps of terms below 2


@pytest.mark.skipif(not native.native_available(), reason="no CPU kernel")
def test_a_tree_may_be_part_kernel_and_part_stablehlo(caplog: pytest.LogCaptureFixture) -> None:
    rows = cpu.MAX_SHORT_ROWS + 1
    hyper = jnp.linspace(0.1, 0.2, rows * NUM_SLOTS).reshape(rows, 1, NUM_SLOTS)
    parts = [leaves((rows, size)) for size in (2, 256, 3)]
    tree = {kind: [part[kind][0] for part in parts] for kind in parts[0]}
    step = jax.jit(jax.vmap(lambda h, t: adamw_update(h, **t)))
    with caplog.at_level(logging.DEBUG, "adamw_xla"):
        got = step(hyper, tree)
    assert "1 leaves in 1 calls of the CPU kernel, 2 in StableHLO" in caplog.text
    want = jax.jit(jax.vmap(lambda h, t: adamw_update(h, **t, implementation="xla")))(hyper, tree)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2**-22)  # two ulps of terms below 2


# ----------------------------------------------------------------------------- GPU kernels


def lowered(f: Any, *args: Any) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("number", "kernels"), [(3, 1), (512, 1), (513, 2), (4100, 9)])
def test_the_norm_of_many_leaves_is_taken_by_few_kernels(number: int, kernels: int) -> None:
    assert gpu_norm.MAX_NORM_LEAVES == 512
    tree = [jax.ShapeDtypeStruct((8,), np.float32)] * number

    def norm(scale: Any, x: Any) -> Any:
        return adamw_sum_of_squares(scale, x, implementation="native")

    text = lowered(norm, jax.ShapeDtypeStruct((), np.float32), tree)
    assert text.count(f"@{gpu_call.TARGET_NAME}(") == kernels


def test_more_programs_than_a_grid_has_are_refused() -> None:
    batch = 2**31 + 100
    hyper = jax.ShapeDtypeStruct((batch, 1, NUM_SLOTS), np.float32)
    tree = {k: [jax.ShapeDtypeStruct((batch, 1), np.float32)] for k in leaves((1,))}
    step = jax.vmap(lambda h, t: adamw_update(h, **t, implementation="native"))
    with pytest.raises(NativeUnavailableError, match="a grid has 2,147,483,647 programs"):
        lowered(step, hyper, tree)
