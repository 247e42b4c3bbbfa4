"""Reports of programs of several devices, against counts by hand and XLA's own, and what ``check``
finds wrong: each layout with this package's step, with optax' and with Keras'.

Run one by hand: ``PYTHONPATH=tests/helpers:tools XLA_FLAGS=--xla_force_host_platform_device_count=8
python tests/hlo/test_hlo_devices.py "cpu: fsdp, optax"``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import functools
import itertools
from pathlib import Path
from typing import Any

from eight_devices import assert_passed, main
from elsewhere import target
from hlo_words import adds_up
from inspection import aot
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
import numpy as np
import pytest
from sharded.three_leaves import ELEMENTS, LAYOUTS, OPTIMIZERS, ROWS, SHAPES, lowered

import adamw_xla as ax
from adamw_xla.hlo._syntax.shapes import arrays
from adamw_xla.hlo._syntax.text import parse

DEVICES = {"cpu": 8, "v5e:4x4": 16}
"""By name of the target; simulated, or compiled for alone."""

CASES = {
    f"{name}: {layout}, {who}": (name, layout, who)
    for name, layout, who in itertools.product(DEVICES, LAYOUTS, OPTIMIZERS)
}
"""Nothing is left out: with optax and Keras, ZeRO-1 and the host's memory are shardings of the
state that ``jax.jit`` is given, and a transfer before the update and after it."""

PARAMS = 4 * ELEMENTS
"""Bytes of float32."""

SCALARS = 512
"""More bytes than the numbers of a step have."""


@functools.cache
def compiled(name: str, layout: str, who: str, **options: Any) -> Any:
    found = aot.devices(aot.target_of(name), DEVICES[name])
    mesh = Mesh(np.array(found), ("x",), axis_types=(AxisType.Auto,))
    return lowered(mesh, who, LAYOUTS[layout], **options).compile()


def check(found: ax.hlo.Report, **wanted: Any) -> list[str]:
    """What it finds wrong."""
    try:
        found.check(**wanted)
    except ax.hlo.CheckError as error:
        return str(error).splitlines()[1:]
    return []


# --------------------------------------------------------------------------- counts by hand


def right(name: str, layout: str, who: str) -> None:
    program = compiled(name, layout, who)
    found, n = ax.hlo.report(program), DEVICES[name]
    adds_up(found)
    assert found.devices == n
    sizes(found, layout, n)
    exchanges(found, name, layout, who)
    if who == "ours" and name == "cpu":
        update(found, layout, n)
    memory(found, program, name, layout)
    (bytes_as_xla_counts if name == "cpu" else bytes_by_hand)(found, program, layout)
    axis = None if layout == "data" else "x"
    in_host = LAYOUTS[layout].in_host
    wanted = {"donated": True, "no_gather_of_state": True, "in_host_memory": in_host}
    wrong = check(found, state_sharded_over=axis, **wanted)
    if name == "cpu" and who != "ours":  # XLA:CPU copies params, after some of them are written
        wrong = [line for line in wrong if "is copied all the same" not in line]
    assert wrong == [], wrong


def params_here(layout: str, n: int) -> int:
    """Bytes of params on each device, if they lie as the state does."""
    if layout == "data":
        return PARAMS
    return 4 * (2 * 512 * 256 // n + 512) if layout == "tensor" else PARAMS // n


def sizes(found: ax.hlo.Report, layout: str, n: int) -> None:
    here = params_here(layout, n)
    assert found.param_bytes == (PARAMS if layout.startswith("zero1") else here)
    assert found.state_bytes == 2 * here
    assert found.state_bytes_in_host == (2 * here if LAYOUTS[layout].in_host else 0)
    assert 4 * found.parameters == here
    assert [x.name for x in found.leaves] == [f"params[{k!r}]" for k in SHAPES]
    assert all(x.kernels and len(x.moments) == 2 for x in found.leaves), found.leaves


def exchanges(found: ax.hlo.Report, name: str, layout: str, who: str) -> None:
    """Gradients are summed once; of what is cut the whole is brought together once.

    Columns of one matrix and rows of the next need one sum alone: of their product.
    """
    summed = 4 * ROWS * 512 if layout == "tensor" else PARAMS
    gathered, times = (PARAMS, 3) if layout in ("fsdp", "zero1", "zero1 in host") else (0, 0)
    as_sum = 0
    if gathered and name != "cpu":
        # TPU's compiler gathers the bias as a sum with zeros, and what it multiplies in bfloat16
        # anyhow it gathers so.
        as_sum, times = 4 * 512, 2
        gathered -= 2 * 2 * 512 * 256 if layout == "fsdp" else 0
    kinds: Counter[str] = Counter()
    whose: Counter[str] = Counter()
    for x in found.collectives:
        kinds["sums" if x.kind in ("all-reduce", "reduce-scatter") else x.kind] += x.bytes
        whose.update(x.bytes_of)
        assert (x.devices, x.times) == (DEVICES[name], 1), x
        assert x.bytes == sum(x.bytes_of.values()), x
    norm = whose["norm"]
    # Two sums a leaf at most, of what is not whole on each device.
    assert norm <= 2 * 4 * len(SHAPES), norm
    assert (norm > 0) == (who == "ours" and layout != "data"), norm
    assert kinds == +Counter({"sums": summed + as_sum + norm, "all-gather": gathered - as_sum})
    assert sum(x.kind == "all-gather" for x in found.collectives) == times
    assert len(found.collectives) == times + 1 + (norm > 0) + (as_sum > 0), found.collectives
    # Nobody but the update brings new params together.
    assert whose["update"] == (gathered if who == "ours" and layout.startswith("zero1") else 0)
    if layout.startswith("zero1"):
        gathers = {x.name for x in found.collectives if x.outputs}
        assert all(gathers & {*x.kernels} for x in found.leaves), found.leaves


def update(found: ax.hlo.Report, layout: str, n: int) -> None:
    """Params, gradients and moments are read once, params and moments written once.

    ZeRO's new params are written once more, whole, as they are gathered.
    """
    here = found.parameters
    by_hand = here * (24 + 4 * n if layout.startswith("zero1") else 28)
    assert by_hand <= (found.update.least_bytes or 0) <= by_hand + SCALARS


# ------------------------------------------------------------------------ what XLA says itself


def memory(found: ax.hlo.Report, program: Any, name: str, layout: str) -> None:
    """A TPU's arrays take whole blocks, and it tells the host's memory apart; on a CPU that is
    a name alone. Of results XLA counts the table that says where they are, too."""
    known, block = program.memory_analysis(), 1 if name == "cpu" else 512

    def blocks(sizes: Any) -> int:
        return sum(-(-size // block) * block for size in sizes)

    there = [x for x in found.inputs if x.memory == "pinned_host" and name != "cpu"]
    here = [x for x in found.inputs if x not in there]
    assert blocks(x.bytes for x in here) == known.argument_size_in_bytes
    assert blocks(x.bytes for x in there) == known.host_argument_size_in_bytes
    assert blocks(x.bytes for x in here if x.output is not None) == known.alias_size_in_bytes
    assert blocks(x.bytes for x in there) == known.host_alias_size_in_bytes
    results = len(jax.tree.leaves(program.out_info))
    rest = known.output_size_in_bytes - known.alias_size_in_bytes
    assert rest == blocks([8 * results])  # all is in place
    assert found.temporary_bytes == known.temp_size_in_bytes
    whole = known.argument_size_in_bytes + rest + known.temp_size_in_bytes
    assert found.peak_bytes == whole
    if name == "cpu":  # gradients, or the product, before they are summed and after
        least = 2 * (4 * ROWS * 512 if layout == "tensor" else PARAMS)
        assert least <= (found.temporary_bytes or 0) < 2 * least, (least, found.temporary_bytes)


def bytes_as_xla_counts(found: ax.hlo.Report, program: Any, layout: str) -> None:
    """XLA counts an operand that a kernel is given twice, as x * x is, twice; it is read once.

    And it counts the tables of tuples, and constants.
    """
    module = parse(program.as_text())
    again = 0
    for kernel in found.program.kernels:
        around = module.computations[kernel.computation].by_name
        for operand, times in Counter(around[kernel.name].operands).items():
            again += (times - 1) * sum(x.bytes for x in arrays(around[operand].shape))
    known = program.cost_analysis()["bytes accessed"]
    moved = found.program.read + found.program.written + again
    assert moved <= known <= moved + SCALARS, (moved, known)


def bytes_by_hand(found: ax.hlo.Report, program: Any, layout: str) -> None:
    """TPU's compiler keeps these small arrays in vector memory, which XLA's count is of too.

    So each argument is read once from main memory, one matrix twice where that is prefetched for
    the forward pass and again, and each result is written once. A state of the host's is copied
    into main memory first, and back from there. Keras' learning rate stays as it is.
    """
    known = program.cost_analysis()["bytes accessed"]
    read, written = found.program.read, found.program.written
    assert read + written <= known
    given = sum(x.bytes for x in found.inputs)
    matrix = found.leaves[1].elements * 4
    assert found.leaves[1].name == "params['u']"
    results = sum(x.bytes for x in found.in_place)
    copied = found.state_bytes_in_host
    again = (read - given - copied) // matrix
    assert again in (0, 1), (read, given, copied)
    assert given + copied + again * matrix <= read <= given + copied + again * matrix + SCALARS
    rate = sum(x.bytes for x in found.in_place if x.name == "state[1]")
    written += rate
    assert results + copied <= written <= results + copied + SCALARS, (results, copied, written)


def words() -> None:
    said = str(ax.hlo.report(compiled("cpu", "zero1", "ours")))
    assert "compiled for cpu, 8 devices; figures are of each of them" in said
    assert "exchanges 3 all-gather of 1.05 MB" in said
    assert "8 devices" not in str(ax.hlo.report(jax.jit(jnp.sin).lower(1.0).compile()))


# ------------------------------------------------------------------------ planted mistakes

MOMENTS = {
    "ours": ("state.m['u']", "state.v['u']", "state.m['w']", "state.v['w']"),
    "optax": ("state[0].mu['u']", "state[0].nu['u']", "state[0].mu['w']", "state[0].nu['w']"),
    "keras": ("state[4]", "state[5]", "state[6]", "state[7]"),
}
"""Their paths, but for those of the bias, which is small."""


def zero1_that_is_none(name: str, who: str) -> None:
    found = ax.hlo.report(compiled(name, "data", who))
    said = "is not cut over 'x': it is whole on each device, 524288 bytes"
    wrong = check(found, state_sharded_over="dta")
    assert wrong == ["  no argument is cut over 'dta'; they are over x"]
    wrong = check(found, state_sharded_over="x")
    assert sorted(wrong) == sorted(f"  {path} {said}" for path in MOMENTS[who])


def lost_donation(name: str, who: str) -> None:
    wrong = check(ax.hlo.report(compiled(name, "zero1", who, donate=False)), donated=True)
    assert len(wrong) == 3 * len(SHAPES), wrong
    assert all("was not donated: name it in donate_argnums" in line for line in wrong)


def gathered_state(name: str, who: str) -> None:
    found = ax.hlo.report(compiled(name, "zero1", who, gathered=True))
    wrong = check(found, no_gather_of_state=True)
    assert wrong, found.collectives
    assert any("all-gather" in line for line in wrong), wrong


def state_on_the_device(name: str, who: str) -> None:
    wrong = check(ax.hlo.report(compiled(name, "zero1", who)), in_host_memory=True)
    assert len(wrong) == 2 * len(SHAPES), wrong
    assert all("does not lie in the host's memory: it is device" in line for line in wrong)


def other_mistakes() -> None:
    found = ax.hlo.report(compiled("cpu", "fsdp", "ours"))
    assert check(found, kernels_at_most=3) == [
        f"  {found.program.count} kernels, and 3 are allowed"
    ]
    text = ax.hlo.report(compiled("cpu", "fsdp", "ours").as_text())
    wrong = check(text, state_sharded_over="x")
    assert all("a text does not say how it is cut; pass the compiled" in line for line in wrong)
    assert len(wrong) == 4, wrong
    sine = ax.hlo.report(jax.jit(jnp.sin).lower(1.0).compile())
    (line,) = check(sine, donated=True)
    assert "the state was not found among the arguments" in line


MISTAKES = (zero1_that_is_none, lost_donation, gathered_state, state_on_the_device)
CHECKS: dict[str, Callable[[], None]] = {f.__name__: f for f in (words, other_mistakes)}
for case, described in CASES.items():
    CHECKS[case] = functools.partial(right, *described)
for planted, name, who in itertools.product(MISTAKES, DEVICES, OPTIMIZERS):
    CHECKS[f"{name}: {planted.__name__}, {who}"] = functools.partial(planted, name, who)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_on_many_devices(name: str) -> None:
    kind = "v5e" if name.startswith("v5e") else "cpu"
    target(kind)
    same = [x for x in CHECKS if x.startswith("v5e") == (kind == "v5e")]
    assert_passed(name, Path(__file__), *same)


if __name__ == "__main__":
    main(CHECKS)
