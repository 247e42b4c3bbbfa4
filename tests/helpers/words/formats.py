"""Who makes words: the oracle, and the update by each implementation that can, its public way."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import numpy as np
from update_contract.implementations import IMPLEMENTATIONS, Implementation

from adamw_xla_lowering import NUM_SLOTS, Slot, unpack

from . import noise, word
from .scales import Array

AT_ONCE = 2**13
"""Elements of one call, for each of which the row of ``hyper`` is another."""


class Format(Protocol):
    """Makes words of float32 m and v and of given random words, and the other way."""

    def encode(self, m: Any, v: Any, r: Any) -> Array:
        """Words, of the operands' common shape."""

    def decode(self, words: Array) -> tuple[Array, Array]:
        """m and v, float32."""

    def kept(self, words: Array, r: Any) -> Array:
        """Words after an update that changes neither m nor v."""


class Oracle:
    encode = staticmethod(word.encode)
    decode = staticmethod(word.decode)

    def kept(self, words: Array, r: Any) -> Array:
        return word.encode(*word.decode(words), r)


class Updated:
    """By updates whose betas are 0, or 1; params with which the hash is what is wanted."""

    def __init__(self, implementation: Implementation) -> None:
        def one(hyper: Any, p: Any, g: Any, words: Any) -> Any:
            return implementation.update(hyper, [p], [g], words=[words]).words[0]

        self._one = implementation.jit(one)
        self._each = implementation.jit(jax.vmap(one))

    def encode(self, m: Any, v: Any, r: Any) -> Array:
        m, v, r = np.broadcast_arrays(np.asarray(m, np.float32), np.asarray(v, np.float32), r)
        cuts = range(0, m.size, AT_ONCE)
        pieces = [self._encode(*(x.ravel()[i : i + AT_ONCE] for x in (m, v, r))) for i in cuts]
        return np.concatenate(pieces).reshape(m.shape)

    def _encode(self, *operands: Array) -> Array:
        """m and v are complements of betas, of a gradient of 1."""
        m, v, r = (np.resize(x, AT_ONCE) for x in operands)
        hyper = np.zeros((AT_ONCE, 1, NUM_SLOTS), np.float32)
        hyper[:, 0, [Slot.GRAD_SCALE, Slot.SALT]] = 1
        hyper[:, 0, Slot.ONE_MINUS_BETA_1], hyper[:, 0, Slot.ONE_MINUS_BETA_2] = m, v
        p, g = noise.with_random_bits(r, 1, 1), np.ones(AT_ONCE, np.float32)
        minus_zero = np.full(AT_ONCE, word.legal()[0, 1, 0])  # + 0 is 0, + -0 is -0
        return np.asarray(self._each(hyper, p, g, minus_zero))[: operands[0].size]

    def kept(self, words: Array, r: Any) -> Array:
        hyper = np.zeros((1, NUM_SLOTS), np.float32)
        hyper[0, [Slot.GRAD_SCALE, Slot.SALT, Slot.BETA_1, Slot.BETA_2]] = 1
        r = np.broadcast_to(np.asarray(r, np.uint32), words.shape)
        g = np.full(words.shape, -1, np.float32)  # times 0 it leaves zero's sign
        return np.asarray(self._one(hyper, noise.with_random_bits(r, -1, 1), g, words))

    def decode(self, words: Array) -> tuple[Array, Array]:
        m, v = jax.jit(unpack)(words)
        return np.asarray(m), np.asarray(v)


@functools.cache
def format_of(name: str) -> Format:
    """``NAMES`` says which there are."""
    return Oracle() if name == "oracle" else Updated(IMPLEMENTATIONS[name])


NAMES = ("oracle", "reference", "stablehlo", "cpu kernel")
