"""All trainings of the table, one program for each task and arm, and what is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
import operator
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity_runs.arms import CONTROL, LONGER, Arm
from parity_runs.judge import Array, Finding, equal_step, finding, overall, tail_means
from parity_runs.population import trained
from parity_runs.tasks import Task

BETAS = (0.999, 0.95)
BEGINNINGS = ("from random params", "fine-tuning")
PRETRAINING_SEED = 1_000_000
"""Added to the seed of batches: pretraining sees others."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained: so many seeds, and for each task a share of its steps."""

    seeds: int
    share: float = 1.0

    def steps(self, task: Task) -> int:
        """Of each training, and of pretraining."""
        return max(round(self.share * task.steps), 20)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Losses float32[seeds, beginnings, betas, steps] of one arm, and seconds with compilation."""

    losses: Array
    seconds: float


def pretrained(task: Task, size: Size, tick: Callable[[int], None]) -> list[list[Any]]:
    """For each seed where its trainings begin: random params, and params that float32 has trained.

    Rounded to bfloat16's numbers, so that arms with bfloat16 params begin at the same.
    """
    seeds = range(size.seeds)
    first = jax.jit(jax.vmap(task.init))(jnp.stack([jax.random.key(seed) for seed in seeds]))
    batches = [task.batches(PRETRAINING_SEED + seed, size.steps(task)) for seed in seeds]
    rates, betas = np.full(size.seeds, task.rates[0]), np.full(size.seeds, BETAS[0])
    last, _ = trained(first, batches, rates, betas, task=task, arm=CONTROL, tick=tick)
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), [first, last])
    return [[jax.tree.map(operator.itemgetter(seed), x) for x in rounded] for seed in seeds]


def train(
    task: Task, arms: Sequence[Arm], size: Size, tick: Callable[[str, int], None]
) -> dict[str, Trained]:
    """Trains all replicas of each arm; ``tick`` is told the arm and the steps it has made."""
    params = pretrained(task, size, lambda steps: tick("pretraining", steps))
    batches = [task.batches(seed, size.steps(task)) for seed in range(size.seeds)]
    replicas = list(itertools.product(range(size.seeds), range(len(BEGINNINGS)), BETAS))
    begin = jax.tree.map(lambda *p: jnp.stack(p), *[params[s][k] for s, k, _ in replicas])
    found = {}
    for arm in arms:
        since = time.perf_counter()
        _, losses = trained(
            begin,
            [batches[seed] for seed, _, _ in replicas],
            [task.rates[k] for _, k, _ in replicas],
            [beta_2 for _, _, beta_2 in replicas],
            task=task,
            arm=arm,
            tick=functools.partial(tick, arm.name),
        )
        shape = (size.seeds, len(BEGINNINGS), len(BETAS), -1)
        found[arm.name] = Trained(losses.reshape(shape), time.perf_counter() - since)
    return found


@dataclasses.dataclass(frozen=True)
class Cell:
    """One arm in one cell of the table.

    Attributes:
      task: its name.
      beginning: an index into ``BEGINNINGS``.
      beta_2: the setting.
      losses: [seeds], over the last tenth of the steps.
      against: float32 with the same rate.
      against_longer: float32 with a longer step, if that was trained.
      step: float32's factor on the rate at which it would have this loss.
    """

    task: str
    beginning: int
    beta_2: float
    losses: list[float]
    against: Finding
    against_longer: Finding | None
    step: float | None


def cells(task: Task, found: dict[str, Trained]) -> dict[str, list[Cell]]:
    """Each arm's four cells of a task."""
    means = {name: tail_means(x.losses) for name, x in found.items()}
    made: dict[str, list[Cell]] = {name: [] for name in found}
    for k, (j, beta_2) in itertools.product(range(len(BEGINNINGS)), enumerate(BETAS)):
        margin, control = task.margins[k], means[CONTROL.name][:, k, j]
        longer = means[LONGER.name][:, k, j] if LONGER.name in means else None
        for name, of_arm in means.items():
            mine = of_arm[:, k, j]
            against = finding(mine, control, margin)
            by_longer = None if longer is None else finding(mine, longer, margin)
            step = None
            if longer is not None:
                gained_by_it = float((longer - control).mean())
                step = equal_step(against.mean, gained_by_it, LONGER.stretch)
            made[name].append(Cell(task.name, k, beta_2, mine.tolist(), against, by_longer, step))
    return made


def verdict(of_arm: Sequence[Cell]) -> str:
    """Over all cells of one arm."""
    return overall([cell.against.verdict for cell in of_arm])
