"""What one update stores, for the numbers that it computed."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from .masters import join, round_to_bfloat16, split
from .noise import random_bits
from .scales import Array
from .word import decode, encode


class Stored(NamedTuple):
    """A leaf after a step; ``remainders`` belong to a split master, else None."""

    params: Array
    words: Array
    remainders: Array | None = None


class Loaded(NamedTuple):
    """A leaf as its step's arithmetic sees it, float32."""

    params: Array
    m: Array
    v: Array


def loaded(leaf: Stored) -> Loaded:
    """What was stored, as float32."""
    whole = leaf.remainders is None
    params = leaf.params.astype(np.float32) if whole else join(leaf.params, leaf.remainders)
    return Loaded(params, *decode(leaf.words))


def stored(
    new: Loaded,
    grads: Array,
    old_params: Array,
    number: float,
    params: Literal["float32", "nearest", "stochastic", "split"] = "float32",
) -> Stored:
    """A leaf's step, after its arithmetic, to the bit.

    Args:
      new: the step's float32 results.
      grads: of the step, as the caller gave them.
      old_params: those that the step began with; masters where there are any.
      number: of the update, from 1.
      params: what becomes of ``new.params``.
    """
    r = random_bits(grads, old_params, number)
    words = encode(new.m, new.v, r)
    remainders: Any = None
    kept = new.params
    if params == "nearest":
        kept = kept.astype(ml_dtypes.bfloat16)
    elif params == "stochastic":
        kept = round_to_bfloat16(kept, r)
    elif params == "split":
        kept, remainders = split(kept)
    return Stored(kept, words, remainders)
