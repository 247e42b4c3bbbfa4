"""What ``tools/gpu_report.py`` runs on a GPU, compiled for one that is not there.

The compiler is the extra gpu-compile; without it the tests are skipped. Nothing is run.
"""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys
from typing import Any

from benches import jitted, looped_peers, step_cases, step_peers
from elsewhere import target
from gpu_reporting import plan, steps
from inspection import aot
import jax
import numpy as np
from places import python_path
import pytest

H100 = aot.TARGETS["h100"]


@pytest.fixture(autouse=True)
def _compiler() -> None:
    target(H100.name)


def compiled(pair: Any, shapes: Any, dtype: str, grads: Any, call: str) -> aot.Program:
    """In the place of a peer: its program alone, and none of its memory."""
    del grads
    init, step = pair
    params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    args = ((params, jax.eval_shape(init, params)), params)
    if call == "looped":
        times = jax.ShapeDtypeStruct((), np.int32)
        return aot.compile_for(H100, jitted.loop(step), (times, *args), donate=(1,))
    return aot.compile_for(H100, lambda c, g: step(c[0], g, c[1]), args, donate=(0,))


@pytest.mark.parametrize("name", ["gpt2-small", "resnet50", "1x256M", "400x64k"])
def test_the_timed_programs_compile_and_work_in_place(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_peers, "_jitted", compiled)
    shapes = step_cases.trees()[name]
    params = step_peers.bytes_moved(shapes, "bfloat16") * 2 // 22
    (case,) = [
        p
        for p in steps.plans("gpu", "calls", [])
        if (p.tree, p.dtype, p.clip) == (name, "bfloat16", True)
    ]
    for peer in ("native", "xla"):
        memory = case.peers[peer](shapes, "bfloat16", None, True).compiled.memory_analysis()
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
        assert fresh + memory.temp_size_in_bytes < max(params / 8, 1 << 20), peer


@pytest.mark.parametrize(("peer", "name"), [("native", "gpt2-small"), ("optax", "16x32k")])
def test_steps_in_a_loop_are_whole_and_copy_no_leaf(
    peer: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_peers, "_jitted", compiled)
    shapes = step_cases.trees()[name]
    program = looped_peers.PEERS[peer](shapes, "float32", None, True).compiled
    memory = program.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert fresh + memory.temp_size_in_bytes < 300_000  # the norm has 264,896, a leaf 131,072
    loops = [text for text in program.as_text().split("\n\n") if " while(" in text]
    assert len(loops) == 2  # of the times, and of the steps, in whose body all kernels are
    for text in loops:
        assert "custom-call(" not in text
        assert text.count(" fusion(") <= 1 >= text.count(" copy(")  # the number of the round
    assert "known_trip_count" in loops[0]


PROGRAM = """
import sys
from inspection import aot
import jax, jax.numpy as jnp
xs = [jax.ShapeDtypeStruct((1000 + i,), jnp.float32) for i in range(12)]
aot.compile_for(aot.TARGETS["h100"], lambda *xs: [x * 2 for x in xs], xs)
"""


@pytest.mark.parametrize("flag", ["", plan.GRAPHS_OFF], ids=["on", "off"])
def test_the_flag_turns_command_buffers_off(flag: str, tmp_path: Path) -> None:
    """XLA dumps another sequence of thunks where it makes them of a program."""
    flags = f"{flag} --xla_dump_to={tmp_path} --xla_dump_hlo_pass_re="
    environment = os.environ | {"PYTHONPATH": python_path(), "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=200)
    dumps = [path.name for path in tmp_path.iterdir()]
    assert any("thunk_sequence" in name for name in dumps)
    assert any("after_thunk_passes" in name for name in dumps) == (flag == "")
