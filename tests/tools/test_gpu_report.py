"""``tools/gpu_report.py``: limits, crashes, what is written when. No GPU is used."""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import subprocess
import sys
import threading
import time
from typing import Any

from benches import gpu_peers, jitted, looped_peers
import gpu_report
from gpu_reporting import build, child, plan, process, steps, verdict
from gpu_reporting.plan import PARTS, Part
from gpu_reporting.process import Ended
from gpu_reporting.record import Record
import jax
from places import python_path
import pytest

from adamw_xla_lowering.gpu import merge

ITEM = """
import json, sys, time
items = sys.argv[sys.argv.index("--items") + 1]
def write(**item):
    with open(items, "a") as file:
        file.write(json.dumps(item) + "\\n")
"""


def part(name: str, code: str, share: float = 1.0) -> Part:
    return Part(name, "a test", share, ["-c", ITEM + code])


def run(parts: list[Part], out: Path, minutes: float, **more: Any) -> dict[str, Any]:
    """The JSON of a report of these parts."""
    scratch = out / "scratch"
    scratch.mkdir()
    record = Record(out, "cpu", minutes)
    gpu_report.run_parts(parts, record, scratch, say=lambda _: None, **more)
    return json.loads((out / "report.json").read_text())["parts"]


def test_a_part_that_crashes_or_hangs_is_recorded_and_the_next_has_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.3)
    monkeypatch.setattr(gpu_report, "END", 0.0)
    hang = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
write(child=child.pid)
print("about to hang", flush=True)
time.sleep(600)
"""
    look = f"write(seen=json.load(open({str(tmp_path / 'report.json')!r}))['parts'])"
    parts = [
        part("crash", "write(first=1); print('oh dear'); raise ValueError('no GPU today')", 4),
        part("abort", "import os; write(first=1); os.abort()", 4),
        part("hang", hang, 1),
        part("look", look, 3),
    ]
    began = time.monotonic()
    found = run(parts, tmp_path, 8 / 60)
    assert time.monotonic() - began < 9
    assert [found[p.name]["status"] for p in parts] == ["failed", "failed", "timed out", "done"]
    assert found["crash"]["items"] == [{"first": 1}]
    assert found["crash"]["tail"][-1] == "ValueError: no GPU today"
    assert "oh dear" in found["crash"]["tail"]
    assert found["abort"]["tail"][-1] == "(killed by SIGABRT)"
    assert found["hang"]["tail"] == ["about to hang"]
    assert not _runs(found["hang"]["items"][0]["child"])
    (seen,) = (item["seen"] for item in found["look"]["items"])
    assert seen["look"]["status"] == "running"
    assert seen["hang"] == found["hang"]
    assert "oh dear" in (tmp_path / "report.log").read_text()
    assert "ValueError: no GPU today" in (tmp_path / "report.md").read_text()


def _runs(pid: int) -> bool:
    """Whether there is such a process; one that only waits to be reaped does not run."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_items_are_written_while_a_part_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "POLL", 0.02)
    wait = f"""
write(case="first")
end = time.monotonic() + 8
while time.monotonic() < end:
    part = json.load(open({str(tmp_path / "report.json")!r}))["parts"]["wait"]
    if part["items"]:
        write(seen=part)
        break
    time.sleep(0.02)
"""
    found = run([part("wait", wait)], tmp_path, 1.0)
    (_, item) = found["wait"]["items"]
    assert item["seen"]["status"] == "running"
    assert item["seen"]["items"] == [{"case": "first"}]


