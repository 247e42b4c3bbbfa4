"""``tools/bench.py step``: who takes part and what is refused. Nothing is timed here."""

from __future__ import annotations

import os
import subprocess
import sys

import bench
from benches import gpu_peers, jitted, step_bench, step_peers, turns
from cpu_oracle import require_native
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

SHAPES = [(4, 8), (4,)]
EVERYONE = {**gpu_peers.SWEEP, **gpu_peers.PEERS, **step_peers.PEERS}


@pytest.mark.slow
@pytest.mark.parametrize("peer", EVERYONE)
def test_every_peer_makes_its_steps(peer: str) -> None:
    if peer in ("keras", "torch"):
        pytest.importorskip(peer)
    if peer == "bandwidth" or "native" in peer:
        require_native()  # the ceiling is compiled too
    grads = step_peers.make_grads(SHAPES, "float32")
    built = EVERYONE[peer](SHAPES, "float32", grads, True)
    built.run(2)
    if isinstance(built, jitted.Jitted):
        params, state = built.carry.value
        moved = [not np.array_equal(p, jnp.full_like(p, 0.5)) for p in params]
        assert all(moved) == (peer != "identity")
        held = 1 if "words" in peer else 2
        assert sum(x.size for x in jax.tree.leaves(state)) >= held * sum(p.size for p in params)


@pytest.mark.parametrize("call", ["donated", "undonated", "eager"])
def test_the_call_is_as_it_says(call: jitted.Call) -> None:
    grads = step_peers.make_grads(SHAPES, "float32")
    built = step_peers.peers(call)["xla"](SHAPES, "float32", grads, False)
    assert isinstance(built, jitted.Jitted)
    before = built.carry.value[0][0]
    built.run(1)
    assert before.is_deleted() == (call == "donated")
    assert isinstance(built._step, jax.stages.Compiled) == (call != "eager")


def test_on_cpus_everybody_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned = []
    monkeypatch.setattr(turns.Contestant, "build", lambda self, *case: spawned.append(case))
    monkeypatch.setattr(turns.Contestant, "turn", lambda self: 1.0 + len(spawned))
    monkeypatch.setattr(turns.Contestant, "__init__", lambda self, name: None)
    monkeypatch.setattr(turns.Contestant, "close", lambda self: spawned.append("closed"))
    monkeypatch.setattr(step_bench, "measure", lambda *_: pytest.fail("all in one process"))
    done = CliRunner().invoke(
        bench.app, ["step", "--case", "16x32k", "--peer", "optax", "--call", "eager"]
    )
    assert done.exit_code == 0, done.exception
    shapes = step_bench.trees()["16x32k"]
    assert spawned == [(shapes, "float32", False, "eager")] * 2 + ["closed"] * 2
    assert "a process of its own" in " ".join(done.output.split())


def test_a_peer_in_a_process_of_its_own() -> None:
    """It has its turns, and what goes wrong there ends in one line here."""
    with turns.contestants(["identity"]) as found:
        found["identity"].build(SHAPES, "float32", False, "donated")
        assert 0 < found["identity"].turn() < turns.TURN
        with pytest.raises(SystemExit, match=r"bench: identity: TypeError: .*float31"):
            found["identity"].build(SHAPES, "float31", False, "donated")
    assert not found["identity"]._process.is_alive()


def test_nobody_is_told_how_to_wait() -> None:
    """Importing the benches sets nothing that OpenMP reads, in torch's process or the probe's."""
    code = "import os; before = set(os.environ); import bench; print(set(os.environ) - before)"
    env = {name: value for name, value in os.environ.items() if "MP_" not in name}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "MP_" not in found.stdout, found.stdout


def test_what_a_copy_moves() -> None:
    """As many bytes, read and written together, as a step of float32 params."""
    copy = gpu_peers.Copy(SHAPES, "float32", [], False)
    assert 2 * copy._source.nbytes == 28 * 36


def test_the_sweep_reaches_the_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def ours(*case: object) -> None:
        seen.append((gpu_peers.merge.MAX_MERGED_ELEMENTS, gpu_peers.gpu_kernel.launch_shape()))

    before = gpu_peers.merge.MAX_MERGED_ELEMENTS, gpu_peers.gpu_kernel.launch_shape()
    monkeypatch.setattr(step_peers, "ours", ours)
    gpu_peers.SWEEP["merged 2^20"]()
    gpu_peers.SWEEP["native 512/2"]()
    assert [seen[0][0], seen[1][1]] == [1 << 20, gpu_peers.Launch(512, 2)]
    assert before == (gpu_peers.merge.MAX_MERGED_ELEMENTS, gpu_peers.gpu_kernel.launch_shape())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep"], "add --device gpu"),
        (["--device", "gpu"], "JAX finds no GPU"),
        (["--device", "gpu", "--call", "eager"], "on GPUs every step is donated"),
        (["--peer", "torch", "--call", "undonated"], "no peer 'torch'; choose from native"),
        (["--peer", "nobody"], "no peer 'nobody'; choose from native"),
        (["--case", "nothing"], "no case 'nothing'; choose from 16x4M"),
        (["--json", "nowhere/x.json"], "cannot write nowhere/x.json: No such file or directory"),
        (["--plot", "nowhere/x.png"], "cannot write nowhere/x.png: No such file or directory"),
    ],
)
def test_refusals(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("measure", "measure_apart"):
        monkeypatch.setattr(step_bench, name, lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(turns, "contestants", lambda _: pytest.fail("started"))
    if "gpu" in arguments and jax.default_backend() == "gpu":
        pytest.skip("there is one")
    done = CliRunner().invoke(bench.app, ["step", *arguments])
    assert done.exit_code == 1
    assert message in str(done.output) + str(done.exception)


@pytest.mark.parametrize("command", ["trace", "compile", "keras"])
def test_files_are_refused_before_anything_is_timed(command: str) -> None:
    done = CliRunner().invoke(bench.app, [command, "--json", "nowhere/x.json"])
    assert done.exit_code == 1
    assert "cannot write nowhere/x.json: No such file" in str(done.output) + str(done.exception)


@pytest.mark.parametrize("peer", ["torch", "keras"])
def test_a_peer_that_is_not_there(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("measure", "measure_apart"):
        monkeypatch.setattr(step_bench, name, lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(turns, "contestants", lambda _: pytest.fail("started"))
    monkeypatch.setattr(step_bench, "find_spec", lambda _: None)
    done = CliRunner().invoke(bench.app, ["step", "--peer", peer])
    message = f"bench: {peer} cannot run here; pip install -e '.[peers]'"
    assert message in str(done.output) + str(done.exception)
