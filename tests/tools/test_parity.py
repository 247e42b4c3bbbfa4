"""``tools/parity.py``: its judge can say "worse", its peers are the published ones, and it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
from parity_runs import arms, judge, peers, stress, tasks
import pytest
from typer.testing import CliRunner

from adamw_xla_lowering.formats import word

T_4 = 2.131846786
"""The 95 % quantile of Student's t with 4 degrees of freedom, from a printed table."""


def run(*arguments: object) -> Any:
    return CliRunner().invoke(parity.app, list(map(str, arguments)))


# -------------------------------------------------------------------------------- the judge


@pytest.mark.parametrize(
    ("mean", "margin", "verdict"),
    [
        (0.0, 1.5075, "no worse"),  # T_4 * sqrt(2.5 / 5) = 1.5074
        (0.0, 1.5074, "unclear"),
        (3.0, 1.4926, "unclear"),
        (3.0, 1.4925, "worse"),
        (-9.0, 0.0, "no worse"),
    ],
)
def test_limits_are_students(mean: float, margin: float, verdict: str) -> None:
    control = np.array([5.0, 7.0, 1.0, 2.0, 3.0])
    differences = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) + mean
    found = judge.finding(control + differences, control, margin)
    assert found.verdict == verdict
    np.testing.assert_allclose(found.mean, mean, atol=1e-12)
    reach = T_4 * np.sqrt(2.5 / 5)
    np.testing.assert_allclose([found.low, found.high], [mean - reach, mean + reach], rtol=1e-8)


def test_what_is_not_finite_is_worse() -> None:
    control = np.zeros(5)
    assert judge.finding(np.array([0, 0, np.nan, 0, 0.0]), control, 1e9).verdict == "worse"


def test_one_cell_is_enough_to_be_worse_and_all_are_needed_to_be_no_worse() -> None:
    assert judge.overall(["no worse", "worse", "unclear"]) == "worse"
    assert judge.overall(["no worse", "unclear"]) == "unclear"
    assert judge.overall(["no worse"] * 3) == "no worse"


def test_only_the_last_tenth_counts() -> None:
    losses = np.concatenate([np.full((2, 90), 100.0), np.ones((2, 10))], 1).astype(np.float32)
    np.testing.assert_array_equal(judge.tail_means(losses), [1, 1])


def test_a_gain_is_a_longer_step() -> None:
    assert judge.equal_step(-0.008, -0.01, 1.05) == pytest.approx(1.04)
    assert judge.equal_step(-0.008, 0.001, 1.05) is None


# -------------------------------------------------------------------------------- the peers


def published_code(signed: bool) -> np.ndarray[Any, Any]:
    """Dettmers' dynamic code, by parts of each decade as his library lists them."""
    found = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        means = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        found += [*means, *(-means if signed else [])]
    return np.sort(found)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_code_is_the_published_one(signed: bool) -> None:
    code = published_code(signed)
    assert len(code) == 256
    rng = np.random.default_rng(0)
    x = np.concatenate([code, rng.uniform(-1, 1, 2000), 10 ** rng.uniform(-9, 0, 2000)])
    x = np.clip(x if signed else np.abs(x), -1, 1).astype(np.float32)
    found = np.asarray(peers.dynamic(jnp.asarray(x), bits=int(not signed)), np.float64)
    assert set(np.abs(found[: len(code)] - code) < 1e-6) == {True}
    distance = np.abs(x[:, None] - code).min(1)
    # 1.0's nearest of the negative side is the last mean: -1 is not in the code.
    is_listed = (x >= code[0]) | (not signed)
    np.testing.assert_allclose(np.abs(x - found)[is_listed], distance[is_listed], atol=1e-7)


def test_blocks_have_scales_of_their_own() -> None:
    x = jnp.concatenate([jnp.full(256, 3e-7), jnp.full(256, 5e9), jnp.zeros(256), jnp.ones(1)])
    found = jax.jit(peers.blockwise, static_argnums=1)(x, 1)
    np.testing.assert_array_equal(found, x)


