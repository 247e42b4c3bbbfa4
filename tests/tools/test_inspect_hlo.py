"""``tools/inspect_hlo.py`` and ``tools/kernel_table.py`` on the CPU, where nothing is missing."""

from __future__ import annotations

from importlib.util import find_spec
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import textwrap

from headless.parsed import Page
import inspect_hlo
from inspection import aot
import kernel_table
from places import python_path
import pytest
from typer.testing import CliRunner

import adamw_xla as ax

runner = CliRunner()
TOOLS = Path(inspect_hlo.__file__).parent
SHAPES = {"w": [64, 32], "b": [32], "<odd & name>": [3]}


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(SHAPES))
    return str(path)


def run(*arguments: str, status: int = 0) -> str:
    """Runs the tool; returns all it printed, on one line."""
    result = runner.invoke(inspect_hlo.app, ["--target", "cpu", *arguments], terminal_width=200)
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def test_json_holds_the_reports(model, tmp_path):
    out = tmp_path / "report.json"
    run("--model", model, "--against", "optax", "--clip", "global", "--json", str(out))
    ours, optax = json.loads(out.read_text())
    assert (ours["name"], optax["name"]) == ("adamw_xla", "optax")
    assert ours["parameters"] == optax["parameters"] == 64 * 32 + 32 + 3
    assert ours["norm"]["count"] > 0
    assert ours["undonated"] == optax["undonated"] == []
    assert [leaf["shape"] for leaf in ours["leaves"]] == ["f32[3]", "f32[32]", "f32[64,32]"]
    assert ours["compile_seconds"] > 0
    for found in (ours, optax):
        kept = [x["name"] for x in found["inputs"] if not x["donated"]]
        assert kept == [f"grads[{name!r}]" for name in sorted(SHAPES)]
    run("--model", model, "--against", "optax", "--json", str(out))
    for clipped, plain in zip((ours, optax), json.loads(out.read_text()), strict=True):
        assert clipped["program"]["count"] > plain["program"]["count"]


@pytest.mark.slow
def test_keras_and_every_common_option(model):
    for options in (["--amsgrad", "--ema"], ["--accumulate", "2"], ["--dtype", "bfloat16"]):
        assert "keras" in run("--model", model, "--against", "keras", *options)
    assert "optax" in run("--model", model, "--against", "optax", "--amsgrad", "--clip", "value")
    assert "optax" in run("--model", model, "--against", "optax", "--accumulate", "2")


def test_table_and_details(model):
    printed = run("--model", model, "--details")
    assert "donated, not in place" in printed
    assert "donated, but not in place: none" in printed


def test_dump(model, tmp_path):
    run("--model", model, "--dump", str(tmp_path / "out"))
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == [
        "cpu.adamw_xla.hlo",
        "cpu.adamw_xla.html",
        "cpu.adamw_xla.stablehlo.mlir",
    ]
    assert "module @jit_step" in files["cpu.adamw_xla.stablehlo.mlir"]
    found = ax.hlo.report(files["cpu.adamw_xla.hlo"])
    page = Page(files["cpu.adamw_xla.html"])
    assert len(set(page.ids)) == len(page.ids)
    assert page.dead_links == []
    # Each leaf has a link to its kernels, and each kernel one to its line.
    for leaf in found.leaves:
        assert leaf.name in page.words
        for kernel in leaf.kernels:
            assert {f"#kernel={kernel}", f"#hlo={kernel}"} <= {*page.links}
    assert "<odd & name>" in page.words
    assert "<odd" not in files["cpu.adamw_xla.html"]


def test_fail_above(model):
    printed = run("--model", model, "--fail-above", "0", status=1)
    kernels = int(re.search(r"adamw_xla has (\d+) kernels on cpu; --fail-above 0", printed)[1])
    run("--model", model, "--fail-above", str(kernels))
    run("--model", model, "--fail-above", str(kernels - 1), status=1)


