"""Reads a compiled program, and says what it launches, moves and updates in place.

    import adamw_xla as ax

    compiled = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, state, x).compile()
    print(ax.hlo.report(compiled))

It works on any program that XLA compiled for a CPU, a GPU or a TPU; where there is an
``adamw_step`` in it, that is reported by itself too, found by the metadata that it leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import dataclasses
from typing import Any, cast, get_args

from adamw_xla import _hlo_traffic
from adamw_xla._hlo_kernels import NORM, UPDATE, Kernel, Platform, kernels_of, platform_of
from adamw_xla._hlo_leaves import Input, Leaf, donated_inputs, inputs_of, leaves_of
from adamw_xla._hlo_summary import size, summary
from adamw_xla._hlo_text import HloSyntaxError, parse


@dataclasses.dataclass(frozen=True)
class Part:
    """The whole program, or what of it is the update's or the norm's.

    Attributes:
      kernels: its launches, in the order of the schedule, and on TPU also its scalar and
        background operations, which are not counted as launches.
      least_bytes: what a single kernel in its place would move: each array that comes from
        outside read once, each that is used outside written once. None for the program.
    """

    kernels: tuple[Kernel, ...]
    least_bytes: int | None = None

    @property
    def count(self) -> int:
        """Launches, each counted once: those in loops and in branches too."""
        return sum(kernel.counted for kernel in self.kernels)

    @property
    def launches(self) -> int | None:
        """Launches per call, each times the length of its loops; None if one is not known."""
        times = [kernel.times for kernel in self.kernels if kernel.counted]
        return None if None in times else sum(cast(list[int], times))

    @property
    def by_kind(self) -> dict[str, int]:
        """How many of each kind, most frequent first."""
        return dict(Counter(kernel.kind for kernel in self.kernels).most_common())

    @property
    def read(self) -> int:
        """Bytes read from main memory; a loop of unknown length counts once."""
        return sum(kernel.read * (kernel.times or 1) for kernel in self.kernels)

    @property
    def written(self) -> int:
        """Bytes written to main memory; a loop of unknown length counts once."""
        return sum(kernel.written * (kernel.times or 1) for kernel in self.kernels)

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimates added up (TPU); never a measurement. None without any."""
        estimates = [
            kernel.estimated_cycles * (kernel.times or 1)
            for kernel in self.kernels
            if kernel.estimated_cycles is not None
        ]
        return sum(estimates) if estimates else None

    def to_json(self) -> dict[str, Any]:
        """All of it, as what ``json.dump`` takes."""
        return {
            "count": self.count,
            "launches": self.launches,
            "by_kind": self.by_kind,
            "bytes_read": self.read,
            "bytes_written": self.written,
            "least_bytes": self.least_bytes,
            "estimated_cycles": self.estimated_cycles,
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``report`` found. ``str`` gives a summary, ``to_json`` all of it.

    Attributes:
      name: of the HLO module.
      platform: whose rules say what a launch is; ``adamw_xla._hlo_kernels`` states them.
      program: everything.
      update: the kernels of ``adamw_update``, and the copies and prefetches that serve
        nothing else.
      norm: likewise of ``adamw_sum_of_squares``: clipping by a norm, the finite check.
      inputs: the program's arguments.
      leaves: the params that the update updates, with the kernels each landed in; without
        an update of this package, the params of whatever has moments. They are known by the
        arguments' paths, which name ``m`` and ``v`` (or ``mu`` and ``nu``). Where these do not
        tell, as those of Keras and Flax NNX, an update of this package is followed through the
        program instead; leaves of one element are left out then, and there are none at all
        where one is ambiguous. Without leaves, nothing is known per param.
      temporary_bytes: scratch memory; None where only the text is known.
      peak_bytes: arguments, results that take no argument's buffer, and temporaries;
        likewise.
    """

    name: str
    platform: Platform
    program: Part
    update: Part
    norm: Part
    inputs: tuple[Input, ...]
    leaves: tuple[Leaf, ...]
    temporary_bytes: int | None
    peak_bytes: int | None

    @property
    def in_place(self) -> tuple[Input, ...]:
        """Arguments whose buffers are reused for results."""
        return tuple(x for x in self.inputs if x.output is not None)

    @property
    def undonated(self) -> tuple[Input, ...]:
        """Arguments that the caller donated, and whose buffers are not reused all the same.

        One that the program never uses is not among them: ``jax.jit`` leaves it out of the
        program, unless it was called with ``keep_unused=True``.
        """
        return tuple(x for x in self.inputs if x.donated and x.output is None)

    @property
    def parameters(self) -> int:
        """How many params the leaves have together."""
        return sum(leaf.elements for leaf in self.leaves)

    def per_parameter(self, number_of_bytes: int | None) -> float | None:
        """Bytes per param; None where either is not known."""
        if number_of_bytes is None or not self.parameters:
            return None
        return number_of_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        """All of it, as what ``json.dump`` takes."""
        update = self.update
        return {
            "name": self.name,
            "platform": self.platform,
            "parameters": self.parameters,
            "temporary_bytes": self.temporary_bytes,
            "peak_bytes": self.peak_bytes,
            "undonated": [x.name or f"parameter {x.number}" for x in self.undonated],
            "update_bytes_per_parameter": self.per_parameter(update.read + update.written),
            "least_update_bytes_per_parameter": self.per_parameter(update.least_bytes),
            "program": self.program.to_json(),
            "update": update.to_json(),
            "norm": self.norm.to_json(),
            "inputs": [dataclasses.asdict(x) for x in self.inputs],
            "leaves": [dataclasses.asdict(x) for x in self.leaves],
        }

    def __str__(self) -> str:
        return summary(self)


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
      compiled: ``jax.jit(f, ...).lower(...).compile()``, or optimized HLO as text: its
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
    text = compiled if isinstance(compiled, str) else _text(compiled)
    if platform is not None and platform not in get_args(Platform):
        raise ValueError(f"hlo: platform must be one of {get_args(Platform)}, got {platform!r}")
    module = parse(text)
    if donated is not None and len(donated) != len(module.entry.parameters):
        raise ValueError(
            f"hlo: donated has {len(donated)} entries, and the program has "
            f"{len(module.entry.parameters)} parameters (arguments it does not use are left out)"
        )
    platform = platform or platform_of(module, text)
    kernels = kernels_of(module, platform)
    parts = {part: [kernel for kernel in kernels if kernel.part == part] for part in (UPDATE, NORM)}
    known: Sequence[bool | None] | None = (
        donated if donated is not None else donated_inputs(compiled, module)
    )
    inputs = inputs_of(module, known)
    temporary, peak = _memory(compiled)
    return Report(
        name=module.name,
        platform=platform,
        program=Part(tuple(kernels)),
        update=Part(tuple(parts[UPDATE]), _hlo_traffic.least(module, parts[UPDATE])),
        norm=Part(tuple(parts[NORM]), _hlo_traffic.least(module, parts[NORM])),
        inputs=tuple(inputs),
        leaves=tuple(leaves_of(module, parts[UPDATE], kernels, inputs)),
        temporary_bytes=temporary,
        peak_bytes=peak,
    )


def _text(compiled: Any) -> str:
    as_text = getattr(compiled, "as_text", None)
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
    "HloSyntaxError",
    "Input",
    "Kernel",
    "Leaf",
    "Part",
    "Platform",
    "Report",
    "report",
    "size",
]
