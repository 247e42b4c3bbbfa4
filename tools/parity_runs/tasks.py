"""Three small trainings on data that packages ship: what every arm has to learn."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, TypeAlias

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_lm

Params: TypeAlias = Any
Batches: TypeAlias = dict[str, np.ndarray[Any, Any]]

ROWS, WIDTH, ORDERS = 8192, 24, (2, 3, 4)
LANGUAGE = train_lm.Model(layers=2, width=32, heads=4, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data, and how it is trained.

    Rates from random params are a half to a seventh of the best one (n-grams: about the best): at
    the best a step that is a little too short or too long is not seen, and trainings part by more
    than 5 seeds can tell.

    Margins were set before the first of these tables, by float32 alone, with seeds 100 to 104: the
    larger of what a step shorter by 5 % loses (nobody finds the rate to 5 %), mean of both betas,
    and of a tenth of the deviation over seeds (which nobody repeats a training for):

        task        beginning    5 % shorter   a tenth of the deviation    margin
        digits      random       0.0074        0.0023                      0.007
        digits      fine-tuning  0.0007        0.0015                      0.0015
        characters  random       0.0167        0.0051                      0.016
        characters  fine-tuning  0.0026        0.0051                      0.005
        n-grams     random       0.0025        0.0006                      0.0025
        n-grams     fine-tuning  0.0008        0.0010                      0.001

    Attributes:
      name: what the tables call it.
      init: float32 params from a key.
      loss: mean cross entropy in nats of float32 or bfloat16 params on one batch.
      batches: of a seed and a number of steps: arrays whose first dimension is the step.
      steps: of a training.
      rates: the learning rate from random params, where a longer step gains little, and one as in
        fine-tuning, from params that were trained at the first.
      margins: the nats that an arm may lose at either rate and count as no worse.
    """

    name: str
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Any], jax.Array]
    batches: Callable[[int, int], Batches]
    steps: int
    rates: tuple[float, float]
    margins: tuple[float, float]


# ------------------------------------------------------------------------------- digits


@functools.cache
def _digits() -> digits.Batch:
    return jax.tree.map(np.asarray, digits.load()[0])


def digits_batches(seed: int, steps: int) -> Batches:
    """Which digits, int32[steps, 64], and the seed of how they are moved, uint32[steps]."""
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, len(_digits().labels), (steps, digits.BATCH), np.int32)
    return {"picked": picked, "moved": rng.integers(0, 2**32, steps, np.uint32)}


def digits_loss(params: Params, batch: Any) -> jax.Array:
    """Of digits that are moved by up to a pixel, so that they are not soon known by heart."""
    data = _digits()
    images = digits.shifted(
        jax.random.key(batch["moved"]), jnp.take(data.images, batch["picked"], 0)
    )
    labels = jnp.take(data.labels, batch["picked"], 0)
    return digits.loss_of(_float32(params), digits.Batch(images, labels))


# ---------------------------------------------------------------------------- characters


def characters_batches(seed: int, steps: int, batch: int = 8, context: int = 32) -> Batches:
    """Windows of text, int32[steps, batch, context + 1]."""
    text, _ = train_lm.load_text()
    starts = np.random.default_rng(seed).integers(0, len(text) - context, (steps, batch, 1))
    return {"tokens": text[starts + np.arange(context + 1)].astype(np.int32)}


def characters_loss(params: Params, batch: Any) -> jax.Array:
    """Of the byte after each, under a transformer."""
    return train_lm.loss_of(params, batch["tokens"], LANGUAGE)


# ------------------------------------------------------------------------------- n-grams


def ngrams_init(key: jax.Array) -> Params:
    """A row for each hash of the last 2, 3 or 4 bytes, and a linear layer on their sum."""
    rows, head = jax.random.split(key)
    return {
        "rows": 0.3 * jax.random.normal(rows, (ROWS, WIDTH)),
        "head": WIDTH**-0.5 * jax.random.normal(head, (WIDTH, train_lm.VOCABULARY)),
        "bias": jnp.zeros(train_lm.VOCABULARY),
    }


def ngrams_batches(seed: int, steps: int, batch: int = 128) -> Batches:
    """Rows int32[steps, batch, 3] of what stands before a byte, and that byte."""
    text, _ = train_lm.load_text()
    longest = max(ORDERS)
    at = np.random.default_rng(seed).integers(longest, len(text), (steps, batch))
    before = [text[at - back - 1].astype(np.uint32) for back in range(longest)]
    rows = []
    for order in ORDERS:
        mixed = np.full(at.shape, order, np.uint32)
        for byte in before[:order]:
            mixed = (mixed ^ byte) * np.uint32(0x9E3779B1)
            mixed ^= mixed >> np.uint32(15)
        rows.append(mixed % ROWS)
    return {"rows": np.stack(rows, -1).astype(np.int32), "byte": text[at].astype(np.int32)}


def ngrams_loss(params: Params, batch: Any) -> jax.Array:
    """Of a byte after those before it; a step has gradients for few of the rows."""
    params = _float32(params)
    scores = params["rows"][batch["rows"]].sum(1) @ params["head"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["byte"]).mean()


def _float32(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


TASKS = {
    task.name: task
    for task in (
        Task(
            "digits",
            functools.partial(digits.init_mlp, widths=[16]),
            digits_loss,
            digits_batches,
            steps=2000,
            rates=(8e-3, 1e-3),
            margins=(0.007, 0.0015),
        ),
        Task(
            "characters",
            functools.partial(train_lm.init_params, model=LANGUAGE),
            characters_loss,
            characters_batches,
            steps=500,
            rates=(2e-3, 2e-4),
            margins=(0.016, 0.005),
        ),
        Task(
            "n-grams",
            ngrams_init,
            ngrams_loss,
            ngrams_batches,
            steps=600,
            rates=(3e-2, 1e-3),
            margins=(0.0025, 0.001),
        ),
    )
}
"""By name."""
