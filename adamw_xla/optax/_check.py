"""What ``adamw_xla.optax`` refuses, and the texts that it answers with."""

from collections.abc import Sequence
import dataclasses
from typing import Any, NoReturn

import jax
import numpy as np

from adamw_xla._check import calls, options, places, restored
from adamw_xla._check.leaves import kind, path, structure
from adamw_xla._check.trees import by_names, is_known_bool, of_each_leaf
from adamw_xla._check.words import Words, is_state, misplaced, not_a_state
from adamw_xla_lowering import check_implementation

NAMES = {
    "beta_1": "b1",
    "beta_2": "b2",
    "beta_1 and beta_2": "b1 and b2",
    "epsilon": "eps",
    "epsilon_root": "eps_root",
    "weight_decay_mask": "mask",
    "state_dtype": "mu_dtype",
}
ALIASES = calls.called_here(NAMES) | dict.fromkeys(calls.INFO, "keep_info")
"""This API's names for the options, by all others."""

WORDS = Words(
    call="update(grads, opt_state, params)",
    state="opt_state",
    state_class=restored.OPTAX_STATE,
    state_is="what init(params) of adamw_xla.optax.adamw returned",
    new_state="init(params)",
    options="adamw",
    another="other options of adamw",
    mask="mask",
    step="update returns (updates, opt_state)",
    replace="opt_state._replace({})",
    adapt="adamw_xla.optax.from_optax_state(opt_state, init(params))",
    pack="adamw_xla.optax.AdamWOptState.of(adamw_xla.pack_state(opt_state.native()))",
    unpack="adamw_xla.optax.AdamWOptState.of(adamw_xla.unpack_state(opt_state.native()))",
    fields={"m": "mu", "v": "nu", "v_max": "nu_max"},
)
PLACES = "state_shardings"
CLIP = dataclasses.replace(WORDS, options="clip_by_global_norm")
INIT = dataclasses.replace(WORDS, call="init(params)")
LACKING = {
    "params": "which the update depends on",
    "state": "from init(params) or the update before",
    "updates": "the gradients",
    "learning_rate": "a number or a schedule",
    "like": "a new state to be filled, init(params)",
}


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
    state_shardings: Any,
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
    if state_shardings is not None:
        _shardings(state_shardings)


def formats(
    state_format: Any, params_rounding: Any, master: Any, mu_dtype: Any, updates_like_grads: Any
) -> None:
    """Refuses what does not go with a format of the state or of the params."""
    if state_format == "word16" and mu_dtype is not None:
        raise ValueError(
            f'adamw: mu_dtype={mu_dtype!r} does not go with state_format="word16", whose words '
            "hold both moments; leave mu_dtype out."
        )
    for option, value in {"params_rounding": params_rounding, "master": master}.items():
        if updates_like_grads and value not in (None, "nearest"):
            raise ValueError(
                f"adamw: {option}={value!r} does not go with updates_like_grads, which rounds the "
                "updates once more; leave one of them out."
            )


def _shardings(tree: Any) -> None:
    if is_state(tree) or (type(tree) is tuple and any(map(is_state, tree))):
        raise TypeError(
            f"{PLACES}: must be a tree of jax.sharding.Sharding like the params, got "
            f"{kind(tree)}; give what adamw_xla.sharding.zero1(mesh, axis, params) returns, and "
            "init makes the state's of it."
        )
    places.of_tree(PLACES, tree, jax.tree.leaves(tree))


def shardings_like(params: Any, shardings: Any) -> Any:
    """For each param where its state lies, in the params' own containers.

    Flax' NNX gives ``init`` its variables and ``update`` what they hold, and wrappers of optax
    leave params out.
    """
    try:
        found = of_each_leaf(PLACES, params, shardings)
    except ValueError:
        by_name = by_names(params, shardings)
        if by_name is None:
            raise
        found = by_name
    treedef: Any = jax.tree.structure(params)
    return treedef.unflatten(found)


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


def call(grads: Any, state: Any, params: Any, kind_of_state: type) -> None:
    """Checks what is peculiar to a call through optax."""
    misplaced(WORDS, grads=grads, state=state, params=params)
    if params is None and is_state(state):
        raise ValueError(f"params: is None, but the update depends on them; call {WORDS.call}.")
    if not isinstance(state, kind_of_state):
        raise not_a_state(WORDS, state)


def moved(name: str, place: Any, value: Any, replace: str) -> tuple[list[Any], Any]:
    """The leaves and structure of a part of the state that goes to ``place`` in another."""
    if place is None:
        raise ValueError(
            f"{name}: is there, but like has no place for it. Make like with the option that "
            f"it is for, or set it to None first if it may be lost: {replace}."
        )
    treedef: Any
    wanted, treedef = jax.tree.flatten(place)
    try:
        leaves = treedef.flatten_up_to(value)
    except ValueError:
        leaves = by_names(place, value)
    if leaves is None or any(x is None for x in leaves):
        structure(name, place, value, "like")
    for i, (x, p) in enumerate(zip(leaves, wanted, strict=True)):
        if np.shape(x) != np.shape(p):
            where = path(place, i)
            raise ValueError(
                f"{name}{where}: has shape {np.shape(x)}; must be {np.shape(p)}, the shape of "
                f"like{where}."
            )
    return leaves, treedef


def not_one_state(argument: str, tree: Any, kinds: Sequence[type], count: int) -> NoReturn:
    """Raises for a state in which not just one AdamW is found."""
    names = " or ".join(kind.__name__ for kind in kinds)
    if count:
        advice = "With several, as in optax.multi_transform, move each by itself."
    elif (found := restored.find(tree, argument)) is not None:
        advice = (
            f"{found.where} looks like one that a checkpoint returned without its class. Restore "
            f"it with a template, such as optax.adamw(...).init(params), or pass {found.call}, "
            "which has the same moments."
        )
    elif argument == "like":
        advice = (
            "It is a new state, to be filled: init(params) of the transformation to go on with."
        )
    else:
        advice = "It must be a state of optax.adamw, or of adamw here, alone or inside of others."
    raise TypeError(
        f"{argument}: has {count} states of AdamW in it ({names}); must have one. {advice}"
    )


def same_shapes(where: str, tree: Any, like: Any) -> None:
    """Refuses a wrapper's part whose leaves have other shapes than those of ``like``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for (key, x), p in zip(flat, jax.tree.leaves(like), strict=True):
        if np.shape(x) != np.shape(p):
            raise ValueError(
                f"{where}{jax.tree_util.keystr(key)}: has shape {np.shape(x)}; must be "
                f"{np.shape(p)}, the shape in like."
            )


def no_place(where: str, inner: str) -> NoReturn:
    """Raises for a part of a wrapper's state that would be lost."""
    raise ValueError(
        f"{where}: is there, but like has no place for it. Make like with the same wrapper around "
        f"adamw, or, if it may be lost, pass {inner} alone."
    )
