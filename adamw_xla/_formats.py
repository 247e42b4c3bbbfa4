"""States in words and states of moments, and the params that remainders complete."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adamw_xla._check import calls, formats, trees
from adamw_xla._check.words import NATIVE, misplaced
from adamw_xla._inside.offload import to_device
from adamw_xla._state import AdamWState, check_kind
from adamw_xla_lowering import join_params, pack, unpack

_STATE = {"state": "from adamw_init(params, config) or the last step"}


@calls.explained("unpack_state", aliases={"opt_state": "state"}, lacking=_STATE)
def unpack_state(state: AdamWState) -> AdamWState:
    """The state of moments that a state in words stands for, exactly.

    For reading them, and for going on with ``AdamW(state_format="moments")``, with optax or with
    Keras. (``adapt_state`` does it on the way to a config that asks for it.)

    Args:
      state: one with ``words``; any other is returned as it is.

    Returns:
      One with float32 ``m`` and ``v`` in place of words, shaped and sharded like them.

    Raises:
      TypeError: ``state`` is no ``AdamWState``, or its words are no bfloat16.

    Example:
      >>> import adamw_xla as ax, jax.numpy as jnp
      >>> config = ax.AdamW(state_format="word16")
      >>> params = {"w": jnp.ones(3)}
      >>> params, state = ax.adamw_step(params, params, ax.adamw_init(params, config), config)
      >>> state.m is None, str(state.words["w"].dtype)
      (True, 'bfloat16')
      >>> moments = ax.unpack_state(state)
      >>> bool((ax.pack_state(moments).words["w"] == state.words["w"]).all())
      True
    """
    check_kind(state, dataclasses.replace(NATIVE, call="unpack_state(state)"))
    if state.words is None:
        return state
    treedef: Any
    words, treedef = jax.tree.flatten(state.words)
    for i, x in enumerate(words):
        trees.bits("state.words", state.words, i, x, formats.DTYPES["words"])
    m, v = zip(*(unpack(to_device(x)) for x in words), strict=True) if words else ((), ())
    return dataclasses.replace(state, m=treedef.unflatten(m), v=treedef.unflatten(v), words=None)


@calls.explained("pack_state", aliases={"opt_state": "state"}, lacking=_STATE)
def pack_state(state: AdamWState) -> AdamWState:
    """A state of moments in words, each rounded to the nearest; of words it is the words.

    What words cannot hold becomes what is nearest: an infinite or too large v is 2.3e8, and m at
    most 15 times the power of two below sqrt(v). A NaN has nothing near it, and is refused; under
    ``jax.jit`` it cannot be seen, and becomes such a number.

    Args:
      state: one with ``m`` and ``v``; one with words is returned as it is.

    Returns:
      One with ``words`` in place of ``m`` and ``v``, for ``AdamW(state_format="word16")``.

    Raises:
      TypeError: ``state`` is no ``AdamWState``, or a moment of it no array of real floats.
      ValueError: it has ``v_max``, which does not go with words; or a moment has a NaN: names the
        leaf.
    """
    check_kind(state, dataclasses.replace(NATIVE, call="pack_state(state)"))
    if state.words is not None:
        return state
    if state.v_max is not None:
        raise ValueError(
            "state.v_max: a state in words has no maxima of v; adamw_xla.adapt_state(state, "
            'params, AdamW(state_format="word16")) drops them, and keeps the moments.'
        )
    for field in ("m", "v"):
        tree = getattr(state, field)
        trees.params(tree, jax.tree.leaves(tree), f"state.{field}")
    return in_words(state, "state.{}".format)


def in_words(state: AdamWState, called: Callable[[str], str]) -> AdamWState:
    """A state of moments in words, as ``pack_state``; ``called`` names its fields in errors."""
    treedef: Any
    m, treedef = jax.tree.flatten(state.m)
    pairs = zip(m, treedef.flatten_up_to(state.v), strict=True)
    words = [packed(called, state.m, i, *pair) for i, pair in enumerate(pairs)]
    return dataclasses.replace(state, m=None, v=None, words=treedef.unflatten(words))


def packed(called: Callable[[str], str], tree: Any, index: int, m: Any, v: Any) -> jax.Array:
    """The words of one leaf's moments; refuses a NaN, with the path that ``tree`` has."""
    moments = {"m": to_device(m), "v": to_device(v)}
    for field, x in moments.items():
        formats.no_nan(called(field), tree, index, x)
    return pack(**moments)


@calls.explained("master_params", aliases={"opt_state": "state", "model": "params"}, lacking=_STATE)
def master_params(params: Any, state: AdamWState) -> Any:
    """The float32 params that bfloat16 params and the state's remainders are, exactly.

    Args:
      params: those of the same step as ``state``.
      state: one for ``AdamW(master="split")``.

    Returns:
      A tree like ``params``, with float32 in place of bfloat16, and all else as it is.

    Raises:
      TypeError: ``state`` is no ``AdamWState``, or its remainders are no int16.
      ValueError: the state has no remainders, or is of other params.

    Example:
      >>> import adamw_xla as ax, jax.numpy as jnp
      >>> config = ax.AdamW(learning_rate=1e-5, weight_decay=0.0, master="split")
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> params, state = ax.adamw_step(params, params, ax.adamw_init(params, config), config)
      >>> print(params["w"][0], f"{ax.master_params(params, state)['w'][0]:.6f}")
      1 0.999990
    """
    words = dataclasses.replace(NATIVE, call="master_params(params, state)")
    misplaced(words, params=params, state=state)
    check_kind(state, words)
    if state.remainder is None:
        raise ValueError(
            'state.remainder: is None, so the params are all that there is; AdamW(master="split") '
            "keeps remainders from its adamw_init or adapt_state on."
        )
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    argument = words.of_state("remainder")
    flat = trees.like_params_or_by_names(argument, params, treedef, state.remainder)
    for i, (p, r) in enumerate(zip(leaves, flat, strict=True)):
        if r is not None:
            trees.state_leaf(argument, params, i, r, p, formats.DTYPES["remainder"])
    return treedef.unflatten(
        join_params(p, to_device(r)) if r is not None and p.dtype == jnp.bfloat16 else p
        for p, r in zip(leaves, flat, strict=True)
    )
