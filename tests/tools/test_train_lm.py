"""``tools/train_lm.py``: it learns, on any mesh the same, and goes on as if it had not stopped."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from places import TOOLS, python_path
import pytest
import train_lm
from typer.testing import CliRunner

import adamw_xla as ax

TINY = ["--layers=1", "--width=16", "--heads=2", "--batch=8", "--context=8", "--dtype=float32"]
MODEL = train_lm.Model(layers=1, width=16, heads=2, dtype="float32")


def run(*arguments: object, status: int = 0) -> str:
    """Trains in this process, on one device; returns all that was printed."""
    done = CliRunner().invoke(train_lm.app, [*TINY, *map(str, arguments)])
    assert done.exit_code == status, (done.output, done.exception)
    return done.output


def start(*arguments: object) -> subprocess.Popen[str]:
    """Trains in a process of its own, so that it has devices of its own."""
    command = [sys.executable, str(TOOLS / "train_lm.py"), *TINY, *map(str, arguments)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=-1, text=True)


def finish(*processes: subprocess.Popen[str], status: int = 0) -> list[str]:
    try:
        printed = ["".join(process.communicate(timeout=300)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status] * len(processes), printed
    return printed


def kept(folder: Path, step: int) -> Any:
    return json.loads((folder / str(step) / "kept" / "metadata").read_text())


def trained(folder: Path, step: int, zero1: bool = False) -> list[np.ndarray]:
    """All arrays of a checkpoint, whatever mesh it was made on."""
    mesh = jax.make_mesh((1, 1, 1), train_lm.AXES, devices=jax.devices()[:1])
    like = train_lm.abstract(MODEL, train_lm.make_config(1), mesh, zero1)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore((folder / str(step) / "trained").resolve(), like)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of four steps on one device, with checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("lm") / "finished"
    plot = folder.with_suffix(".png")
    printed = run("--steps", 4, "--every", 1, "--checkpoints", folder, "--plot", plot)
    assert "held out" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(kept(folder, 4)["losses"]) == len(kept(folder, 4)["held_out"]) == 4
    return folder


# ------------------------------------------------------------------------------- learning


def bigrams(text: np.ndarray, unseen: list[np.ndarray]) -> float:
    """Cross entropy of unseen windows, in nats per byte, under counted pairs of bytes."""
    counts = np.ones((256, 256))
    np.add.at(counts, (text[:-1], text[1:]), 1)
    surprise = -np.log(counts / counts.sum(1, keepdims=True))
    return float(np.mean([surprise[window[:, :-1], window[:, 1:]].mean() for window in unseen]))


@pytest.mark.slow
def test_it_learns_more_than_pairs_of_bytes(tmp_path: Path) -> None:
    sizes = ["--layers=2", "--width=64", "--heads=4", "--batch=16", "--context=64"]
    run(*sizes, "--steps", 200, "--every", 200, "--checkpoints", tmp_path / "run")
    ((_, found),) = kept(tmp_path / "run", 200)["held_out"]
    text, held_out = train_lm.load_text()
    mesh = jax.make_mesh((1, 1, 1), train_lm.AXES)
    unseen = [np.asarray(train_lm.windows(held_out, i, (16, 64), mesh)) for i in range(8)]
    assert found < bigrams(text, unseen) - 0.05


def test_windows_are_of_the_text_and_of_their_seed() -> None:
    text, held_out = train_lm.load_text()
    mesh = jax.make_mesh((1, 1, 1), train_lm.AXES)
    first, again, other = (
        np.asarray(train_lm.windows(text, seed, (4, 32), mesh)) for seed in ((0, 7), (0, 7), (0, 8))
    )
    assert first.shape == (4, 33)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert all(row.astype(np.uint8).tobytes() in text.tobytes() for row in first)
    assert len(text) > 8 * len(held_out) > 300_000
    assert b"yield expression" in text.tobytes() + held_out.tobytes()


def test_only_scales_do_not_decay() -> None:
    params = train_lm.layout(MODEL)
    decays: Any = train_lm.make_config(10).weight_decay_mask
    kept = {jax.tree_util.keystr(p) for p, d in jax.tree.leaves_with_path(decays(params)) if not d}
    assert kept == {"['norm']", "['blocks']['attention_norm']", "['blocks']['mlp_norm']"}


# ----------------------------------------------------------------------- meshes, processes


@pytest.mark.parametrize("zero1", [False, True])
def test_how_params_and_state_lie(zero1: bool) -> None:
    mesh = jax.sharding.AbstractMesh((4, 1, 2), train_lm.AXES)
    params, state = train_lm.abstract(train_lm.Model(), train_lm.make_config(1), mesh, zero1)

    def part(leaf: Any) -> int:
        return leaf.size // np.prod(leaf.sharding.shard_shape(leaf.shape))

    parts = {name: part(leaf) for name, leaf in params["blocks"].items()}
    cut = {"qkv": 2, "out": 2, "up": 2, "down": 2, "attention_norm": 1, "mlp_norm": 1}
    assert parts == cut
    more = 4 if zero1 else 1
    assert {name: part(leaf) for name, leaf in state.m["blocks"].items()} == {
        name: ways * more if ways > 1 else 1 for name, ways in cut.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4,model=2", "data=2,fsdp=2,model=2", "zero1"])
def test_a_mesh_is_one_device(mesh: str, finished: Path, tmp_path: Path) -> None:
    on = ["--mesh", "data=4,model=2", "--zero1"] if mesh == "zero1" else ["--mesh", mesh]
    folder = ["--checkpoints", tmp_path / "mesh", "--steps", 4, "--every", 4]
    finish(start(*folder, "--devices", 8, *on))
    same_within_rounding(tmp_path / "mesh", finished)


@pytest.mark.slow
def test_two_processes_are_one(finished: Path, tmp_path: Path) -> None:
    together = ["--coordinator", f"localhost:{free_port()}", "--processes", 2, "--zero1"]
    folder = ["--checkpoints", tmp_path / "two", "--steps", 4, "--every", 4]
    printed = finish(*(start(*together, "--process", i, *folder) for i in range(2)))
    assert "held out" in printed[0]
    assert "held out" not in printed[1]
    same_within_rounding(tmp_path / "two", finished)


@pytest.mark.slow
def test_processes_that_disagree() -> None:
    together = ["--coordinator", f"localhost:{free_port()}", "--processes", 2]
    each = [start(*together, "--process", i, "--seed", i) for i in range(2)]
    for printed in finish(*each, status=2):
        assert "the processes were started with different options" in printed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def same_within_rounding(folder: Path, finished: Path) -> None:
    ours, theirs = kept(folder, 4), kept(finished, 4)
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-6)
    np.testing.assert_allclose(ours["held_out"][-1], theirs["held_out"][-1], rtol=1e-6)
    # By norm: where a gradient is all but 0, AdamW makes a step of its rounding.
    for x, y in zip(trained(folder, 4), trained(finished, 4), strict=True):
        assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y)


def test_the_step_is_in_place() -> None:
    mesh, config = train_lm.make_mesh("data=1", MODEL, 8), train_lm.make_config(10)
    like = train_lm.abstract(MODEL, config, mesh, False)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    tokens = jax.ShapeDtypeStruct((8, 9), "int32")
    compiled = train_lm.jitted_step(MODEL, config, places).lower(*like, tokens).compile()
    report = ax.hlo.report(compiled)
    assert [x.name for x in report.inputs if not x.donated] == ["tokens"]
    assert not report.undonated


# ----------------------------------------------------------------------------- going on


@pytest.mark.slow
def test_resumed_is_uninterrupted(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "4")
    run("--steps", 4, "--every", 1, "--checkpoints", folder, "--resume")
    assert kept(folder, 4) == kept(finished, 4)
    for ours, theirs in zip(trained(folder, 4), trained(finished, 4), strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


# -------------------------------------------------------------------------------- mistakes


def refused(*arguments: object) -> str:
    """The one sentence that a mistake ends in."""
    done = CliRunner().invoke(train_lm.app, [*TINY, *map(str, arguments)])
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = done.stderr.splitlines()
    return line.removeprefix("train_lm: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh tensor=1", "--mesh: 'tensor=1' is no axis (data, fsdp, model) with its size, as"),
        ("--mesh data=0", "--mesh: 'data=0' is no axis"),
        ("--mesh data", "--mesh: 'data' is no axis"),
        ("--mesh data=2,data=2", "--mesh data=2,data=2 names data twice"),
        ("--mesh data=3", "--mesh data=3 is of 3 devices, and there are 1; see --devices"),
        ("--width 18", "--width is 18 and must be a multiple of 4 (twice --heads)"),
        ("--process 1", "--coordinator, --processes and --process go together"),
        ("--coordinator localhost:1", "--coordinator, --processes and --process go together"),
        ("--resume", "--resume needs --checkpoints"),
        ("--resume --checkpoints nowhere", "there is no checkpoint in nowhere"),
        ("--plot nowhere/loss.png", "cannot write nowhere/loss.png: No such file"),
    ],
)
def test_refusals(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert refused(*arguments.split()).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=3", "--batch is 8 and must be a multiple of 3 (data times fsdp)"),
        ("fsdp=3", "--batch is 8 and must be a multiple of 3 (data times fsdp)"),
        ("model=3", "--heads is 2 and must be a multiple of 3 (model)"),
    ],
)
def test_meshes_that_do_not_divide(
    mesh: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [None] * 3)
    assert refused("--mesh", mesh) == message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "has a training at step 4: add --resume, or name a new folder"),
        ("--resume --steps 4", "is at step 4, and --steps is 4"),
        ("--resume --layers 2", "has layers 1, this one 2"),
        ("--resume --accumulate 2", "has accumulate 1, this one 2"),
    ],
)
def test_checkpoints_of_another_training(options: str, message: str, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert refused("--checkpoints", finished, *options.split()).endswith(message)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


BROKEN: dict[str, Callable[[Path], Any]] = {
    "trained/_METADATA": truncate,
    "trained/manifest.ocdbt": truncate,
    "trained/d": lambda folder: [truncate(path) for path in folder.iterdir()],
    "kept": shutil.rmtree,
}


@pytest.mark.slow
@pytest.mark.parametrize("part", BROKEN)
def test_a_broken_checkpoint(part: str, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(finished, folder)
    BROKEN[part](folder / "4" / part)
    message = refused("--steps", 5, "--checkpoints", folder, "--resume")
    assert message.startswith(f"{folder}/4 cannot be read (")
    assert message.endswith("; the one before can, without it")
    assert (folder / "4").is_dir()