def test_any_train_step(tmp_path, monkeypatch):
    (tmp_path / "my_train_step.py").write_text(
        textwrap.dedent("""
            import jax, jax.numpy as jnp
            import adamw_xla as ax

            def inspected():
                config = ax.AdamW()
                params = {"w": jnp.zeros((8, 4))}
                state = jax.eval_shape(lambda p: ax.adamw_init(p, config), params)

                def train_step(params, state, x):
                    grads = jax.grad(lambda p: jnp.mean((x @ p["w"]) ** 2))(params)
                    return ax.adamw_step(params, grads, state, config)

                jitted = jax.jit(train_step, donate_argnames=("params", "state"))
                return jitted, (params, state, jax.ShapeDtypeStruct((2, 8), "float32"))

            def frozen():
                step, args = inspected()
                return jax.jit(lambda *args: step(*args)[1]), args

            wrong = lambda: 3
            no_tuple = lambda: (jax.jit(jnp.sin), 3)
            no_array = lambda: (jax.jit(jnp.sin), (jnp.ones(3), {"x": "text"}))
            no_jit = lambda: (jnp.sin.__wrapped__, (jnp.ones(3),))
            wants_one = lambda model: 3
            number = 3
        """)
    )
    (tmp_path / "no_syntax.py").write_text("def inspected(:\n")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "report.json"
    run("--function", "my_train_step:inspected", "--json", str(out))
    (found,) = json.loads(out.read_text())
    assert [leaf["name"] for leaf in found["leaves"]] == ["params['w']"]
    donated = {x["name"] for x in found["inputs"] if x["donated"]}
    assert donated == {"params['w']", "state.count", "state.m['w']", "state.v['w']"}
    both = ("--function", "my_train_step:inspected", "--function", "my_train_step:frozen")
    printed = run(*both, "--fail-above", "0", "--json", str(out), status=1)
    assert "my_train_step:inspected has" in printed
    names, donors = zip(
        *((x["name"], {y["donated"] for y in x["inputs"]}) for x in json.loads(out.read_text())),
        strict=True,
    )
    assert names == both[1::2]
    assert donors == ({True, False}, {False})
    for function, message in USERS_MISTAKES.items():
        assert f"inspect_hlo: --function {function}: {message}" in run(
            "--function", function, status=2
        )


USERS_MISTAKES = {
    "my_train_step:wrong": "must return (function, args): what jax.jit returned",
    "my_train_step:no_tuple": "must return (function, args): what jax.jit returned",
    "my_train_step:no_array": "args[1]['x'] is of type str; must be an array",
    "my_train_step:no_jit": "returned a function that jax.jit did not make",
    "my_train_step:wants_one": "is called without arguments: missing a required argument",
    "my_train_step:number": "number is of type int; must be module:callable.",
    "my_train_step:nothing": "nothing is not there; must be module:callable.",
    "no_syntax:inspected": "invalid syntax (no_syntax.py, line 1).",
}

