"""Reads a compiled program, and says what it launches, moves and updates in place.

    import adamw_xla as ax

    compiled = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, state, x).compile()
    print(ax.hlo.report(compiled))

It works on any program that XLA compiled for a CPU, a GPU or a TPU; where there is an
``adamw_step`` in it, that is reported by itself too, found by the metadata that it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
from pathlib import Path
from typing import Any, get_args

from adamw_xla.hlo import _traffic
from adamw_xla.hlo._bandwidths import BANDWIDTHS, Bandwidth, microseconds
from adamw_xla.hlo._check import CheckError
from adamw_xla.hlo._collectives import Collective, collectives_of, devices_of
from adamw_xla.hlo._inputs import Input, arguments_of, inputs_of
from adamw_xla.hlo._kernels import (
    NORM,
    UPDATE,
    Kernel,
    Platform,
    kernels_of,
    platform_of,
    schedules_of,
)
from adamw_xla.hlo._leaves import Leaf, leaves_of, with_gradient_sums
from adamw_xla.hlo._part import Part
from adamw_xla.hlo._report import Report, size
from adamw_xla.hlo._syntax import consistent
from adamw_xla.hlo._syntax.text import HloSyntaxError, parse


def report(
    compiled: Any,
    *,
    platform: Platform | None = None,
    donated: Sequence[bool] | None = None,
) -> Report:
    """Reads a compiled program.

    From text alone, donated arguments are known as far as the compiler was told of them:
    those whose buffers are reused, and those that it might still have reused. JAX drops some
    that no result fits before the compiler sees them; a ``Compiled`` knows these as well.
    Temporaries are known from a ``Compiled`` alone.

    Args:
      compiled: ``jax.jit(f, ...).lower(...).compile()`` (of ``equinox.filter_jit`` or
        ``flax.nnx.jit`` likewise), or optimized HLO as text: its
        ``as_text()``, or a file that XLA dumped, ``*after_optimizations.txt``.
      platform: whose rules apply, of "cpu", "cuda", "rocm" and "tpu"; None: as the
        text looks; AMD's GPUs look like NVIDIA's there, and their rules are the same.
      donated: for each parameter of the program, whether it was donated. None: as above.

    Returns:
      The report.

    Raises:
      TypeError: ``compiled`` is neither.
      ValueError: the text is no optimized HLO, ``platform`` is unknown, or ``donated`` has
        another number of entries than the program has parameters.
    """
    while not hasattr(compiled, "as_text") and hasattr(compiled, "compiled"):
        compiled = compiled.compiled  # Equinox' wrapper
    text = _not_a_path(compiled) if isinstance(compiled, str) else _text(compiled)
    if platform is not None and platform not in get_args(Platform):
        raise ValueError(f"hlo: platform must be one of {get_args(Platform)}, got {platform!r}")
    module = parse(text)
    consistent.check(module)
    if donated is not None and len(donated) != len(module.entry.parameters):
        raise ValueError(
            f"hlo: donated has {len(donated)} entries, and the program has "
            f"{len(module.entry.parameters)} parameters (arguments it does not use are left out)"
        )
    platform = platform or platform_of(module, text)
    schedules = schedules_of(module, platform)
    kernels = kernels_of(module, platform, schedules)
    parts = {part: [kernel for kernel in kernels if kernel.part == part] for part in (UPDATE, NORM)}
    inputs = inputs_of(module, arguments_of(compiled, module), donated)
    collectives, holders = collectives_of(module, schedules)
    leaves = leaves_of(module, parts[UPDATE], kernels, inputs)
    temporary, peak = _memory(compiled)
    return Report(
        name=module.name,
        platform=platform,
        program=Part(tuple(kernels)),
        update=Part(tuple(parts[UPDATE]), _traffic.least(module, parts[UPDATE])),
        norm=Part(tuple(parts[NORM]), _traffic.least(module, parts[NORM])),
        inputs=tuple(inputs),
        devices=devices_of(module),
        collectives=tuple(collectives),
        leaves=tuple(with_gradient_sums(module, leaves, kernels, holders)),
        temporary_bytes=temporary,
        peak_bytes=peak,
    )


def _not_a_path(text: str) -> str:
    if "\n" not in text.strip() and Path(text).suffix in (".hlo", ".txt"):
        raise ValueError(f"hlo: got the path {text!r}; pass what is in it: Path(path).read_text().")
    return text


def _text(compiled: Any) -> str:
    if isinstance(compiled, os.PathLike):
        raise TypeError(
            f"hlo: got the path {os.fspath(compiled)!r}; pass what is in it: path.read_text()."
        )
    as_text = getattr(compiled, "as_text", None)
    if hasattr(compiled, "compile"):
        raise TypeError("hlo: got a program that is lowered, and not compiled; add .compile().")
    if as_text is None:
        raise TypeError(
            f"hlo: must be a compiled program or its text, got {type(compiled).__name__}; "
            "pass jax.jit(...).lower(...).compile()."
        )
    return str(as_text())


def _memory(compiled: Any) -> tuple[int | None, int | None]:
    """Bytes of temporaries, and of everything together at the peak."""
    analysis = getattr(compiled, "memory_analysis", None)
    memory = analysis() if analysis is not None else None
    if memory is None:
        return None, None
    temporary = int(memory.temp_size_in_bytes)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return temporary, int(memory.argument_size_in_bytes + results) + temporary


__all__ = [
    "BANDWIDTHS",
    "Bandwidth",
    "CheckError",
    "Collective",
    "HloSyntaxError",
    "Input",
    "Kernel",
    "Leaf",
    "Part",
    "Platform",
    "Report",
    "microseconds",
    "report",
    "size",
]
