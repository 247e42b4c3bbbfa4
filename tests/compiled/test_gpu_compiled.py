"""The GPU's kernel, compiled for devices that are not there: launches, spills, accesses.

The compiler is the extra gpu-compile; without it the tests are skipped. Nothing is run.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

from inspection import aot
from places import TOOLS, python_path
import pytest

# XLA reads where to dump only once, and the plugin's platform must not be this process's.
PROGRAM = """
import functools, json, sys, time
import jax, jax.numpy as jnp, numpy as np, optax
from jax.experimental import topologies
import adamw_xla as ax, shapes

target, model, dtype, options, who, devices = json.loads(sys.argv[1])
text = open(f"{sys.argv[2]}/targets/{target}.txtpb").read()
topology = topologies.get_topology_desc(
    target.upper(), platform="cuda", target_config=text, topology=f"1x1x{devices}")
mesh = jax.sharding.Mesh(np.array(topology.devices), ("x",))

def place(x):
    even = x.ndim > 0 and x.shape[0] % devices == 0
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*["x"] * even))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

if model == "random":
    sizes = np.random.default_rng(0).integers(1, 300_000, 400)
    model = {f"{i:03}": (int(n),) for i, n in enumerate(sizes)}
else:
    model = shapes.MODELS[model]()
params = shapes.structs(model, dtype)
if who == "optax":
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(optimizer.init, params)
    def step(p, g, s):
        updates, s = optimizer.update(g, s, p)
        return optax.apply_updates(p, updates), s
else:
    config = ax.AdamW(**options)
    state = jax.eval_shape(functools.partial(ax.adamw_init, config=config), params)
    step = lambda p, g, s: ax.adamw_step(p, g, s, config, implementation="native")
args = jax.tree.map(place, (params, params, state))
start = time.process_time()
traced = jax.jit(step, donate_argnums=(0, 2)).trace(*args)
compiled = traced.lower(lowering_platforms=("cuda",)).compile()
seconds = time.process_time() - start
memory = compiled.memory_analysis()
print(json.dumps([compiled.as_text(), seconds, memory.temp_size_in_bytes]))
"""


@functools.cache
def environment() -> dict[str, str]:
    """What the compiling process runs in; skips without the CUDA compiler."""
    try:
        aot.check(aot.TARGETS["h100"])
    except aot.UnavailableError as error:
        if os.environ.get("ADAMW_XLA_REQUIRE_COMPILERS"):
            raise
        pytest.skip(str(error))
    nvcc = importlib.import_module("nvidia.cuda_nvcc")
    more = {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PYTHONPATH": python_path(),
    }
    return {**os.environ, **more, "PTXAS": str(Path(next(iter(nvcc.__path__))) / "bin" / "ptxas")}


def compiled(
    target: str,
    model: str,
    dtype: str = "float32",
    who: str = "",
    dump: Any = None,
    devices: int = 1,
    **options: Any,
) -> tuple[str, float, int]:
    """The optimized HLO, seconds of processor time, and bytes of temporaries.

    On several devices, leaves are sharded by their first dimension where it divides evenly.
    """
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text=false" if dump else ""
    case = json.dumps([target, model, dtype, options, who, devices])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, case, str(TOOLS / "inspection")],
        env=environment() | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def launches(text: str) -> list[str]:
    """The kernels of the entry computation that read or write a whole tree, in order."""
    entry = text[text.index("\nENTRY") :]
    return re.findall(r"%(\w+)[.\d]* = .*custom-call\(", entry)


@pytest.mark.parametrize("target", ["a100", "h100", "b200"])
@pytest.mark.parametrize("model", ["gpt2-small", "resnet50", "random"])
def test_one_launch_without_copies(target: str, model: str) -> None:
    text, _, temporaries = compiled(target, model)
    assert launches(text) == ["adamw_update"]
    assert not re.search(r" copy\([^)]*f32", text)
    assert temporaries < 10_000


@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 1.0}], ids=["plain", "clip"])
def test_one_launch_on_each_of_four_devices(options: dict[str, Any]) -> None:
    """XLA partitions the program, and each device updates its shards in place."""
    text, _, _ = compiled("h100", "gpt2-small", devices=4, **options)
    assert launches(text) == ["adamw_update"]
    assert "f32[192,3072]" in text  # a shard
    assert not re.search(r" copy\([^)]*f32", text)
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == len(options)


@pytest.mark.parametrize("model", ["gpt2-small", "random"])
def test_three_launches_with_the_global_norm(model: str) -> None:
    text, _, _ = compiled("h100", model, global_clipnorm=1.0, skip_nonfinite=True)
    assert launches(text) == ["adamw_sum_of_squares", "adamw_update"]
    entry = text[text.index("\nENTRY") :]
    assert len(re.findall(r"kind=kInput.*adamw_sum_of_squares", entry)) == 1


@pytest.mark.parametrize("target", ["a100", "h100", "b200"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("bfloat16", {"amsgrad": True, "use_ema": True, "skip_nonfinite": True, "clipvalue": 1.0}),
    ],
    ids=["plain", "everything"],
)
def test_wide_accesses_and_no_spills(
    target: str, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    compiled(target, "gpt2-small", dtype, dump=tmp_path, **options)  # all sizes are whole units
    (ptx,) = [p for p in tmp_path.glob("*.ptx") if ".entry adamw_update_kernel" in p.read_text()]
    text = ptx.read_text()
    body = text[text.index(".entry adamw_update_kernel") :]
    assert set(re.findall(r"st\.global[\w.]*", body)) == {"st.global.v4.b32"}
    narrow = re.findall(r"ld\.global(?!\.v4\.b32)[\w.]*", body)
    assert len(narrow) <= 16  # the step's scalars
    # No operation is contracted or approximate: rounded as the interpreter rounds it.
    assert re.findall(r"\b(?:fma\S*|div\.full\S*|\w+\.approx\S*|\S+\.ftz\S*)", body) == []
    architecture = re.search(r"\.target (\w+)", text).group(1)
    command = [environment()["PTXAS"], "-v", "--gpu-name", architecture, str(ptx)]
    command += ["-o", "/dev/null"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes spill stores", report) == ["0"]


def test_compiles_faster_than_optax() -> None:
    ours = compiled("h100", "gpt2-small")[1]
    theirs = compiled("h100", "gpt2-small", who="optax")[1]
    assert ours < theirs
