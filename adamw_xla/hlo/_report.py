"""What ``report`` finds, and how it says it in words."""

from __future__ import annotations

from collections import Counter
import dataclasses
from typing import Any

from adamw_xla.hlo._check import CheckError, Wanted
from adamw_xla.hlo._collectives import Collective
from adamw_xla.hlo._inputs import Input
from adamw_xla.hlo._kernels import NORM, UPDATE, Platform
from adamw_xla.hlo._leaves import Leaf
from adamw_xla.hlo._part import Part

MAX_LINES, MAX_NAMES = 24, 4
"""Longer lists are cut; the report's attributes have all of them."""

NOT_TOLD = "which arguments are params and moments is not known, so neither are leaves"


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``report`` found. ``str`` gives a summary, ``to_json`` all of it.

    Attributes:
      name: of the HLO module.
      platform: whose rules say what a launch is; ``adamw_xla.hlo._kernels`` states them.
      program: everything.
      update: the kernels of ``adamw_update``, and the copies and prefetches that serve
        nothing else.
      norm: likewise of ``adamw_sum_of_squares``: clipping by a norm, the finite check.
      devices: how many run the program together. All other figures are of each of them.
      collectives: what they exchange.
      inputs: the program's arguments.
      leaves: the params that the update updates, with the kernels each landed in; without
        an update of this package, the params of whatever has moments. They are known by the
        arguments' paths, which name ``m`` and ``v`` (or ``mu`` and ``nu``, or end in Keras'
        ``_momentum`` and ``_velocity``). Where these do not tell, as those of Keras' and Flax
        NNX' plain lists, the update is followed through the program instead, and of another
        optimizer what is computed element by element: a param that depends on itself and on two
        arguments of its size, each of which depends on itself alone. Leaves of one element are
        left out then, and of this package's update there are none at all where one is
        ambiguous. Without leaves, nothing is known per param.
      temporary_bytes: scratch memory; None where only the text is known.
      peak_bytes: arguments, results that take no argument's buffer, and temporaries;
        likewise.
    """

    name: str
    platform: Platform
    program: Part
    update: Part
    norm: Part
    devices: int
    collectives: tuple[Collective, ...]
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

    @property
    def param_bytes(self) -> int:
        """Bytes of the leaves' params on each device; 0 without leaves."""
        numbers = {leaf.param for leaf in self.leaves} - {None}
        return sum(x.bytes for x in self.inputs if x.number in numbers)

    @property
    def state_bytes(self) -> int:
        """Bytes of the leaves' moments on each device, wherever they lie; 0 without leaves.

        Averages, maxima and added-up gradients too, where paths name them.
        """
        return sum(x.bytes for x in self._moments)

    @property
    def state_bytes_in_host(self) -> int:
        """How many of these lie in the host's memory, as far as that is known."""
        return sum(x.bytes for x in self._moments if x.memory is not None and "host" in x.memory)

    @property
    def _moments(self) -> list[Input]:
        numbers = {number for leaf in self.leaves for number in leaf.moments}
        return [x for x in self.inputs if x.number in numbers]

    def per_parameter(self, number_of_bytes: int | None) -> float | None:
        """Bytes per param; None where either is not known."""
        if number_of_bytes is None or not self.parameters:
            return None
        return number_of_bytes / self.parameters

    def check(
        self,
        *,
        donated: bool = False,
        no_gather_of_state: bool = False,
        state_sharded_over: str | None = None,
        in_host_memory: bool = False,
        kernels_at_most: int | None = None,
    ) -> None:
        """Raises one error with all that is not as it was meant: for tests of a train step.

        The state is that of this package or of optax (``mu`` and ``nu``), in whatever optimizer;
        what is asked of it is asked of the moments of each leaf.

        Args:
          donated: params and moments are updated in place, without a copy (of 64 kB or more).
          no_gather_of_state: devices exchange no moments, and of what the update makes only new
            params.
          state_sharded_over: an axis of the mesh that each moment is cut over, but for those
            of fewer than 4,096 elements. Needs a ``Compiled``; a text does not say.
          in_host_memory: the moments lie in the host's memory.
          kernels_at_most: so many launches of the whole program are allowed.

        Raises:
          TypeError: nothing is asked.
          CheckError: it is not so; lists each violation with the argument's path. It is an
            ``AssertionError``.

        Example:
          >>> import adamw_xla as ax, jax, jax.numpy as jnp
          >>> params, config = {"w": jnp.ones((8, 4))}, ax.AdamW()
          >>> state = ax.adamw_init(params, config)
          >>> def step(params, state):
          ...     return ax.adamw_step(params, params, state, config)
          >>> compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
          >>> ax.hlo.report(compiled).check(donated=True, no_gather_of_state=True)
        """
        wanted = Wanted(
            donated, no_gather_of_state, state_sharded_over, in_host_memory, kernels_at_most
        )
        if wanted == Wanted():
            raise TypeError("check: nothing was asked of the program; name what it is to be.")
        parts = (self.program.count, self.inputs, self.leaves, self.collectives)
        if found := list(wanted.violations(*parts)):
            head = f"{self.name}, compiled for {self.platform}, is not what it was to be:"
            raise CheckError("\n  ".join([head, *found]))

    def to_json(self) -> dict[str, Any]:
        """All of it, as what ``json.dump`` takes."""
        update = self.update
        return {
            "name": self.name,
            "platform": self.platform,
            "devices": self.devices,
            "parameters": self.parameters,
            "param_bytes": self.param_bytes,
            "state_bytes": self.state_bytes,
            "state_bytes_in_host": self.state_bytes_in_host,
            "temporary_bytes": self.temporary_bytes,
            "peak_bytes": self.peak_bytes,
            "undonated": [x.name or f"parameter {x.number}" for x in self.undonated],
            "update_bytes_per_parameter": self.per_parameter(update.read + update.written),
            "least_update_bytes_per_parameter": self.per_parameter(update.least_bytes),
            "program": self.program.to_json(),
            "update": update.to_json(),
            "norm": self.norm.to_json(),
            "collectives": [dataclasses.asdict(x) for x in self.collectives],
            "inputs": [dataclasses.asdict(x) for x in self.inputs],
            "leaves": [dataclasses.asdict(x) for x in self.leaves],
        }

    def __str__(self) -> str:
        return _summary(self)


