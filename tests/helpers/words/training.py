"""A classifier of digits, trained with words in NumPy: gradients and params as they really come."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from .scales import Array
from .steps import Loaded, Stored, loaded, stored
from .word import legal

RATE, DECAY, BETA_1, BETA_2, EPSILON = 1e-3, 1e-2, 0.9, 0.999, 1e-8
PIXELS, HIDDEN, CLASSES, BATCH = 64, 32, 10, 16


class Trained(NamedTuple):
    """What each step was given, float32[steps, elements], and the losses, [steps]."""

    grads: Array
    params: Array
    losses: Array


@functools.cache
def train(steps: int) -> Trained:
    """On the digits that scikit-learn ships; two layers.

    Batches are small: most steps find pixels that none of their images has, and hidden units that
    none reaches, whose weights' gradients are exactly 0.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = (data.data / 16).astype(np.float32), np.eye(CLASSES)[data.target]
    rng = np.random.default_rng(0)
    layers = [(PIXELS, HIDDEN), (HIDDEN, CLASSES)]
    params = np.concatenate([rng.normal(0, a**-0.5, a * b) for a, b in layers]).astype(np.float32)
    leaf = Stored(params, np.full(params.shape, legal()[0, 0, 0]))
    trained = Trained(*np.empty((2, steps, params.size), np.float32), np.empty(steps))
    for i in range(steps):
        batch = rng.integers(0, len(images), BATCH)
        trained.losses[i], g = _gradient(leaf.params, images[batch], labels[batch])
        trained.params[i], trained.grads[i] = leaf.params, g
        leaf = stored(_adamw(loaded(leaf), g, i + 1), g, leaf.params, i + 1)
    return trained


def _gradient(params: Array, x: Array, y: Array) -> tuple[float, Array]:
    cut = PIXELS * HIDDEN
    first, second = params[:cut].reshape(PIXELS, HIDDEN), params[cut:].reshape(HIDDEN, CLASSES)
    hidden = np.maximum(x @ first, 0)
    logits = hidden @ second
    log_sum = np.log(np.exp(logits).sum(-1, keepdims=True))
    error = (np.exp(logits - log_sum) - y) / len(x)
    back = (error @ second.T) * (hidden > 0)
    grads = np.concatenate([(x.T @ back).ravel(), (hidden.T @ error).ravel()])
    return float(np.sum((log_sum - logits) * y) / len(x)), grads.astype(np.float32)


def _adamw(old: Loaded, g: Array, t: int) -> Loaded:
    m = (BETA_1 * old.m + (1 - BETA_1) * g).astype(np.float32)
    v = (BETA_2 * old.v + (1 - BETA_2) * g * g).astype(np.float32)
    root = np.sqrt(v / (1 - BETA_2**t)) + EPSILON
    step = m / (1 - BETA_1**t) / root + DECAY * old.params
    return Loaded((old.params - RATE * step).astype(np.float32), m, v)
