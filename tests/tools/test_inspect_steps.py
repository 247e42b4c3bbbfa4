"""``tools/inspect_hlo.py`` on whole train steps: on meshes, asserted, and one against another."""

from __future__ import annotations

from collections import Counter
import json
import math
import os
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

from elsewhere import target
import inspect_hlo
from inspection import aot
from places import python_path
import pytest
from sharded.transformer import MODEL, SIZES, bytes_by_hand
import train_lm
from typer.testing import CliRunner

import adamw_xla as ax

HERE = Path(__file__).parent
MICROSECONDS = {"a100": 490.4, "h100": 298.5, "b200": 125.0, "v4": 833.3, "v5e": 1221.0}
MICROSECONDS |= {"v5p": 361.7, "v6e": 610.5}
"""To move 1 GB, from what the makers publish: 1e9 bytes / (2.039, 3.35, 8, 1.2, ... TB/s)."""


def run(*arguments: str, status: int = 0) -> str:
    """Runs the tool here; returns all it printed, on one line."""
    options = ["--target", "cpu"] if "--target" not in arguments else []
    result = CliRunner().invoke(inspect_hlo.app, [*options, *arguments], terminal_width=200)
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def meshed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process that has eight simulated devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "COLUMNS": "200"}
    command = [sys.executable, inspect_hlo.__file__, "--target", "cpu", *arguments]
    env = os.environ | flags | {"PYTHONPATH": python_path(HERE)}
    return subprocess.run(command, env=env, capture_output=True, text=True)


# ------------------------------------------------------------------- the transformer's step


def check_of_transformer(found: dict[str, Any], ways: dict[str, int], zero1: bool) -> None:
    assert found["devices"] == math.prod(ways.values())
    assert (found["param_bytes"], found["state_bytes"]) == bytes_by_hand(ways, zero1)
    parts: Counter[str] = Counter()
    for x in found["collectives"]:
        assert sum(x["bytes_of"].values()) == x["bytes"]
        parts.update({(x["kind"], whose): n for whose, n in x["bytes_of"].items()})
    # New params are brought together where only the state was cut, by nobody but the update.
    gathered = sum(n for (kind, part), n in parts.items() if part == "update")
    assert (gathered > 0) == zero1, parts
    assert {kind for (kind, part), n in parts.items() if part == "norm"} <= {"all-reduce"}


def test_the_transformer_on_a_mesh(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    mesh = ("--mesh", "data=4,model=2", "--zero1", "--sizes", SIZES, "--json", str(out))
    wanted = ("no-gather-of-state", "state-sharded-over=data", "in-host-memory")
    wanted += ("kernels-at-most=9",)
    done = meshed(*mesh, *(x for name in wanted for x in ("--assert", name)))
    (found,) = json.loads(out.read_text())
    check_of_transformer(found, {"data": 4, "fsdp": 1, "model": 2}, zero1=True)
    cut_over = {axis for x in found["inputs"] for names in x["axes"] or () for axis in names}
    assert cut_over == {"data", "model"}
    assert "exchanged by each of 8 devices: train_lm, cpu" in done.stdout
    assert done.returncode == 1, done.stderr
    one, two, *wrong = done.stderr.partition("inspect_hlo: --assert:\n")[2].splitlines()
    assert one == "train_lm on cpu is not what it was to be:"
    assert re.fullmatch(r"  \d+ kernels, and 9 are allowed", two)
    leaves = 2 * len(found["leaves"])
    assert sum("does not lie in the host's memory: it is" in line for line in wrong) == leaves
    # Nothing else is wrong but the norms' scales, which have few elements and are whole.
    assert len(wrong) == leaves, wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pod", "ways"),
    [("v5e:16x16", {"data": 64, "model": 4}), ("v5p:8x8x8", {"data": 128, "model": 4})],
)
def test_pods(pod: str, ways: dict[str, int], tmp_path: Path) -> None:
    target(pod.partition(":")[0])
    out = tmp_path / "report.json"
    mesh = ",".join(f"{axis}={n}" for axis, n in ways.items())
    run("--target", pod, "--mesh", mesh, "--sizes", SIZES, "--json", str(out))
    (found,) = json.loads(out.read_text())
    assert found["platform"] == "tpu"
    check_of_transformer(found, {"fsdp": 1, **ways}, zero1=False)
    assert {x["times"] for x in found["collectives"]} == {1, MODEL.layers}


