"""``AdamWState`` and how it begins."""

from collections.abc import Sequence
import dataclasses
import sys
from typing import Any, TypeVar

import jax
from jax import export
import jax.numpy as jnp

from adamw_xla import _flax
from adamw_xla._check import calls, trees
from adamw_xla._check.leaves import float_leaf, same_shape, structure
from adamw_xla._check.words import NATIVE, Words, misplaced, not_a_state, of_other_options
from adamw_xla._config import AdamW, check_config

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdamWState:
    """What AdamW remembers between steps: a pytree.

    Each field but the counters mirrors the params' tree, so a tree of shardings for the
    params serves for it. Fields that the config does not use are None.

    Attributes:
      count: int32 scalar, updates done.
      m: first moments (float32, or ``config.state_dtype``).
      v: second moments (float32; float64 for float64 params).
      v_max: with ``amsgrad``, the running maxima of ``v``.
      ema: with ``use_ema``, the average of the params; the params themselves at first.
      accumulated: with ``gradient_accumulation_steps``, the sum of the gradients so far.
      micro_step: with it too, int32 scalar: calls since the last update.
      skipped: with ``skip_nonfinite``, int32 scalar: calls that were skipped.
    """

    count: jax.Array
    m: Any
    v: Any
    v_max: Any = None
    ema: Any = None
    accumulated: Any = None
    micro_step: jax.Array | None = None
    skipped: jax.Array | None = None

    def __post_init__(self) -> None:
        """Makes the state known to Flax' checkpoints, where Flax is in use."""
        # With each state, not with this module: Flax may be imported after it.
        if "flax.serialization" in sys.modules:
            _flax.register(type(self))


# Lets `jax.export` write functions that take or return a state.
export.register_pytree_node_serialization(
    AdamWState,
    serialized_name="adamw_xla.AdamWState",
    serialize_auxdata=lambda aux: b"",
    deserialize_auxdata=lambda data: (),
)


_INIT = dataclasses.replace(NATIVE, call="adamw_init(params, config)")


@calls.explained(
    "adamw_init",
    aliases={"optimizer": "config", "model": "params", "parameters": "params"},
    lacking={"config": "the options, an adamw_xla.AdamW"},
)
def adamw_init(params: Any, config: AdamW) -> AdamWState:
    """Builds the state for ``params``.

    Works eagerly, under ``jax.jit`` and under ``jax.eval_shape``. The new arrays take the
    shapes and shardings of the params; under ``jit`` with automatic axes the compiler chooses
    their shardings, unless ``out_shardings`` says.

    Args:
      params: a pytree of arrays, bfloat16, float16, float32 or float64.
      config: the hyperparameters.

    Returns:
      The state before the first update.

    Raises:
      TypeError: ``config`` is no ``AdamW``; or a leaf is no array, or not of a real floating
        dtype: names its path.
    """
    misplaced(_INIT, params=params, config=config)
    check_config(config, _INIT.call)
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    trees.params(params, leaves, needs_values=config.use_ema)

    def zeros(dtype_of: Any) -> Any:
        return treedef.unflatten([jnp.zeros_like(p, dtype_of(p.dtype)) for p in leaves])

    def copies() -> Any:
        # A copy, so that params and state can be donated side by side.
        dtype_of = config.dtype_of_state
        return treedef.unflatten([jnp.array(p, dtype_of(p.dtype), copy=True) for p in leaves])

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    accumulates = config.gradient_accumulation_steps is not None
    return AdamWState(
        count=zero(),
        m=zeros(config.dtype_of_m),
        v=zeros(config.dtype_of_state),
        v_max=zeros(config.dtype_of_state) if config.amsgrad else None,
        ema=copies() if config.use_ema else None,
        accumulated=zeros(config.dtype_of_state) if accumulates else None,
        micro_step=zero() if accumulates else None,
        skipped=zero() if config.skip_nonfinite else None,
    )


def check_state(
    params_tree: Any,
    treedef: Any,
    leaves: Sequence[Any],
    value: Any,
    c: AdamW,
    words: Words = NATIVE,
) -> None:
    """Checks that a state fits the params and was built for a config like ``c``."""
    if not isinstance(value, AdamWState):
        raise not_a_state(words, value)
    accumulates = "gradient_accumulation_steps"
    needs = {
        "v_max": ("amsgrad", c.amsgrad),
        "ema": ("use_ema", c.use_ema),
        "accumulated": (accumulates, c.gradient_accumulation_steps is not None),
        "micro_step": (accumulates, c.gradient_accumulation_steps is not None),
        "skipped": ("skip_nonfinite", c.skip_nonfinite),
    }
    for field, (option, needed) in needs.items():
        if (getattr(value, field) is not None) != needed and leaves:
            raise of_other_options(words, field, option, needed)
    for field in ("count", "micro_step", "skipped"):
        counter = getattr(value, field)
        is_number = type(counter) is int and field != "micro_step"  # that one is added to arrays
        if not is_number and (counter is not None or field == "count"):
            trees.counter(words.of_state(field), counter)
    for field in ("m", "v", "v_max", "ema", "accumulated"):
        tree = getattr(value, field)
        if tree is None and field not in ("m", "v"):
            continue
        if jax.tree.structure(tree) != treedef:
            structure(words.of_state(field), params_tree, tree)
        for i, (x, p) in enumerate(zip(jax.tree.leaves(tree), leaves, strict=True)):
            float_leaf(words.of_state(field), params_tree, i, x)
            same_shape(words.of_state(field), params_tree, i, x, p)