MISTAKES = {
    "--target v2": "--target v2: must be one of cpu, h100, a100",
    "--against torch": "--against torch: must be one of optax, keras.",
    "--clip norm": "--clip norm: must be one of none, global, leaf, value.",
    "--dtype int8": "--dtype int8: must be one of float32, bfloat16, float16.",
    "--model nowhere.json": "--model nowhere.json: is neither a file nor one of gpt2-small",
    "--function nowhere": "--function nowhere: must be module:callable.",
    "--function no.such:thing": "--function no.such:thing: No module named 'no'.",
    "--function no_such:x:": "--function no_such:x:: No module named 'no_such'.",
    "--function folder/file:x": "--function folder/file:x: must be module:callable.",
    "--function os:sep": "--function os:sep: sep is of type str; must be module:callable.",
    "--function a:b --mesh data=8 --ema": "--function compiles the step that it names; leave "
    "out --ema, --mesh.",
    "--function os:getcwd --against optax": "--function os:getcwd: must return (function, args)",
    "--function a:b --function c:d --against e:f": "--against compares one --function; leave out",
    "--function a:b --assert donate": "--assert donate: must be one of donated, no-gather",
    "--mesh data=8 --clip none": "a pod, --mesh, --devices, --sizes and --zero1 are of the "
    "transformer's train step; leave out --clip.",
    "--target v5e:16 --mesh data=8": "--target v5e:16: must be one of cpu, h100, a100, b200, v4,",
    "--target h100:1x8": "--target h100:1x8: must be one of cpu, h100",
    "--mesh data=1,model=x": "--mesh: 'model=x' is no axis (data, fsdp, model) with its size",
    "--mesh data=1 --devices 1 --sizes width=33,heads=16": "--width is 33 and must be a multiple",
    "--mesh data=2,data=2": "--mesh data=2,data=2 names data twice.",
    "--sizes layers=2,layers=3": "--sizes layers=2,layers=3 names layers twice.",
    "--assert kernels-at-most=3 --assert kernels-at-most=4": "--assert kernels-at-most: is given "
    "twice: 3 and 4.",
    "--sizes depth=3": "--sizes: 'depth=3' is none of layers, width, heads, context, batch with",
    "--assert state-sharded-over": "--assert state-sharded-over: needs a value: state-sharded",
    "--assert kernels-at-most=few": "--assert kernels-at-most: needs a number: kernels-",
    "--assert donated=yes": "--assert donated=yes: takes no value.",
    "--function a:b --model gpt2-small --clip none": "--function compiles the step that it names; "
    "leave out --model, --clip.",
    "--ema --against optax": "optax.adamw has no moving average of the params; leave it out",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_get_one_line(arguments):
    assert f"inspect_hlo: {MISTAKES[arguments]}" in run(*arguments.split(), status=2)


HUGE, MANY = "[[100000000000000000000]]", "[[16777216, 16777216], [16777216, 16777216]]"


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", '[["a"]]', "[[2, -1]]", '{"w": 4}', HUGE, MANY]
)
def test_mistakes_in_a_file_of_shapes(content, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert f"inspect_hlo: --model {path}: " in run("--model", str(path), status=2)


@pytest.mark.parametrize(
    ("option", "name", "problem"),
    [
        ("--json", "nowhere/x.json", "cannot be written: No such file or directory."),
        ("--json", "file/x.json", "cannot be written: Not a directory."),
        ("--json", ".", "cannot be written: Is a directory."),
        ("--dump", "file", "cannot be written to: File exists."),
        ("--dump", "file/below", "cannot be written to: Not a directory."),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_compiled(
    option, name, problem, model, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(inspect_hlo, "_inspect_all", lambda *_: pytest.fail("compiled"))
    printed = run("--model", model, option, str(tmp_path / name), status=2)
    assert f"{option} {tmp_path / name}: {problem}" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"file", "model.json"}


def test_a_json_file_may_be_written_over(model, tmp_path):
    out = tmp_path / "report.json"
    out.write_text("[]")
    run("--model", model, "--json", str(out))
    assert json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["inspect_hlo", "kernel_table", "bench", "demo"])
@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_a_missing_library_is_named_with_its_command(tool, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import {tool}"
    found = subprocess.run([sys.executable, "-c", code], cwd=TOOLS, capture_output=True, text=True)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    last = found.stderr.splitlines()[-1]  # plugins of JAX may have said something before
    assert re.fullmatch(rf"{tool}: needs {missing}: pip install -e '\.\[[\w,-]+\]'", last)


@pytest.mark.parametrize(("target", "extra"), [("a100", "gpu-compile"), ("v6e", "tpu-compile")])
def test_a_missing_compiler_is_named_with_its_command(target, extra, model, monkeypatch):
    monkeypatch.setattr(aot, "_is_there", lambda module: False)
    printed = run("--target", target, "--model", model, status=2)
    assert re.search(rf"inspect_hlo: {target} needs .*: pip install -e '\.\[{extra}\]'", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "v2"], "--target v2: must be one of cpu, h100"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: cannot be written: No such file"),
    ],
)
def test_mistakes_of_the_kernel_table(arguments, message):
    result = runner.invoke(kernel_table.app, arguments)
    assert result.exit_code == 2
    assert f"kernel_table: {message}" in " ".join(result.output.split())


def test_markdown_table():
    cell = kernel_table.Cell(16, 7168, 0, 2.25, None)
    other = kernel_table.Cell(150, 38400, 1, 1.0, 8_213_259)
    cells = {
        (who, clip): cell if who == "adamw_xla" else other
        for who in kernel_table.WHO
        for clip in kernel_table.CLIPS
    }
    cells["keras", "global"] = None
    nothing = dict.fromkeys(cells)
    head, _, row, empty = kernel_table.markdown(
        {("gpt2-small", "h100"): cells, ("llama-1b", "v5e"): nothing}
    )
    assert head.count("|") == row.count("|") == empty.count("|")
    assert "| 16 / 150 / 150 | 16 / 150 / – |" in row
    assert "| 0 / 2 / 1 |" in row
    assert "does not fit" in empty


# ------------------------------------------------------------------------------ on a mesh


def on_mesh(target: str, function: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process that has eight simulated devices."""
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, inspect_hlo.__file__, "--target", target, *more]
    return subprocess.run(
        [*command, "--function", f"meshed_steps:{function}"],
        env=os.environ
        | {"XLA_FLAGS": flags, "PYTHONPATH": python_path(Path(__file__).parent), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_shardings_of_arguments_are_kept(tmp_path):
    out = tmp_path / "report.json"
    run = on_mesh("cpu", "fsdp", "--json", str(out))
    assert run.returncode == 0, run.stderr
    printed = " ".join(run.stdout.split())
    # Two sums, or two of each leaf.
    assert re.search(r"of it by the norm │ (8|16) B", printed), printed
    assert "of it by the update" not in printed
    (found,) = json.loads(out.read_text())
    assert found["devices"] == 8
    assert found["parameters"] == 2 * 512 * 256 // 8
    moments = [x for x in found["inputs"] if x["name"].startswith(("state.m", "state.v"))]
    assert [x["axes"] for x in moments] == [[["data"], []]] * 4
    gathered = [x for x in found["collectives"] if x["kind"] == "all-gather"]
    assert sum(x["bytes"] for x in gathered) >= 4 * 2 * 512 * 256
    (summed,) = (x for x in found["collectives"] if x["kind"] == "all-reduce" and x["bytes"] > 16)
    assert [x["gradient_sums"] for x in found["leaves"]] == [[summed["name"]]] * 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the extra tpu-compile")
def test_a_mesh_of_the_target(tmp_path):
    out = tmp_path / "report.json"
    run = on_mesh("v5e", "fsdp", "--json", str(out))
    assert run.returncode == 0, run.stderr
    (found,) = json.loads(out.read_text())
    assert (found["platform"], found["devices"]) == ("tpu", 8)
    (norm,) = [x for x in found["collectives"] if "norm" in x["bytes_of"]]
    assert norm["bytes"] == 2 * 4


MESH_MISTAKES = {
    "elsewhere": "names shardings of this machine's devices where it is jitted or inside, and cpu",
    "mapped": "names shardings of this machine's devices where it is jitted or inside, and cpu",
    "two_meshes": "the arguments lie on several meshes: {'",
}


@pytest.mark.parametrize("function", MESH_MISTAKES)
def test_mistakes_with_meshes(function):
    run = on_mesh("cpu", function)
    assert run.returncode == 2, run.stderr
    said = f"inspect_hlo: meshed_steps:{function}: {MESH_MISTAKES[function]}"
    assert said in run.stderr, run.stderr
    assert "Traceback" not in run.stderr
