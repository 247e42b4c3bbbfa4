"""One AdamW step of each peer, as a pair of functions: what benches and tools compile and run."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import os
from typing import Any

import jax

import adamw_xla as ax

LEARNING_RATE, WEIGHT_DECAY, EPSILON = 1e-3, 1e-2, 1e-8
BOUND = 1.0
"""What gradients are clipped to."""

CLIPS = ("none", "global", "leaf", "value")

Init = Callable[[Any], Any]
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class NotOfferedError(ValueError):
    """A peer has no such option."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What kind of step: the options that the peers have in common, as far as they do.

    Attributes:
      clip: of ``CLIPS``: by the norm of the tree, by each leaf's, by each element's size.
      amsgrad: divide by the running maximum.
      ema: keep a moving average of the params.
      accumulate: micro-steps per update.
      words: m and v in 16-bit words, and bfloat16 params rounded at random.
    """

    clip: str = "none"
    amsgrad: bool = False
    ema: bool = False
    accumulate: int | None = None
    words: bool = False


def ours(options: Options = Options(), implementation: Any = None) -> tuple[Init, Step]:
    """This package."""
    return of_config(ours_config(options), implementation)


def ours_config(options: Options) -> ax.AdamW:
    """The config of these options."""
    return ax.AdamW(
        LEARNING_RATE,
        WEIGHT_DECAY,
        epsilon=EPSILON,
        epsilon_hat=False,
        amsgrad=options.amsgrad,
        use_ema=options.ema,
        gradient_accumulation_steps=options.accumulate,
        state_format="word16" if options.words else "moments",
        params_rounding="stochastic" if options.words else "nearest",
        **_clip_arguments(options),
    )


def of_config(config: ax.AdamW, implementation: Any = None) -> tuple[Init, Step]:
    """This package, with any config."""

    def init(params: Any) -> Any:
        return ax.adamw_init(params, config)

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        return ax.adamw_step(params, grads, state, config, implementation=implementation)

    return init, step


def optax_adamw(options: Options = Options()) -> tuple[Init, Step]:
    """``optax.adamw`` and ``apply_updates``."""
    return of_optax(_optax(options))


def _optax(options: Options) -> Any:
    import optax

    if options.ema or options.clip == "leaf":
        what = "moving average of the params" if options.ema else "clipping by each leaf's norm"
        raise NotOfferedError(f"optax.adamw has no {what}")
    scale = optax.scale_by_amsgrad if options.amsgrad else optax.scale_by_adam
    optimizer = optax.chain(
        scale(eps=EPSILON),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(LEARNING_RATE),
    )
    if not options.amsgrad:
        optimizer = optax.adamw(LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    clips = {"global": optax.clip_by_global_norm, "value": optax.clip}
    if options.clip in clips:
        optimizer = optax.chain(clips[options.clip](BOUND), optimizer)
    if options.accumulate is not None:
        optimizer = optax.MultiSteps(optimizer, options.accumulate).gradient_transformation()
    return optimizer


def of_optax(optimizer: Any) -> tuple[Init, Step]:
    """Any of optax' optimizers, and ``apply_updates``."""
    import optax

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return optimizer.init, step


GPT2_GROUPS = ("wte", "wpe", "ln_1", "ln_2", "ln_f", "attn", "c_fc", "mlp")
"""Eight groups of GPT-2's leaves, by what stands in their paths; the first that does counts."""


def ours_grouped(implementation: Any = None) -> tuple[Init, Step]:
    """This package, with a rate and a decay for each of ``GPT2_GROUPS``."""
    groups = tuple(
        ax.Group(pattern, learning_rate=LEARNING_RATE * (i + 1), weight_decay=WEIGHT_DECAY * i)
        for i, pattern in enumerate(GPT2_GROUPS)
    )
    config = ax.AdamW(
        LEARNING_RATE, WEIGHT_DECAY, epsilon=EPSILON, epsilon_hat=False, groups=groups
    )
    return of_config(config, implementation)


def optax_grouped() -> tuple[Init, Step]:
    """The same by ``optax.multi_transform``."""
    import optax

    def label(path: Any, leaf: Any) -> int:
        del leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next(i for i, pattern in enumerate(GPT2_GROUPS) if pattern in name)

    solvers = {
        i: optax.adamw(LEARNING_RATE * (i + 1), eps=EPSILON, weight_decay=WEIGHT_DECAY * i)
        for i in range(len(GPT2_GROUPS))
    }
    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return of_optax(optax.multi_transform(solvers, labels))


Told = Callable[[Any, Any, Any], tuple[Any, Any, Any]]
"""A step that returns norms of gradients, new params and updates too, and what else it tells."""


def ours_told(
    options: Options = Options(), implementation: Any = None, told: Any = True
) -> tuple[Init, Told]:
    """This package, with ``return_info``."""
    config = ours_config(options)
    init, _ = of_config(config)

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any, Any]:
        return ax.adamw_step(
            params, grads, state, config, implementation=implementation, return_info=told
        )

    return init, step


def optax_told(options: Options = Options()) -> tuple[Init, Told]:
    """``optax.adamw``, and ``optax.global_norm`` of what ``StepInfo`` has norms of."""
    import optax

    optimizer = _optax(options)

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, [optax.global_norm(x) for x in (grads, params, updates)]

    return optimizer.init, step


def keras_adamw(options: Options = Options()) -> tuple[Init, Step]:
    """Keras' ``stateless_apply``; its state is a list of the optimizer's variables.

    The optimizer is built anew wherever it is used, also under a trace, so that nothing of
    a model's size is ever allocated for a program that is only compiled.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported
    import keras

    def build(params: Any) -> Any:
        optimizer = keras.optimizers.AdamW(
            LEARNING_RATE,
            WEIGHT_DECAY,
            epsilon=EPSILON,
            amsgrad=options.amsgrad,
            use_ema=options.ema,
            gradient_accumulation_steps=options.accumulate,
            **_clip_arguments(options),
        )
        leaves = jax.tree.leaves(params)
        optimizer.build([keras.Variable("zeros", shape=x.shape, dtype=x.dtype) for x in leaves])
        return optimizer

    def init(params: Any) -> Any:
        return [variable.value for variable in build(params).variables]

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(params)
        new, state = build(params).stateless_apply(state, jax.tree.leaves(grads), leaves)
        return treedef.unflatten(new), state

    return init, step


def barrier(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
    """No step at all: what JAX takes for the same buffers. Donate, and it moves nothing."""
    # A bare identity would be forwarded: its outputs never reach the program.
    params, _, state = jax.lax.optimization_barrier((params, grads, state))
    return params, state


def _clip_arguments(options: Options) -> dict[str, float]:
    """Keras' names, which are ours."""
    names = {"global": "global_clipnorm", "leaf": "clipnorm", "value": "clipvalue"}
    return {names[options.clip]: BOUND} if options.clip in names else {}


PEERS: dict[str, Callable[[Options], tuple[Init, Step]]] = {
    "adamw_xla": ours,
    "optax": optax_adamw,
    "keras": keras_adamw,
}
"""Everybody whose step is a function of arrays, by name."""
