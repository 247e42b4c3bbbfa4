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

from elsewhere import target
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

DUMP_PTX = "--xla_dump_hlo_as_text=false --xla_dump_emitter_re=ptx"
"""What jaxlib 0.12 must be told to write PTX, and 0.10 writes it of itself."""

EXACT = re.compile(
    r"""(add|sub)\.rn\.(f32|f32x2|f32\.bf16|f64)  # bf16: of an operand
    | mul\.rn\.(f32|f32x2|f64)
    | (div|sqrt)\.rn\.(f32|f64)
    | (max|min)\.(NaN\.f32|f64)
    | (abs|neg|selp|setp\.\w+)\.(f32|f64)
    | cvt\.(f32\.bf16|rn\.bf16(x2)?\.f32)
    """,
    re.VERBOSE,
)
"""Operations on floats that are IEEE's: rounded to nearest, subnormals kept. The assembler may
contract those without a rounding (``add.f32``) into ``fma``, which rounds once for two."""

EVERYTHING = {"amsgrad": True, "use_ema": True, "skip_nonfinite": True, "clipvalue": 1.0}


@functools.cache
def environment() -> dict[str, str]:
    """What the compiling process runs in; skips without the CUDA compiler."""
    target("h100")
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
    flags = f"--xla_dump_to={dump} {DUMP_PTX}" if dump else ""
    more = {"XLA_FLAGS": flags, "JAX_ENABLE_X64": str(int(dtype == "float64"))}
    case = json.dumps([target, model, dtype, options, who, devices])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, case, str(TOOLS / "inspection")],
        env=environment() | more,
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
    # Each device sums its parts of leaves that are cut, and one of them what all hold whole.
    norms = ["adamw_sum_of_squares"] * 2 * len(options)
    assert launches(text) == [*norms, "adamw_update"]
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


def inexact(ptx: str) -> list[str]:
    """The instructions that act on floats, or may, and not as IEEE's operations do."""
    code = re.sub(r"//.*|^\s*\$?\w+:", "", ptx, flags=re.MULTILINE)
    found = [re.match(r"[\s{}]*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", x) for x in code.split(";")]
    opcodes = {match[1] for match in found if match}
    on_floats = re.compile(r"\.(?:b?f16|tf32|f32|f64|e\dm\d)|^call\b")
    return sorted(x for x in opcodes if on_floats.search(x) and not EXACT.fullmatch(x))


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("div.full.f32 \t%r1, %r2, %r3;", ["div.full.f32"]),
        ("{ @%p1 add.f32 %r1, %r2, %r3; }", ["add.f32"]),
        ("$L__BB0_1: // a label\n fma.rn.f32 %r1, %r2, %r3, %r4;", ["fma.rn.f32"]),
        ("mul.rn.ftz.f32 %r1, %r2, %r3; rsqrt.approx.f64 %rd1, %rd2;",
         ["mul.rn.ftz.f32", "rsqrt.approx.f64"]),
        ("fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4; call.uni (r), __nv_expf, (p);",
         ["call.uni", "fma.rn.f32x2"]),
        ("setp.neu.ftz.f32 %p1, %r1, %r2; cvt.rz.bf16.f32 %rs1, %r1;",
         ["cvt.rz.bf16.f32", "setp.neu.ftz.f32"]),
        ("mul.wide.u32 %rd1, %r1, 4; sub.rn.f32.bf16 %r1, %r2, %rs1; // fma.rn.f32", []),
    ],
)  # fmt: skip
def test_operations_that_are_not_ieee_are_named(instruction: str, found: list[str]) -> None:
    assert (
        inexact(f".entry kernel(.param .u64 a)\n{{\n.reg .b32 %r<4>;\n{instruction}\n}}") == found
    )


def kernels(folder: Path) -> dict[str, tuple[Path, str]]:
    """Our kernels by name: the PTX file, and the kernel's text from its entry on."""
    found = {}
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        for match in re.finditer(r"\.entry adamw_(\w+)_kernel\(", text):
            found[match[1]] = path, text[match.start() : text.index("\n}\n", match.start())]
    return found


@pytest.mark.parametrize("target", ["a100", "h100", "b200"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"global_clipnorm": 1.0}),
        ("bfloat16", EVERYTHING),
        ("float64", EVERYTHING),
    ],
    ids=["clip", "everything", "wide"],
)
def test_exact_operations_wide_accesses_and_no_spills(
    target: str, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    compiled(target, "gpt2-small", dtype, dump=tmp_path, **options)  # all sizes are whole units
    found = kernels(tmp_path)
    assert sorted(found) == ["sum_of_squares", "update"]
    # No operation is contracted or approximate: rounded as the interpreter rounds it.
    assert {name: inexact(body) for name, (_, body) in found.items() if inexact(body)} == {}
    assert all(re.search(r"\bmul\.rn\.f(32|64)\b", body) for _, body in found.values())
    update = found["update"][1]
    access = "v2.b64" if dtype == "float64" else "v4.b32"
    assert set(re.findall(r"st\.global[\w.]*", update)) == {f"st.global.{access}"}
    narrow = re.findall(rf"ld\.global(?!\.{access})[\w.]*", update)
    assert len(narrow) <= 16  # the step's scalars
    assert len(re.findall(r"st\.global", found["sum_of_squares"][1])) == 1  # a sum
    for path, _ in found.values():
        architecture = re.search(r"\.target (\w+)", path.read_text())[1]
        command = [environment()["PTXAS"], "-v", "--gpu-name", architecture, str(path)]
        command += ["-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert re.findall(r"(\d+) bytes spill stores", report) == ["0"]


def test_compiles_faster_than_optax() -> None:
    ours = compiled("h100", "gpt2-small")[1]
    theirs = compiled("h100", "gpt2-small", who="optax")[1]
    assert ours < theirs