def test_all_arms_make_one_step_alike() -> None:
    """A first step is as long as the rate, however m and v are then held."""
    peers_alone = [arm for arm in arms.ARMS.values() if arm.kind == "peer"]
    for arm in (arms.LONGER, *peers_alone):
        init, step = arm.optimizer(jnp.float32(0.75))
        params = {"w": jnp.linspace(-1.0, 1.0, 300).astype(arm.dtype)}
        grads, rate = {"w": jnp.linspace(1.0, 2.0, 300).astype(arm.dtype)}, 0.5 * arm.stretch
        found = jax.jit(step)(params, grads, init(params), jnp.float32(rate))[0]["w"]
        p = np.asarray(params["w"], np.float64)
        expected = p - rate * (1 + peers.WEIGHT_DECAY * p)
        # bfloat16's spacing up to 2; optax' float32 1 - 0.9**1 is off by 7e-6 of itself.
        bound = 2**-7 if arm.dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=bound)


def test_bfloat16_v_stalls_to_nearest() -> None:
    """At 0.999 a v of half the squared gradient grows no more, and float32's does."""
    init, step = peers.bfloat16_state(jnp.float32(0.999))
    grads = jnp.linspace(1.0, 2.0, 300)

    def body(carry: Any, _: None) -> tuple[Any, None]:
        return step(carry[0], grads, carry[1], jnp.float32(0.01)), None

    (_, (_, _, v)), _ = jax.lax.scan(body, (grads, init(grads)), length=1500)
    assert v.dtype == jnp.bfloat16
    assert (np.asarray(v, np.float32) / grads**2).max() < 0.52 < 1 - 0.999**1500


# -------------------------------------------------------------------------------- the tasks


def test_most_rows_have_no_gradient() -> None:
    task = tasks.TASKS["n-grams"]
    batch = jax.tree.map(lambda x: x[0], task.batches(0, 1))
    rows = jax.jit(jax.grad(task.loss))(jax.jit(task.init)(jax.random.key(0)), batch)["rows"]
    touched = np.unique(batch["rows"])
    assert (np.flatnonzero(np.abs(np.asarray(rows)).sum(1)) == touched).all()
    assert len(touched) < tasks.ROWS / 20


# ------------------------------------------------------------------------------- the command


def test_it_runs_and_finds_what_is_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = arms.Arm("still", "ours", arms.FLOAT32, state=8, stretch=0.0)
    monkeypatch.setitem(arms.ARMS, "still", still)
    done = run(
        "--quick", "--arm", "still", "--arm", "word", "--arm", arms.LONGER.name, "--out", tmp_path
    )
    assert done.exit_code == 1, (done.output, done.exception)
    assert done.stderr == "parity: worse than float32: still\n"
    whole = json.loads((tmp_path / "parity.json").read_text())
    assert whole["verdicts"]["still"] == "worse"
    assert whole["verdicts"]["word"] != "worse"
    cells = whole["cells"]
    assert {len(x) for x in cells.values()} == {4}
    assert cells["float32"][0]["against"]["mean"] == 0
    assert cells["word"][0]["losses"] != cells["float32"][0]["losses"]
    assert len(whole["curves"]["digits"]["word"]) == 2
    for name in ("losses", "differences"):
        assert "<svg" in (tmp_path / f"parity_{name}.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task digit", "--task: 'digit' is none of digits, characters, n-grams"),
        ("--arm words", "--arm: 'words' is none of float32, float32, rate x 1.05, word, "),
        ("--stress --task digits", "--stress takes no --task, --arm or --seeds"),
        ("--out file", "cannot write to file: File exists"),
    ],
)
def test_refusals(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = run(*arguments.split())
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"parity: {message}")


# -------------------------------------------------------------------------------- the stress


@pytest.mark.parametrize("part", [x for x in stress.PARTS if x != "a long training"])
def test_the_word_under_stress(part: str) -> None:
    checks = stress.PARTS[part](quick=True)
    assert len(checks) >= 4
    assert [check for check in checks if not check.passed] == []


def test_words_to_nearest_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    half = (1 << 20) | (1 << 31)  # of either code's last bit
    monkeypatch.setenv("ADAMW_XLA_IMPLEMENTATION", "xla")  # a kernel has numbers of its own
    monkeypatch.setattr(word, "random_bits", lambda ops, *_: ops.integer(half))
    monkeypatch.setattr(stress, "EPSILON", 1.1e-8)  # another config: what is compiled is not it
    parts = stress.PARTS["runs of zeros"], stress.PARTS["sudden changes of scale"]
    failed = [check.name for part in parts for check in part(True) if not check.passed]
    assert "zeros after gradients: mean v / float32's" in failed
    assert "scale 0.0001, stage 3: mean v / float32's" in failed
