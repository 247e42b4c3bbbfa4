"""What ``adamw_xla.optax`` refuses, and the texts that it answers with."""

from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from adamw_xla._check import options
from adamw_xla._check.leaves import kind, same_shape, structure
from adamw_xla._check.trees import is_known_bool
from adamw_xla_lowering import check_implementation


def arguments(
    *,
    learning_rate: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    eps_root: Any,
    weight_decay: Any,
    mask: Any,
    updates_like_grads: Any,
    implementation: Any,
) -> None:
    """Checks what ``adamw_xla.optax`` has names of its own for."""
    numbers = (learning_rate, b1, b2, eps, eps_root, weight_decay)
    _mask(mask, is_injected=any(isinstance(x, jax.Array) for x in numbers))
    options.coefficients(
        rates={"learning_rate": learning_rate, "weight_decay": weight_decay},
        betas={"b1": b1, "b2": b2},
        epsilons={"eps": eps, "eps_root": eps_root},
    )
    options.flag("updates_like_grads", updates_like_grads)
    check_implementation(implementation)


def _mask(mask: Any, is_injected: bool) -> None:
    """Refuses what ``optax.inject_hyperparams`` makes of a mask function: it passes a count."""
    is_whole = isinstance(mask, jax.Array) or (is_injected and is_known_bool(mask))
    if is_whole or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mask)):
        raise TypeError(
            f"mask: must be a tree of bools that are known, or a function of params, got {mask!r}. "
            "(optax.inject_hyperparams calls a function with its count, as a schedule: name it in "
            "its static_args=('mask',). For one bool for all there is weight_decay=0.0.)"
        )


def max_norm(value: Any) -> None:
    """Checks the bound of a clip."""
    options.scalar("max_norm", value, lambda x: x > 0, "above 0")


def call(params: Any, state: Any, kind_of_state: type) -> None:
    """Checks what is peculiar to a call through optax."""
    if params is None:
        raise ValueError(
            "params: is None, but the update depends on them; call update(grads, state, params)."
        )
    if not isinstance(state, kind_of_state):
        raise TypeError(
            "state must be what init(params) of adamw_xla.optax.adamw returned, got "
            f"{kind(state)}. (adamw_xla.optax.from_optax_state takes over that of "
            "optax.adamw.)"
        )


def moved(field: str, place: Any, value: Any) -> tuple[list[Any], Any]:
    """The leaves and structure of a part of the state that goes to ``place`` in another."""
    name = f"state.{field}"
    if place is None:
        raise ValueError(
            f"{name}: is there, but like has no place for it. Make like with the option that "
            "it is for, or set it to None first if it may be lost."
        )
    treedef: Any
    wanted, treedef = jax.tree.flatten(place)
    try:
        leaves = treedef.flatten_up_to(value)
    except ValueError:
        structure(name, place, value, "like")
    for i, (x, p) in enumerate(zip(leaves, wanted, strict=True)):
        same_shape(name, place, i, x, p, "like")
    return leaves, treedef


def not_one_state(argument: str, kinds: Sequence[type], count: int) -> NoReturn:
    """Raises for a state in which not just one AdamW is found."""
    names = " or ".join(kind.__name__ for kind in kinds)
    raise TypeError(
        f"{argument}: has {count} states of AdamW in it ({names}); must have one. With several, "
        "as in optax.multi_transform, move each by itself."
    )


def same_shapes(path: str, tree: Any, like: Any) -> None:
    """Refuses a wrapper's part whose leaves have other shapes than those of ``like``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for (key, x), p in zip(flat, jax.tree.leaves(like), strict=True):
        if np.shape(x) != np.shape(p):
            raise ValueError(
                f"{path}{jax.tree_util.keystr(key)}: has shape {np.shape(x)}; must be "
                f"{np.shape(p)}, the shape in like."
            )


def no_place(path: str, inner: str) -> NoReturn:
    """Raises for a part of a wrapper's state that would be lost."""
    raise ValueError(
        f"{path}: is there, but like has no place for it. Make like with the same wrapper around "
        f"adamw, or, if it may be lost, pass {inner} alone."
    )