def test_a_pod_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "check", lambda target: None)
    monkeypatch.setattr(train_lm, "make_config", lambda steps: pytest.fail("built"))
    said = run("--target", "v5e:4x4", "--devices", "8", status=2)
    assert "inspect_hlo: v5e:4x4 has 16 devices, and the program is for 8." in said
    said = run("--mesh", "data=2", "--devices", "1", status=2)
    assert "inspect_hlo: --mesh data=2 is of 2 devices, and there are 1." in said


# ------------------------------------------------------------------ asserted and compared


def test_what_is_asserted_of_ones_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    step = ("--function", "meshed_steps:in_place", "--assert", "donated")
    run(*step)
    run(*step, "--against", "meshed_steps:alone")  # whose donation nobody asks about
    both = ("--function", "meshed_steps:alone", "--assert", "kernels-at-most=1")
    said = run(*step, *both, status=1)
    assert said.count("is not what it was to be:") == 2, said
    assert "meshed_steps:in_place on cpu is not" in said
    assert said.count("kernels, and 1 are allowed") == 2
    lost = "is not updated in place: it was not donated: name it in donate_argnums"
    assert said.count(lost) == 3 * 2, said


def test_two_versions_of_ones_own_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(HERE)
    out = tmp_path / "report.json"
    step = ("--function", "meshed_steps:in_place", "--against", "meshed_steps:clipped")
    said = run(*step, "--json", str(out), "--dump", str(tmp_path))
    assert (tmp_path / "cpu.compared.html").is_file()
    old, new = json.loads(out.read_text())
    more = new["program"]["count"] - old["program"]["count"]
    assert more > 0
    kernels = re.search(r"kernels │ (\d+) │ (\d+) │ (\S+) \(\+[\d.]+%\) │", said)
    assert kernels, said
    counts = (old["program"]["count"], new["program"]["count"], more)
    assert tuple(map(int, kernels.groups())) == counts
    moved = [x["program"]["bytes_read"] + x["program"]["bytes_written"] for x in (old, new)]
    change = ax.hlo.size(moved[1] - moved[0])
    assert f"+{change} ({moved[1] / moved[0] - 1:+.1%})" in said, said


def test_a_filtered_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("equinox")
    monkeypatch.chdir(HERE)
    out = tmp_path / "report.json"
    step = ("--function", "meshed_steps:filtered", "--json", str(out))
    run(*step, "--assert", "donated")
    (found,) = json.loads(out.read_text())
    layers = ((8, 16), (16, 16), (16, 4))
    assert found["parameters"] == sum((m + 1) * n for m, n in layers)
    names = [f"model.layers[{i}].{what}" for i in range(3) for what in ("weight", "bias")]
    assert [leaf["name"] for leaf in found["leaves"]] == names
    kept = {x["name"] for x in found["inputs"] if not x["donated"]}
    assert kept == {"x"}


def test_the_least_time() -> None:
    for device, microseconds in MICROSECONDS.items():
        assert ax.hlo.microseconds(10**9, device) == pytest.approx(microseconds, rel=2e-4)
        assert (
            device in ax.hlo.BANDWIDTHS[device].source
            or "NVIDIA" in ax.hlo.BANDWIDTHS[device].source
        )
        # What the devices' own drivers say, where that is known; B200s are sold as 4 % faster.
        described = aot.DESCRIPTIONS / f"{device}.txtpb"
        if described.exists():
            (known,) = re.findall(r"memory_bandwidth: (\d+)", described.read_text())
            assert ax.hlo.BANDWIDTHS[device].bytes_per_second == pytest.approx(int(known), rel=0.05)
    assert MICROSECONDS.keys() == ax.hlo.BANDWIDTHS.keys() == aot.TARGETS.keys() - {"cpu"}
    with pytest.raises(ValueError, match="nothing is known of 'v3'; must be one of a100, h100"):
        ax.hlo.microseconds(1, "v3")
