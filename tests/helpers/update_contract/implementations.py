"""The implementations of the update: one table, which a new one adds a line to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
from typing import Any, Literal

from cpu_oracle import require_native
from elsewhere import run_as
import jax
import pytest
from triton_interpreter import Interpreted

import adamw_xla as ax
from adamw_xla_lowering import COMPOSITE_NAME, UpdateResult, adamw_update
from adamw_xla_lowering.contract import CPU_TARGET_NAME
from adamw_xla_lowering.gpu import kernel as gpu_kernel
from adamw_xla_lowering.gpu.pieces import Launch

from .specs import ALIKE, MIXED, OPTIONS, PLAIN, Dtypes, Options


@contextlib.contextmanager
def _anywhere() -> Iterator[None]:
    yield


@contextlib.contextmanager
def _where_the_kernel_is() -> Iterator[None]:
    require_native()
    yield


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    """Programs of 64 elements, run one after another by NumPy."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gpu_kernel, "LAUNCHES", {80: Launch(block=64, num_warps=1)})
        Interpreted().install(monkeypatch)
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class Implementation:
    """One way to make an update, and what it can run.

    Attributes:
      update: ``adamw_update``, or what has its arguments.
      mark: what stands in its lowered programs, and in those of no other on that platform.
      platform: whose programs are run, here on the CPU; None: the CPU's own.
      there: entered while it is tested; skips where it cannot run.
      options: those that its numbers are compared for, with each of ``dtypes``.
      dtypes: of params, gradients and state.
      shapes: of leaves at which it changes course, besides those of ``SHAPES``.
      in_turn: how many programs, of options and dtypes in turn, share the shapes among them: each
        shape meets each option, and each dtype. None: every program has all of them.
      batch_shapes: of members of a batch, likewise.
      delta: how it makes a param's change; None: it makes none.
      quick: whether its machine code is nobody's but these tests', and need not be the best.
      roundings: how many each square in a sum of n meets, its own included: at most n.
    """

    update: Callable[..., UpdateResult]
    mark: str
    platform: str | None = None
    there: Callable[[], contextlib.AbstractContextManager[None]] = _anywhere
    options: Sequence[Options] = tuple(OPTIONS)
    dtypes: Sequence[Dtypes] = tuple(ALIKE)
    shapes: Sequence[tuple[int, ...]] = ()
    in_turn: int | None = None
    batch_shapes: Sequence[tuple[int, ...]] = ()
    delta: Literal["change", "difference"] | None = None
    quick: bool = False
    roundings: Callable[[int], int] = lambda n: n

    def jit(self, f: Callable[..., Any], **options: Any) -> Any:
        """``jax.jit``, for this implementation's platform."""
        # LLVM's best code takes twice as long to make.
        level = {"xla_backend_optimization_level": 0} if self.quick else {}
        there = f if self.platform is None else functools.partial(run_as, self.platform, f)
        return jax.jit(there, compiler_options=level, **options)

    def lowered(self, f: Callable[..., Any], *args: Any) -> str:
        """The StableHLO that ``jit`` compiles."""
        traced = jax.jit(f).trace(*args)
        return traced.lower(lowering_platforms=(self.platform or "cpu",)).as_text()

    @functools.cache  # noqa: B019  # the table lives as long as the process
    def step(self, groups: tuple[int, ...] | None = None, **flags: Any) -> Any:
        """``(hyper, tree) -> UpdateResult``: one jitted function for one kind of update."""
        return self.jit(self.plain(groups, **flags))

    def plain(self, groups: tuple[int, ...] | None = None, **flags: Any) -> Any:
        """The same, not jitted."""
        return lambda h, tree: self.update(h, **tree, groups=groups, **flags)


_xla = functools.partial(adamw_update, implementation="xla")
_native = functools.partial(adamw_update, implementation="native")
# Merged: equal sizes of several shapes, and more of one than a kernel takes.
_MERGED = ((6,), (2, 3), (3, 2), *[(5,)] * 15)
_SOME: list[Options] = [
    PLAIN,
    {"amsgrad": True, "clip_value": True},
    {"ema": True, "ema_overwrite": True, "skip": True},
    {"nesterov": True, "epsilon_root": True},
]

IMPLEMENTATIONS = {
    "reference": Implementation(
        ax.reference.adamw_update,
        mark="@_where",
        in_turn=3,
        delta="difference",
        quick=True,
    ),
    "stablehlo": Implementation(
        _xla, mark=COMPOSITE_NAME, shapes=[(12_000,)], in_turn=3, delta="change"
    ),
    "tpu": Implementation(
        adamw_update,
        mark=COMPOSITE_NAME,
        platform="tpu",
        delta="change",
        quick=True,
    ),
    "cuda": Implementation(
        adamw_update,
        mark="stablehlo.optimization_barrier",
        platform="cuda",
        options=_SOME,
        dtypes=[ALIKE[0], ALIKE[2]],
        shapes=_MERGED,
        delta="change",
        quick=True,
    ),
    "rocm": Implementation(
        adamw_update,
        mark="stablehlo.optimization_barrier",
        platform="rocm",
        shapes=_MERGED,
        delta="change",
        quick=True,
    ),
    "cpu kernel": Implementation(
        _native,
        mark=CPU_TARGET_NAME,
        there=_where_the_kernel_is,
        dtypes=MIXED,
        shapes=[(15,), (1000,), (40_000,)],
        batch_shapes=[(64,), (65,)],
        roundings=lambda n: min(n, 261),  # csrc/sums.h
    ),
    "gpu kernel": Implementation(
        _native,
        mark="python_cpu_callback",
        there=_interpreted,
        shapes=[(6,), (2, 3), (0, 4), (64,), (65,), (128,), (5, 16), (15,), (200,)],
        batch_shapes=[(64,), (65,)],
        roundings=lambda n: min(n, 17),  # its own, six of a block by halves, four blocks, six again
    ),
}
