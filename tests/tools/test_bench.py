"""``tools/bench.py step``: who takes part and what is refused. Nothing is timed here."""

from __future__ import annotations

import bench
from benches import gpu_peers, step_bench, step_peers
from cpu_oracle import require_native
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

SHAPES = [(4, 8), (4,)]
EVERYONE = {**gpu_peers.SWEEP, **gpu_peers.PEERS, **step_peers.PEERS}


@pytest.mark.parametrize("peer", EVERYONE)
def test_every_peer_makes_its_steps(peer: str) -> None:
    if peer in ("keras", "torch"):
        pytest.importorskip(peer)
    if peer == "bandwidth" or "native" in peer:
        require_native()  # the ceiling is compiled too
    grads = step_peers.make_grads(SHAPES, "float32")
    built = EVERYONE[peer](SHAPES, "float32", grads, True)
    built.run(2)
    if isinstance(built, step_peers.Jitted):
        params, state = built.carry.value
        moved = [not np.array_equal(p, jnp.full_like(p, 0.5)) for p in params]
        assert all(moved) == (peer != "identity")
        assert sum(x.size for x in jax.tree.leaves(state)) >= 2 * sum(p.size for p in params)


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
        (["--peer", "nobody"], "no peer 'nobody'; choose from native"),
        (["--case", "nothing"], "no case 'nothing'; choose from 16x4M"),
        (["--json", "nowhere/x.json"], "cannot write nowhere/x.json: No such file or directory"),
        (["--plot", "nowhere/x.png"], "cannot write nowhere/x.png: No such file or directory"),
    ],
)
def test_refusals(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_bench, "measure", lambda *_: pytest.fail("measured"))
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
    monkeypatch.setattr(step_bench, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(step_bench, "find_spec", lambda _: None)
    done = CliRunner().invoke(bench.app, ["step", "--peer", peer])
    message = f"bench: {peer} cannot run here; pip install -e '.[peers]'"
    assert message in str(done.output) + str(done.exception)
