"""``tools/devices_chart.py``: its numbers against counts by hand, and that they are drawn."""

from __future__ import annotations

import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import devices_chart
from inspection import aot, growth
import matplotlib as mpl
from matplotlib.colors import to_rgb
from matplotlib.image import imread
import numpy as np
from places import python_path
import pytest
from sharded.transformer import SIZES, bytes_by_hand
from typer.testing import CliRunner

AXES = {"data": "data", "zero1": "data", "fsdp": "fsdp"}


def check_of_point(x: dict[str, Any]) -> None:
    """Params and state by hand; of the gradients' sum and what is gathered at least so much."""
    ways = {"data": 1, "fsdp": 1, "model": 1, AXES[x["layout"]]: x["devices"]}
    assert (x["params"], x["state"]) == bytes_by_hand(ways, x["layout"] == "zero1"), x
    whole, _ = bytes_by_hand(dict.fromkeys(ways, 1), zero1=False)
    assert x["buffers"] >= x["params"] + x["state"] + x["temporaries"]
    # Gradients are summed; and where something is cut, params are gathered, if in bfloat16.
    least = 0 if x["devices"] == 1 else whole * (1 if x["layout"] == "data" else 1.5)
    assert x["exchanged"] >= least, x
    assert (x["exchanged"] == 0) == (x["devices"] == 1), x
    assert x["moved"] >= x["params"] + x["state"]
    assert x["compiled"] > 0


def has_all_layouts(panel: Any) -> bool:
    """Whether a part of the picture has a line in each one's colour."""
    colors = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    wanted = [to_rgb(color) for color, _ in zip(colors, growth.LAYOUTS, strict=False)]
    return all(np.isclose(panel[..., :3], color, atol=0.01).all(-1).sum() > 50 for color in wanted)


@pytest.mark.slow
def test_one_and_four_devices(tmp_path: Path) -> None:
    plot, out = tmp_path / "it.png", tmp_path / "it.json"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "COLUMNS": "80"}
    command = [sys.executable, devices_chart.__file__, "--target", "cpu", "--devices", "4,1"]
    command += ["--sizes", SIZES, "--plot", str(plot), "--json", str(out)]
    env = os.environ | flags | {"PYTHONPATH": python_path()}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    kinds = [(x["devices"], x["layout"]) for x in found]
    assert kinds == [(n, layout) for n in (1, 4) for layout in growth.LAYOUTS]
    for x in found:
        check_of_point(x)
    rows = [line.split()[:3] for line in done.stdout.splitlines()]
    assert [row for row in rows if row[1:2] == ["cpu"]] == [[str(n), "cpu", x] for n, x in kinds]
    picture = imread(plot)
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    halves = [(slice(height), slice(height, None)), (slice(width), slice(width, None))]
    assert all(
        has_all_layouts(picture[rows, columns]) for rows in halves[0] for columns in halves[1]
    )


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> Any:
        raise growth.inspect_cases.DoesNotFitError("used 20.00G of 15.75G hbm")

    monkeypatch.setattr(growth.inspect_cases, "inspect", refuse)
    options = ["--target", "cpu", "--devices", "1", "--sizes", SIZES]
    files = ["--plot", str(tmp_path / "it.svg"), "--json", str(tmp_path / "it.json")]
    done = CliRunner().invoke(devices_chart.app, [*options, *files])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("no room") == len(growth.LAYOUTS)
    assert "20.00G of 15.75G" in json.loads((tmp_path / "it.json").read_text())[0]["refused"]


def test_lower_bounds_are_marked(tmp_path: Path) -> None:
    """Of what is moved and exchanged, as in the table, and of nothing else."""
    figures = {"params": 1, "state": 2, "buffers": 4, "moved": 8, "exchanged": 3, "compiled": 0.5}
    points = [growth.Point("cpu", 4, "zero1", **figures, at_least=x) for x in (False, True)]
    growth.draw(tmp_path / "it.svg", points, "a model")
    assert (tmp_path / "it.svg").read_text().count("<!-- &gt; -->") == 2


MISTAKES = {
    "--devices 4,x": "--devices 4,x: must be numbers of devices, such as 1,16,256.",
    "--devices 0": "--devices 0: must be numbers of devices",
    "--plot it.jpg": "--plot it.jpg: must end in .png or .svg.",
    "--plot nowhere/it.png": "--plot nowhere/it.png: cannot be written: No such file or directory.",
    "--target v5e:4x4": "--target v5e:4x4: must be one of cpu, h100",
    "--target cpu --devices 1 --sizes width=33,heads=16": "--width is 33 and must be a multiple",
    "--target cpu --devices 64": "cpu: 1 devices, 64 needed; set XLA_FLAGS=--xla_force",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_get_one_line(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth.inspect_cases, "inspect", lambda *_: pytest.fail("compiled"))
    done = CliRunner().invoke(devices_chart.app, arguments.split(), terminal_width=200)
    assert done.exit_code == 2, done.output
    assert f"devices_chart: {MISTAKES[arguments]}" in " ".join(done.output.split())


def test_each_number_is_of_the_first_target_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(target: aot.Target, count: int) -> tuple[Any, ...]:
        if count > {"v5e": 256, "v5p": 512}[target.name]:
            raise aot.UnavailableError("fewer")
        return (None,) * count

    monkeypatch.setattr(aot, "devices", devices)
    found = growth.targets(devices_chart.TARGETS, devices_chart.COUNTS)
    assert [n for _, n in found] == [*devices_chart.COUNTS]
    assert {target.name for target, n in found if n <= 256} == {"v5e"}
    assert found[-1] == (aot.TARGETS["v5p"], 512)
