"""Several processes train as one device does: started for real, with collectives on loopback."""

from __future__ import annotations

import functools
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np
import processes
import pytest

import adamw_xla as ax

PROGRAM = Path(__file__).with_name("train_process.py")
# What the sums of gradients, of norms and of logits come to depends on the order of their terms:
# some units in the last place of the largest, over fifty steps.
RTOL = 1e-6


@functools.cache
def on_one_device() -> list[Any]:
    """The leaves of params and state, by the same steps."""
    import train_process  # which imports what only these tests need

    params = train_process.initial_params()
    state = ax.adamw_init(params, train_process.CONFIG)
    step = jax.jit(train_process.train_step)
    for batch in train_process.batches():
        params, state = step(params, state, batch)
    return [np.asarray(x) for x in jax.tree.leaves((params, state))]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_they_train_what_one_device_trains(count: int, tmp_path: Path) -> None:
    processes.run(PROGRAM, "train", count, tmp_path)
    written = sorted(tmp_path.glob("*.npz"))
    assert len(written) == 4
    for mode in written:
        with np.load(mode) as file:
            found = [file[name] for name in file.files]
        for got, want in zip(found, on_one_device(), strict=True):
            off = np.max(np.abs(got - want)) / np.max(np.abs(want))
            assert off < RTOL, (mode.stem, got.shape, off)


@pytest.mark.slow
def test_they_save_and_restore_together(tmp_path: Path) -> None:
    processes.run(PROGRAM, "checkpoint", 2, tmp_path)


SAID = {
    "a number": "beta_2 is 0.999 on process 0 and 0.99 on process 1",
    "a dtype of a number": "weight_decay is 0.05 on process 0 and float32 0.05",
    "a clip": "clipnorm is None on process 0 and 1.0 on process 1; global_clipnorm is 0.25 on",
    "a schedule": "learning_rate is a schedule: 0.0, 0.0015",
    "a schedule, late": "learning_rate is a schedule: 0.0, 0.0015",
    "a choice": "nesterov is False on process 0 and True on process 1",
    "a mask": "weight_decay_mask is None on process 0 and [False, True, False, True] in",
    "a function for a mask": "weight_decay_mask is None on process 0 and a function on process 1",
}


@pytest.mark.slow
def test_each_is_told_where_they_disagree(tmp_path: Path) -> None:
    for text in processes.run(PROGRAM, "disagree", 2, tmp_path):
        lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        assert lines["the same"] == "agreed"
        for name, said in SAID.items():
            assert lines[name].startswith(f"check_same_config: the processes disagree: {said}")


@pytest.mark.slow
def test_one_that_fails_is_not_waited_for(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)process 1 ended with 1:.*this one fails"):
        processes.run(PROGRAM, "fail", 2, tmp_path)
    assert time.monotonic() - begin < processes.PATIENCE


def test_alone_there_is_nothing_to_disagree_on() -> None:
    ax.sharding.check_same_config(ax.AdamW())
