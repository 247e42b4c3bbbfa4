"""A running training moves between optax and here, and goes on as if nothing had happened."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import BETAS, LR, STEPS, WD, close, problem
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

HALF = STEPS // 2
RATE = optax.warmup_cosine_decay_schedule(0.0, LR, 10, STEPS)
DECAY = optax.linear_schedule(WD, 0.0, STEPS)
MASK = [True, False, True, True]
BETA = {"b1": BETAS[0], "b2": BETAS[1]}


class Native:
    """The native API under the names of a transformation."""

    def __init__(self, rate: Any, decay: Any, mask: Any = None, **options: Any) -> None:
        options = {"epsilon": 1e-8, "epsilon_hat": False, **options}
        self.config = ax.AdamW(rate, decay, *BETAS, weight_decay_mask=mask, **options)

    def init(self, params: Any) -> Any:
        return ax.adamw_init(params, self.config)

    def step(self, params: Any, grads: Any, state: Any) -> Any:
        return ax.adamw_step(params, grads, state, self.config)


class Optax:
    """A transformation of optax, and the sum."""

    def __init__(self, transform: Any) -> None:
        self.init, self.update = transform.init, transform.update

    def step(self, params: Any, grads: Any, state: Any) -> Any:
        updates, state = self.update(grads, state, params)
        return optax.apply_updates(params, updates), state


def solvers(rate: Any, decay: Any, mask: Any = None) -> dict[str, Any]:
    """The same training, said in seven ways."""
    options = {"learning_rate": rate, "weight_decay": decay, "mask": mask, **BETA}
    injected = {k: v for k, v in options.items() if k != "mask"}
    clip = optax.clip_by_global_norm(1e6)
    return {
        "stock": Optax(optax.adamw(**options)),
        "stock in a chain": Optax(optax.chain(clip, optax.adamw(**options))),
        "stock, injected": Optax(optax.inject_hyperparams(optax.adamw)(mask=mask, **injected)),
        "ours": Optax(axo.adamw(**options)),
        "ours in a chain": Optax(optax.chain(clip, axo.adamw(**options))),
        "ours, injected": Optax(optax.inject_hyperparams(axo.adamw)(mask=mask, **injected)),
        "native": Native(rate, decay, mask),
    }


def train(solver: Any, params: Any, state: Any, grads: Any) -> Any:
    step = jax.jit(solver.step, donate_argnums=(0, 2))
    for g in grads:
        params, state = step(params, g, state)
    return params, state


def begin(solver: Any) -> Any:
    params, grads = problem()
    leaves = [jnp.asarray(p) for p in params]
    return leaves, solver.init(leaves), grads


KINDS = {
    "constant": (LR, WD),
    "schedules": (RATE, DECAY),
    "mask": (LR, WD, MASK),
}
WAYS = [
    ("stock", "ours"),
    ("stock", "native"),
    ("stock in a chain", "ours"),
    ("stock, injected", "ours in a chain"),
    ("ours", "stock"),
    ("native", "stock"),
    ("native", "stock, injected"),
    ("ours in a chain", "stock in a chain"),
    ("native", "ours, injected"),
    ("ours, injected", "native"),
]


CASES = [
    *(("schedules", *way) for way in WAYS),
    *((kind, *way) for kind in ("constant", "mask") for way in (WAYS[0], WAYS[5])),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "second"), CASES, ids=lambda x: x)
def test_moved_half_way(kind: str, first: str, second: str) -> None:
    one, other = (solvers(*KINDS[kind])[name] for name in (first, second))
    move = axo.to_optax_state if second.startswith("stock") else axo.from_optax_state

    params, state, grads = begin(one)
    whole, _ = train(one, params, state, grads)

    params, state, _ = begin(one)
    params, state = train(one, params, state, grads[:HALF])
    moved = move(state, other.init(params))
    params, last = train(other, params, moved, grads[HALF:])
    close(params, whole)
    for _, count in optax.tree_utils.tree_get_all_with_path(last, "count"):
        assert count == STEPS


def test_moments_are_the_same_bits() -> None:
    _, state, grads = begin(stock := solvers(LR, WD)["stock"])
    params, state = train(stock, begin(stock)[0], state, grads[:3])
    native = axo.from_optax_state(state, Native(LR, WD).init(params))
    back = axo.to_optax_state(native, stock.init(params))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_bfloat16_moments_are_widened() -> None:
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    stock = optax.adamw(LR)
    _, state = stock.update(params, stock.init(params), params)
    ours = axo.from_optax_state(state, axo.adamw(LR).init(params))
    for new, old in ((ours.mu, state[0].mu), (ours.nu, state[0].nu)):
        assert new["w"].dtype == jnp.float32
        np.testing.assert_array_equal(new["w"], np.asarray(old["w"], np.float32))


def test_our_own_state_moves_whole() -> None:
    options: dict[str, Any] = {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 4}
    ours, native = axo.adamw(LR, WD, **options), Native(LR, WD, **options)
    params, _, grads = begin(native)
    _, state = train(native, params, native.init(params), grads[:6])
    moved = axo.from_optax_state(state, ours.init(begin(native)[0]))
    assert moved.micro_step == 2
    for x, y in zip(jax.tree.leaves(moved.native()), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


PARAMS = {"a": jnp.ones(3), "b": {"c": jnp.ones(())}}
STOCK, OURS = optax.adamw(LR), axo.adamw(LR)
AMSGRAD = axo.adamw(LR, amsgrad=True)
TWO = optax.partition({"x": OURS, "y": OURS}, {"a": "x", "b": "y"})
REFUSED: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "no Adam": (axo.from_optax_state, optax.sgd(0.1), OURS, TypeError, "opt_state: has 0"),
    "not ours": (axo.from_optax_state, STOCK, STOCK, TypeError, "like: has 0 .*AdamWOptState"),
    "not theirs": (axo.to_optax_state, OURS, OURS, TypeError, "like: has 0 .*ScaleByAdamState"),
    "two": (axo.to_optax_state, TWO, STOCK, TypeError, "state: has 2 .*multi_transform"),
    "no place": (
        axo.to_optax_state,
        AMSGRAD,
        STOCK,
        ValueError,
        r"state.nu_max: .*state\._replace\(nu_max=None\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals(case: Any) -> None:
    move, source, target, error, message = case
    with pytest.raises(error, match=message):
        move(source.init(PARAMS), target.init(PARAMS))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": jnp.ones(3)}, r"opt_state.mu: has \['b'\]\['c'\], which like lacks"),
        ({"a": jnp.ones(4), "b": {"c": jnp.ones(())}}, r"opt_state.mu\['a'\]: has shape \(3,\)"),
    ],
)
def test_other_params(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        axo.from_optax_state(STOCK.init(PARAMS), OURS.init(params))