class Clock:
    """Time that passes only where a part spends it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def spending(self, seconds: dict[str, float]) -> Callable[..., Ended]:
        def run(command: list[str], limit: float, log: Path, *_: Any) -> Ended:
            spent = min(seconds[log.stem], limit)
            self.now += spent
            late = spent < seconds[log.stem]
            return Ended("timed out" if late else "done", spent, [])

        return run


def test_time_is_shared_and_what_one_leaves_the_next_have(tmp_path: Path) -> None:
    clock = Clock()
    parts = [part("quick", "", 1), part("slow", "", 1), part("last", "", 2)]
    spending = clock.spending({"quick": 6, "slow": 1e9, "last": 1e9})
    found = run(parts, tmp_path, (120 + gpu_report.END) / 60, run=spending, clock=clock)
    assert [found[p.name]["limit"] for p in parts] == [30, 38, 76]
    assert clock.now == 1120
    assert [found[p.name]["status"] for p in parts] == ["done", "timed out", "timed out"]


def test_no_part_is_begun_without_time(tmp_path: Path) -> None:
    clock = Clock()
    found = run([part("late", "")], tmp_path, gpu_report.END / 60, run=None, clock=clock)
    assert found["late"] == {"status": "skipped", "why": "no time was left", "items": []}


def test_all_parts_fit_into_nine_minutes_whatever_they_do(tmp_path: Path) -> None:
    clock = Clock()
    record = Record(tmp_path, "gpu", 9.0)
    spending = clock.spending(dict.fromkeys((p.name for p in PARTS), 1e9))
    gpu_report.run_parts(PARTS, record, tmp_path, run=spending, clock=clock, say=lambda _: None)
    assert [p["status"] for p in record.parts.values()] == ["timed out"] * len(PARTS)
    assert clock.now - 1000 == pytest.approx(9 * 60 - gpu_report.END)


def test_a_kernel_that_kills_its_process_is_left_out_of_the_times(tmp_path: Path) -> None:
    commands: dict[str, list[str]] = {}

    def run(command: list[str], limit: float, log: Path, *_: Any) -> Ended:
        commands[log.stem] = command
        return Ended("failed" if log.stem == "correct-native" else "done", 1.0, [])

    record = Record(tmp_path, "gpu", 9.0)
    gpu_report.run_parts(PARTS, record, tmp_path, run=run, say=lambda _: None)
    without = [name for name, command in commands.items() if "--without" in command]
    assert without == ["steps-looped", "sweep", "steps", "steps-no-graphs"]
    left = [plan.peers.keys() for plan in steps.plans("gpu", "sweep", ["native"])]
    assert not [name for names in left for name in names if name.startswith("native")]


def test_without_a_gpu_nothing_else_is_tried(tmp_path: Path) -> None:
    def run(command: list[str], limit: float, log: Path, *_: Any) -> Ended:
        return Ended("failed" if log.stem == "machine" else "done", 1.0, [])

    record = Record(tmp_path, "gpu", 9.0)
    gpu_report.run_parts(PARTS, record, tmp_path, run=run, say=lambda _: None)
    assert {p["why"] for p in record.parts.values() if p["status"] == "skipped"} == {
        "JAX finds no GPU"
    }
    assert not gpu_report.all_is_well(record.as_json())


def test_a_processor_is_not_taken_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the platforms "cuda,cpu" JAX takes the second where the first is missing."""
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    part = child.Child("gpu", 0.0, Path("items"), argparse.Namespace())
    with pytest.raises(SystemExit, match="JAX finds no GPU"):
        child.use_device(part)


def test_what_is_ended_from_outside_is_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_parts(parts: list[Part], record: Record, scratch: Path) -> None:
        record.begin("steps", 10.0)
        raise SystemExit(143)

    monkeypatch.setattr(gpu_report, "run_parts", run_parts)
    with pytest.raises(SystemExit):
        gpu_report.main(["--out", str(tmp_path)])
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert parts["steps"]["status"] == "interrupted"


def test_command_buffers_are_off_where_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_ftz=false")
    flags = {p.name: gpu_report.environment(p, Path("/no"), "gpu")["XLA_FLAGS"] for p in PARTS}
    off = f"--xla_gpu_ftz=false {plan.GRAPHS_OFF}"
    assert flags.pop("steps-no-graphs") == off
    assert set(flags.values()) == {"--xla_gpu_ftz=false"}


BLOCKED = ("pytest", "hypothesis", "rich", "typer", "keras", "matplotlib", "torch", "flax")


def test_jax_and_numpy_are_all_that_it_needs_and_xla_takes_its_flag() -> None:
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import checks.on_device, gpu_report, jax
from benches import gpu_peers, step_cases, step_peers
from gpu_reporting import build, child, correct, machine, steps
print(jax.devices()[0].platform)
"""
    environment = os.environ | {"PYTHONPATH": python_path(), "XLA_FLAGS": plan.GRAPHS_OFF}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "cpu", done.stderr


def test_the_machine_is_named_whatever_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part as it is, from the command line to the page."""
    arguments = ["--device", "cpu", "--only", "machine", "--minutes", "2", "--out", str(tmp_path)]
    assert gpu_report.main(arguments) == 0
    assert "# adamw_xla on cpu\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.log"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be positive"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--out", "/proc/nowhere"], "cannot write into /proc/nowhere"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_report.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------- the build


def test_the_first_build_that_works_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(site: Path, seconds: float) -> None:
        site.mkdir()
        (site / "half").touch()
        raise OSError("no pip here")

    monkeypatch.setitem(build.WAYS, "pip", broken)
    monkeypatch.setitem(build.WAYS, "cmake", broken)
    site = tmp_path / "site"
    way, problems = build.build(site, lambda: 1.0)
    assert (way, list(problems)) == ("copies", ["pip", "cmake"])
    assert problems["pip"] == "OSError: no pip here"
    assert {path.name for path in site.iterdir()} == {"adamw_xla", "adamw_xla_lowering"}
    assert not list(site.rglob("*.so"))


# ------------------------------------------------------------------------------- the times


