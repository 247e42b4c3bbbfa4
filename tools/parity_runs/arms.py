"""Who takes part: AdamW with its state held in so many ways, as a pair of functions each."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import optax

import adamw_xla as ax
from parity_runs import peers
from parity_runs.peers import EPSILON, WEIGHT_DECAY, Init, Step

Kind = Literal["control", "ours", "peer"]
Optimizer: TypeAlias = Callable[[jax.Array], tuple[Init, Step]]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to hold the state, everything else being equal.

    Attributes:
      name: what the tables call it.
      kind: ``control`` is float32; ``ours`` is judged; ``peer`` is judged for comparison.
      optimizer: from beta_2 (a traced scalar) to ``init(params)`` and
        ``step(params, grads, state, learning_rate)``.
      state: bytes per param that it would keep beside the params.
      dtype: of the params.
      stretch: a factor on the learning rate.
    """

    name: str
    kind: Kind
    optimizer: Optimizer
    state: float
    dtype: str = "float32"
    stretch: float = 1.0


def ours(**options: Any) -> Optimizer:
    """This package, with these options."""

    def optimizer(beta_2: jax.Array) -> tuple[Init, Step]:
        config = ax.AdamW(
            weight_decay=WEIGHT_DECAY, beta_2=beta_2, epsilon=EPSILON, epsilon_hat=False, **options
        )

        def init(params: Any) -> Any:
            return ax.adamw_init(params, config)

        def step(params: Any, grads: Any, state: Any, rate: jax.Array) -> tuple[Any, Any]:
            return ax.adamw_step(params, grads, state, config, learning_rate=rate)

        return init, step

    return optimizer


def optax_adamw(beta_2: jax.Array) -> tuple[Init, Step]:
    """``optax.adamw`` and ``apply_updates``."""

    def at(rate: Any) -> optax.GradientTransformation:
        return optax.adamw(rate, b2=beta_2, eps=EPSILON, weight_decay=WEIGHT_DECAY)

    def step(params: Any, grads: Any, state: Any, rate: jax.Array) -> tuple[Any, Any]:
        updates, state = at(rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return at(0.0).init, step


FLOAT32 = ours()
CONTROL = Arm("float32", "control", FLOAT32, state=8)
LONGER = Arm("float32, rate x 1.05", "control", FLOAT32, state=8, stretch=1.05)
ARMS = {
    arm.name: arm
    for arm in (
        CONTROL,
        LONGER,
        Arm("word", "ours", ours(state_format="word16"), state=2),
        Arm(
            "word, stochastic bfloat16",
            "ours",
            ours(state_format="word16", params_rounding="stochastic"),
            state=2,
            dtype="bfloat16",
        ),
        Arm(
            "word, split master",
            "ours",
            ours(state_format="word16", master="split"),
            state=4,
            dtype="bfloat16",
        ),
        Arm("optax.adamw", "peer", optax_adamw, state=8),
        Arm("bfloat16 params, to nearest", "peer", FLOAT32, state=8, dtype="bfloat16"),
        Arm("bfloat16 m and v, to nearest", "peer", peers.bfloat16_state, state=4),
        Arm("8-bit blocks", "peer", peers.blockwise_state, state=2 + 2 * 4 / peers.BLOCK),
    )
}
"""By name; ``CONTROL`` is what the others are judged by."""
