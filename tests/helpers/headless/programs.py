"""Programs for pages: of the reader's goldens, and changed to be what is rare."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from inspection import aot
from inspection.inspect_cases import Inspected

import adamw_xla as ax
from adamw_xla.hlo import Collective, Leaf

GOLDENS = Path(__file__).parents[2] / "hlo" / "goldens"
LONG = "jit(train_step)/" + "/".join(["a_scope_of_a_model_with_a_long_name"] * 12) + "/mul"
ODD = ("params['<b>&\"quoted\"</b>']", "params['größe/µ']", 'params["it\'s"][0].w', "no ['path")
"""Names of leaves that a page must survive."""


def read(golden: str, name: str = "adamw_xla") -> Inspected:
    """A program of those beside the reader's tests, as if it had just been compiled."""
    text = (GOLDENS / f"{golden}.hlo").read_text()
    report = ax.hlo.report(text)
    program = aot.Program(None, "module {}", 0.25, 1.5 + len(text) / 1e5)
    return Inspected(name, golden.partition(".")[0], program, text, report, report.parameters)


def changed(x: Inspected, **changes: object) -> Inspected:
    return dataclasses.replace(x, report=dataclasses.replace(x.report, **changes))


def on_devices(x: Inspected) -> Inspected:
    """The same on eight devices: one leaf is whole, the state of one is cut, two are all cut."""
    report = x.report
    axes: dict[int, tuple[tuple[str, ...], ...]] = {i.number: () for i in report.inputs}
    _, zero1, *rest = report.leaves
    for leaf in rest:
        axes |= dict.fromkeys((leaf.param or 0, *leaf.moments), (("data",),))
    axes |= dict.fromkeys(zero1.moments, (("data",),))
    kernel = report.program.kernels[0]
    gather = Collective(
        name=kernel.name,
        kind="all-gather",
        bytes=4096,
        bytes_of={"update": 4000, "": 96},
        devices=8,
        inputs=(zero1.param or 0,),
        outputs=(),
        computation="main",
        line=kernel.line,
        times=1,
    )
    reduce = dataclasses.replace(
        gather, name="all-reduce.7", kind="all-reduce", bytes=64, bytes_of={"norm": 64}, inputs=()
    )
    inputs = tuple(dataclasses.replace(i, axes=axes[i.number]) for i in report.inputs)
    return changed(x, devices=8, inputs=inputs, collectives=(gather, reduce))


def with_odd_names(x: Inspected) -> Inspected:
    """The same with names that are long, quoted, or in other letters."""
    report, long = x.report, "a_long_name_" * 8
    leaves = [
        dataclasses.replace(leaf, name=name, kernels=tuple(long + k for k in leaf.kernels))
        for leaf, name in zip(report.leaves, ODD, strict=False)
    ]
    kernels = [
        dataclasses.replace(kernel, op_name=LONG, name=long + kernel.name)
        for kernel in report.program.kernels
    ]
    program = dataclasses.replace(report.program, kernels=tuple(kernels))
    return changed(x, leaves=tuple(leaves), program=program)


def with_leaves(x: Inspected, count: int) -> Inspected:
    leaf, *_ = x.report.leaves
    param = next(i for i in x.report.inputs if i.number == leaf.param)
    inputs = [
        dataclasses.replace(param, number=n, bytes=4 * (1 + n % 97) ** 3) for n in range(count)
    ]
    leaves = [
        Leaf(f"params['layer_{n % 40}']['w{n}']", "f32[2]", 2, leaf.kernels, True, n, ())
        for n in range(count)
    ]
    return changed(x, leaves=tuple(leaves), inputs=tuple(inputs))


def without_update(x: Inspected) -> Inspected:
    nothing = ax.hlo.Part(())
    return changed(x, leaves=(), update=nothing, norm=nothing, collectives=())
