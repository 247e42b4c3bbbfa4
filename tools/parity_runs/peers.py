"""AdamW with a state of few bits as others hold it, written from the published formulas."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Init: TypeAlias = Callable[[Any], Any]
Step: TypeAlias = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]
Store: TypeAlias = Callable[[jax.Array], jax.Array]

BETA_1, EPSILON, WEIGHT_DECAY = 0.9, 1e-8, 0.01
BLOCK = 256
"""Elements that share a scale."""
DECADES = 7


def bfloat16_state(beta_2: jax.Array) -> tuple[Init, Step]:
    """m and v rounded to the nearest bfloat16 after each step."""
    return adamw(beta_2, _nearest, _nearest)


def blockwise_state(beta_2: jax.Array) -> tuple[Init, Step]:
    """m and v in 8 bits each: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization".

    Blocks of 256 elements are divided by their largest absolute value, and each quotient is
    rounded to the nearest of 256 numbers, the dynamic code. Held here is the number that a code
    stands for: what is judged is the arithmetic. Leaves of less than a block keep float32; the
    authors' library keeps all of less than 4,096 elements, for models that are larger than these.
    """
    return adamw(beta_2, functools.partial(blockwise, bits=0), functools.partial(blockwise, bits=1))


def adamw(beta_2: jax.Array, store_m: Store, store_v: Store) -> tuple[Init, Step]:
    """AdamW as Loshchilov and Hutter have it; m and v pass through ``store`` between steps."""

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return (
            jnp.zeros((), jnp.float32),
            jax.tree.map(store_m, zeros),
            jax.tree.map(store_v, zeros),
        )

    def step(params: Any, grads: Any, state: Any, rate: jax.Array) -> tuple[Any, Any]:
        count, m, v = jax.tree.map(lambda x: x.astype(jnp.float32), state)
        count += 1
        m = jax.tree.map(lambda m, g: BETA_1 * m + (1 - BETA_1) * g, m, grads)
        v = jax.tree.map(lambda v, g: beta_2 * v + (1 - beta_2) * g * g, v, grads)
        bias_1, bias_2 = 1 - BETA_1**count, -jnp.expm1(count * jnp.log(beta_2))

        def moved(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            direction = m / bias_1 / (jnp.sqrt(v / bias_2) + EPSILON)
            return p - rate * (direction + WEIGHT_DECAY * p)

        new = jax.tree.map(moved, params, m, v)
        return new, (count, jax.tree.map(store_m, m), jax.tree.map(store_v, v))

    return init, step


def _nearest(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


def blockwise(x: jax.Array, bits: int) -> jax.Array:
    """Each block of 256 over its largest absolute value, in the dynamic code."""
    if x.size < BLOCK:
        return x
    blocks = jnp.pad(x.ravel(), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    scale = jnp.abs(blocks).max(1, keepdims=True)
    quotient = blocks / jnp.where(scale > 0, scale, 1)
    return (dynamic(quotient, bits) * scale).ravel()[: x.size].reshape(x.shape)


def dynamic(x: jax.Array, bits: int) -> jax.Array:
    """The nearest number of the dynamic code to each of [-1, 1] (bits=0) or [0, 1] (bits=1).

    Of decade d = 0..6, from 10^(d - 7) to 10^(d - 6), it has the middles of 2^(d + bits) equal
    parts; and 0, and 1.
    """
    size = jnp.abs(x)
    # From here on up a decade's least number is nearer than the greatest of the one below.
    starts = np.array([(_greatest(d - 1, bits) + _least(d, bits)) / 2 for d in range(DECADES)])
    top, parts = jnp.float32(10.0 ** (1 - DECADES)), jnp.float32(2.0**bits)
    for start in starts[1:].astype(np.float32):
        top = jnp.where(size >= start, 10 * top, top)
        parts = jnp.where(size >= start, 2 * parts, parts)
    part = jnp.clip(jnp.floor((size / top - 0.1) / 0.9 * parts), 0, parts - 1)
    near = top * (0.1 + 0.9 * (part + 0.5) / parts)
    near = jnp.where(size < starts[0], 0, near)
    near = jnp.where(size >= (1 + _greatest(DECADES - 1, bits)) / 2, 1, near)
    return jnp.sign(x) * near


def _least(decade: int, bits: int) -> float:
    return 10.0 ** (decade - 6) * (0.1 + 0.45 / 2 ** (decade + bits))


def _greatest(decade: int, bits: int) -> float:
    return 0.0 if decade < 0 else 10.0 ** (decade - 6) * (1 - 0.45 / 2 ** (decade + bits))