def test_a_peer_that_fails_is_left_out() -> None:
    def broken(*case: Any) -> Any:
        raise RuntimeError("out of memory")

    peers = {"xla": gpu_peers.PEERS["xla"], "optax": broken}
    item = steps.measure(steps.Plan("16x32k", "float32", False, peers), 0)
    assert item["failed"] == {"optax": "RuntimeError: out of memory"}
    assert list(item["seconds"]) == ["xla"]
    assert len(item["seconds"]["xla"]) == item["rounds"] >= 5


def test_a_peer_that_is_compiled_too_late_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    peers = dict(gpu_peers.PEERS)
    monkeypatch.setattr(gpu_peers.Copy, "prepare", lambda _: stop.wait(20))
    plan = steps.Plan("16x32k", "float32", False, {k: peers[k] for k in ("bandwidth", "xla")})
    item = steps.measure(plan, 0, time.monotonic() + 2.0, 0.1)
    stop.set()
    assert item["failed"] == {"bandwidth": "TimeoutError: was not compiled in time"}
    assert list(item["seconds"]) == ["xla"]


def test_steps_on_the_device_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are timed, of params that move, and each as long as one alone."""
    built = looped_peers.PEERS["xla"]([(4, 8)], "float32", [jax.numpy.ones((4, 8))], True)
    for steps_made in (0, 1, 17):
        before = int(built.carry.value[1].count)
        built.run(steps_made)
        made = int(built.carry.value[1].count) - before
        assert made == -(-steps_made // jitted.LOOP) * jitted.LOOP
    assert built.state_bytes == 2 * 4 * 32 + 4
    took = iter([0.0, 1.0, 4.0])
    monkeypatch.setattr(jitted.time, "perf_counter", lambda: next(took))
    assert built.step_seconds(jitted.LOOP) == (3.0 - 1.0) / jitted.LOOP


def test_steps_on_the_device_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "READING", 0.002)
    peers = {k: looped_peers.PEERS[k] for k in ("xla", "bandwidth")}
    item = steps.measure(steps.Plan("16x32k", "bfloat16", False, peers, "looped"), 0, timing=0.01)
    assert item["state_bytes"] == {"xla": 16 * (1 << 15) * 8 + 4}
    assert item["seconds"].keys() == peers.keys()
    assert all(len(x) == item["rounds"] == 5 for x in item["seconds"].values())


def test_a_case_that_does_not_fit_is_skipped() -> None:
    item = steps.measure(steps.Plan("1x256M", "float32", False, gpu_peers.PEERS), 24 * 10**9)
    assert item["skipped"] == "needs 32 GB, and JAX may have 24 GB"


def test_cases_that_have_no_time_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = tmp_path / "items"

    def start(parser: argparse.ArgumentParser) -> child.Child:
        return child.Child("cpu", 0.0, items, parser.parse_args([]))

    monkeypatch.setattr(child, "start", start)
    monkeypatch.setattr(steps, "measure", lambda *_: pytest.fail("measured"))
    steps.main()
    _, *cases = child.read_items(items)
    assert all(case["skipped"].startswith("no time was left: it takes 5 s") for case in cases)
    assert len(cases) == 4
    assert cases[3]["case"] == "16x32k bfloat16 clip"


def test_nobody_is_waited_for_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], float]] = []

    def measure(plan: steps.Plan, memory: int, until: float, timing: float) -> dict[str, Any]:
        seen.append((list(plan.peers), until - time.monotonic()))
        return {
            "failed": {"optax": "TimeoutError: was not compiled in time", "xla": "ValueError: a"}
        }

    def start(parser: argparse.ArgumentParser) -> child.Child:
        return child.Child("cpu", time.monotonic() + 60, tmp_path / "items", parser.parse_args([]))

    monkeypatch.setattr(child, "start", start)
    monkeypatch.setattr(steps, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["steps"])
    steps.main()
    first, *others = [peers for peers, _ in seen]
    assert others == [[name for name in first if name != "optax"]] * 3
    assert {"optax", "xla"} <= {*first}
    assert all(0 < left <= steps.PATIENCE * steps.OTHERS for _, left in seen)


def test_the_plans_are_of_what_there_is() -> None:
    swept = list(steps.plans("gpu", "sweep", []))
    assert {name for p in swept for name in p.peers} >= {"native", "native 512/2", "by leaf"}
    for form, count in (("calls", 5 * 2 * 2), ("looped", 5 * 2)):
        found = list(steps.plans("gpu", form, []))
        assert len({(p.tree, p.dtype, p.clip) for p in found}) == count
        assert list(found[0].peers)[:3] == ["native", "xla", "optax"]  # compiled first
    assert verdict.CURRENT_LAUNCH in gpu_peers.SWEEP
    assert f"merged 2^{merge.MAX_MERGED_ELEMENTS.bit_length() - 1}" == verdict.CURRENT_MERGE