# ------------------------------------------------------------------------- in words


def _summary(report: Report) -> str:
    """The report as some lines of plain text."""
    lines = [f"{report.name}, compiled for {report.platform}"]
    if report.devices > 1:
        lines[0] += f", {report.devices} devices; figures are of each of them"
    for title, part, whose in _parts(report):
        lines.append(f"  {title:<17}{_kernels(part)}")
        lines.append(f"  {'':<17}{_traffic(report, title, part)}")
        if report.devices > 1:
            lines.append(f"  {'':<17}{_exchanged(report, whose)}")
    lines += _others_update(report)
    lines += [f"  {'inputs':<17}{_inputs(report)}", *_names(report)]
    memory = "not in the text; pass the compiled program"
    if report.temporary_bytes is not None and report.peak_bytes is not None:
        memory = f"{size(report.temporary_bytes)}, {size(report.peak_bytes)} with all buffers"
    lines.append(f"  {'temporaries':<17}{memory}")
    if report.leaves:
        lines.append(f"  {'params':<17}{_kept(report)}")
    return "\n".join([*lines, *_landings(report)])


def size(number_of_bytes: int) -> str:
    """Bytes for people: ``1.24 MB``."""
    value, units = float(number_of_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:  # 999,500 B are 1 MB in three digits
        value /= 1000
        units.pop(0)
    return f"{number_of_bytes} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def _parts(report: Report) -> list[tuple[str, Part, str | None]]:
    parts = (
        ("whole program", report.program, None),
        ("the update", report.update, UPDATE),
        ("the norm", report.norm, NORM),
    )
    return [x for x in parts if x[1].kernels]


def _kernels(part: Part) -> str:
    text = f"{part.count} kernel{'s' * (part.count != 1)}"
    if part.count:
        text += f" ({_kinds(part, counted=True)})"
    if part.count < len(part.kernels):
        text += f", not counted: {_kinds(part, counted=False)}"
    if part.launches is None:
        text += "; some in loops of unknown length"
    elif part.launches != part.count:
        text += f"; with loops {part.launches} launches"
    return text


def _kinds(part: Part, *, counted: bool) -> str:
    """How many of each kind, of those that are counted as launches or of the others."""
    found = Counter(x.kind for x in part.kernels if x.counted == counted)
    return ", ".join(f"{n} {kind}" for kind, n in found.most_common())


def _traffic(report: Report, title: str, part: Part) -> str:
    text = f"reads {size(part.read)}, writes {size(part.written)}"
    each = report.per_parameter(part.read + part.written)
    least = report.per_parameter(part.least_bytes)
    if each is not None and least is not None:
        text += f": {each:.1f} bytes per param, {least:.1f} at least"
    if part.estimated_cycles is not None:
        text += f"; {part.estimated_cycles} cycles by the compiler's estimate"
    return text


def _exchanged(report: Report, whose: str | None) -> str:
    """What is exchanged, of the update, of the norm or of all (None)."""
    found = [x for x in report.collectives if whose is None or whose in x.bytes_of]
    kinds = Counter(x.kind for x in found)
    sizes: Counter[str] = Counter()
    for x in found:
        sizes[x.kind] += (x.bytes if whose is None else x.bytes_of[whose]) * (x.times or 1)
    each = (f"{n} {kind} of {size(sizes[kind])}" for kind, n in kinds.most_common())
    text = f"exchanges {', '.join(each) or 'nothing'}"
    runs = [x.times for x in found]
    if None in runs:
        text += "; some in loops of unknown length"
    elif sum(times or 0 for times in runs) != len(found):
        text += f"; with loops {sum(times or 0 for times in runs)} runs"
    return text if len(found) < 2 else f"{text}; {size(sum(sizes.values()))} in all"


def _inputs(report: Report) -> str:
    text = f"{len(report.inputs)}, of which {len(report.in_place)} are updated in place"
    copied = [x for x in report.in_place if x.copied]
    if copied:
        text += f" ({len(copied)} after a copy)"
    return f"{text}; donated, but not in place: {len(report.undonated) or 'none'}"


def _kept(report: Report) -> str:
    text = f"{size(report.param_bytes)}, their state {size(report.state_bytes)}"
    if report.state_bytes_in_host:
        text += f", of which {size(report.state_bytes_in_host)} in the host's memory"
    return text


def _names(report: Report) -> list[str]:
    lines = [f"    {x.name or f'parameter {x.number}'}: {x.shape}" for x in report.undonated]
    return _cut(lines, "report.undonated")


def _landings(report: Report) -> list[str]:
    """One line for all leaves that the same kernels update."""
    if not report.leaves:
        return []
    whose = "params" if report.devices == 1 else "params that a device updates"
    many = "1 leaf" if len(report.leaves) == 1 else f"{len(report.leaves)} leaves"
    lines = [f"  {many}, {report.parameters} {whose}, land in"]
    groups: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in report.leaves:
        groups.setdefault(leaf.kernels, []).append(leaf)
    found = []
    for kernels, leaves in groups.items():
        names = [
            *kernels[:MAX_NAMES],
            *[f"{len(kernels) - MAX_NAMES} more"][: len(kernels) > MAX_NAMES],
        ]
        more = f" and {len(leaves) - 1} more" if len(leaves) > 1 else ""
        where = ", ".join(names) or "no kernel that is known"
        found.append(f"    {where}: {leaves[0].name} {leaves[0].shape}{more}")
    return lines + _cut(found, "report.leaves")


def _others_update(report: Report) -> list[str]:
    """Of a step without this package's update; a program that keeps nothing has none at all."""
    if report.update.kernels or not (report.leaves or report.in_place):
        return []
    kernels = {name for leaf in report.leaves for name in leaf.kernels}
    makes = "1 kernel makes" if len(kernels) == 1 else f"{len(kernels)} kernels make"
    found = f"{makes} the new leaves" if kernels else NOT_TOLD
    return [f"  {'the update':<17}none of this package; {found}"]


def _cut(lines: list[str], where: str) -> list[str]:
    if len(lines) <= MAX_LINES:
        return lines
    return [*lines[:MAX_LINES], f"    and {len(lines) - MAX_LINES} more, in {where}"]
