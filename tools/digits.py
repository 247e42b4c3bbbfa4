"""scikit-learn's handwritten digits and two ways to train a classifier on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adamw_xla as ax

Params: TypeAlias = list[dict[str, jax.Array]]
SIDE, CLASSES = 8, 10
BATCH = 64


class Batch(NamedTuple):
    """Images [n, 8, 8] in 0..1 and their labels [n]."""

    images: Any
    labels: Any


def load(held_out: float = 0.2) -> tuple[Batch, Batch]:
    """The digits, cut into a training and a held-out part: the same cut each time."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)
    parts = train_test_split(
        images, data.target, test_size=held_out, random_state=0, stratify=data.target
    )
    return Batch(parts[0], parts[2]), Batch(parts[1], parts[3])


# ------------------------------------------------------------------------------- model


def init_mlp(key: jax.Array, widths: Sequence[int]) -> Params:
    """Weights of an MLP over the pixels, with He's scale."""
    sizes = list(itertools.pairwise([SIDE * SIDE, *widths, CLASSES]))
    return [
        {"w": jax.random.normal(k, (a, b)) * np.sqrt(2 / a), "b": jnp.zeros(b)}
        for k, (a, b) in zip(jax.random.split(key, len(sizes)), sizes, strict=True)
    ]


def logits(params: Params, images: jax.Array) -> jax.Array:
    """Scores [n, 10] of images [n, 8, 8]."""
    x = images.reshape(len(images), -1) - 0.3
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_of(params: Params, batch: Batch) -> jax.Array:
    """The mean cross entropy."""
    scores = logits(params, batch.images)
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels).mean()


@jax.jit
def evaluate(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy."""
    right = jnp.argmax(logits(params, batch.images), -1) == batch.labels
    return loss_of(params, batch), right.mean()


def shifted(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image moved by up to one pixel: more digits than there are."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    return jax.vmap(lambda image, at: lax.dynamic_slice(image, at, (SIDE, SIDE)))(padded, corners)


# -------------------------------------------------------------------------- one training


def make_config(steps: int) -> ax.AdamW:
    """A cosine schedule with warm-up, clipping by global norm and an average of weights."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=3e-3, warmup_steps=steps // 20, decay_steps=steps
    )
    return ax.AdamW(
        learning_rate=schedule,
        weight_decay=0.05,
        global_clipnorm=1.0,
        use_ema=True,
        ema_momentum=0.98,
    )


def make_train_step(config: ax.AdamW) -> Callable[..., Any]:
    """``(params, state, batch, key) -> (params, state, loss)``, jitted and donated."""

    @functools.partial(jax.jit, donate_argnames=("params", "state"))
    def train_step(
        params: Params, state: ax.AdamWState, batch: Batch, key: jax.Array
    ) -> tuple[Params, ax.AdamWState, jax.Array]:
        key = jax.random.fold_in(key, state.count)
        moved = batch._replace(images=shifted(key, batch.images))
        loss, grads = jax.value_and_grad(loss_of)(params, moved)
        params, state = ax.adamw_step(params, grads, state, config)
        return params, state, loss

    return train_step


def epochs(data: Batch, count: int, seed: int) -> Iterator[list[Batch]]:
    """All of the data in batches, shuffled anew for each epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        order = rng.permutation(len(data.images))
        cuts = range(0, len(order) - BATCH + 1, BATCH)
        yield [Batch(*(part[order[i : i + BATCH]] for part in data)) for i in cuts]


# ---------------------------------------------------------------- many trainings at once


@functools.partial(jax.jit, static_argnames="steps")
def train_population(
    learning_rates: jax.Array,
    weight_decays: jax.Array,
    train: Batch,
    held_out: Batch,
    key: jax.Array,
    *,
    steps: int,
) -> jax.Array:
    """Trains one MLP per pair of rates, all in one program; returns held-out losses [n].

    All start from the same weights and see the same batches, so they differ in nothing
    but the two rates.
    """
    init_key, data_key = jax.random.split(key)
    batches = jax.random.randint(data_key, (steps, BATCH), 0, len(train.labels))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 20, steps)
    config = ax.AdamW(global_clipnorm=1.0)

    def one(learning_rate: jax.Array, weight_decay: jax.Array) -> jax.Array:
        def step(carry: Any, picked: jax.Array) -> tuple[Any, None]:
            params, state = carry
            grads = jax.grad(loss_of)(params, Batch(*(part[picked] for part in train)))
            rate = learning_rate * shape(state.count)
            new = ax.adamw_step(
                params, grads, state, config, learning_rate=rate, weight_decay=weight_decay
            )
            return new, None

        params = init_mlp(init_key, [32])
        (params, _), _ = lax.scan(step, (params, ax.adamw_init(params, config)), batches)
        return loss_of(params, held_out)

    return jax.vmap(one)(learning_rates, weight_decays)
