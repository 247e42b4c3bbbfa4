"""What JAX makes of dtypes that it has only when told to, and a promotion that is strict.

No call warns, returns another dtype than it was given or fails for a promotion of ours.
"""

from __future__ import annotations

import functools
from typing import Any
import warnings

from comparing import close, same
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamw_xla as ax
import adamw_xla.optax as axo

FULL: dict[str, Any] = {
    "amsgrad": True,
    "use_ema": True,
    "ema_overwrite_frequency": 2,
    "loss_scale_factor": 8.0,
    "skip_nonfinite": True,
    "epsilon_root": 1e-4,
    "nesterov": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "clipvalue": {"clipvalue": 0.5, "epsilon_hat": False},
    "clipnorm": {**FULL, "clipnorm": 0.5},
    "global": {**FULL, "global_clipnorm": 0.5, "gradient_accumulation_steps": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "clipnorm": 0.5},
    "numpy": {"learning_rate": np.float64(0.1), "beta_1": np.array(0.9), "epsilon": np.int64(1)},
    "schedules": {"learning_rate": lambda count: np.float64(0.1), "weight_decay": jnp.float32},
}
MODES: dict[str, Any] = {
    "passed": lambda config: lambda p, g, s: jax.jit(ax.adamw_step)(p, g, s, config),
    "reference": lambda config: functools.partial(ax.reference.adamw_step, config=config),
}


def host(dtype: Any = np.float64) -> dict[str, Any]:
    return {"w": np.linspace(-1, 1, 4).astype(dtype), "b": np.ones((), np.float32)}


def dtypes(tree: Any) -> list[Any]:
    return [x.dtype for x in jax.tree.leaves(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize(
    ("mode", "name"), [*(("eager", name) for name in OPTIONS), *((m, "global") for m in MODES)]
)
def test_arrays_of_numpy(mode: str, name: str, x64: bool) -> None:
    """Float64 params on the host, strict promotion, every warning an error."""
    config = ax.AdamW(**OPTIONS[name])
    with (
        warnings.catch_warnings(action="error"),
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion("strict"),
    ):
        step = MODES.get(mode, lambda c: functools.partial(ax.adamw_step, config=c))(config)
        wide = np.dtype(np.float64 if x64 else np.float32)
        params, state = host(), ax.adamw_init(host(), config)
        before, kinds = dtypes(state), [np.dtype(np.float32), wide]
        assert dtypes(state.v) == kinds
        for _ in range(3):
            params, state = step(params, host(), state)
            assert dtypes(params) == kinds
            assert dtypes(state) == before
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
        if config.use_ema:
            assert dtypes(ax.adamw_finalize(host(), state, config)) == kinds
        assert ax.scale_loss(np.float64(2.0), config) in (2.0, 16.0)
        # What a checkpoint may bring: the same numbers on the host, counters as NumPy has them.
        stored = jax.tree.map(np.asarray, state)
        if not x64:
            stored = jax.tree.map(lambda x: x.astype(x.dtype.kind + "8"), stored)
        same(step(params, host(), stored), step(params, host(), state))


def test_the_drop_in_takes_arrays_of_numpy() -> None:
    options = {"updates_like_grads": True, "gradient_accumulation_steps": 2}
    with warnings.catch_warnings(action="error"), jax.numpy_dtype_promotion("strict"):
        for solver in (axo.adamw(0.1, **options), axo.adamw(0.1, mu_dtype="bfloat16")):
            state = solver.init(host())
            for _ in range(2):
                updates, state = solver.update(host(), state, host())
            assert dtypes(updates) == [np.dtype(np.float32)] * 2
        clip = axo.clip_by_global_norm(1.0)
        assert dtypes(clip.update(host(), clip.init(host()))[0]) == [np.dtype(np.float32)] * 2


def test_a_state_dtype_that_jax_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state_dtype is float64.*jax_enable_x64.*leave"):
        ax.adamw_init(host(), ax.AdamW(state_dtype="float64"))
    with pytest.raises(ValueError, match=r"mu_dtype is float64.*jax_enable_x64.*leave"):
        axo.adamw(0.1, mu_dtype="float64").init(host())


def test_another_mu_dtype_takes_a_state_over() -> None:
    """As in optax; there ``mu_dtype=None`` too leaves the moments as they are."""
    params = host(np.float32)
    wide, narrow = axo.adamw(0.1), axo.adamw(0.1, mu_dtype="bfloat16")
    _, state = wide.update(params, wide.init(params), params)
    _, state = narrow.update(params, state, params)
    assert set(dtypes(state.mu)) == {np.dtype(jnp.bfloat16)}
    updates, kept = wide.update(params, state, params)
    assert set(dtypes(kept.mu)) == {np.dtype(jnp.bfloat16)}
    close(updates, narrow.update(params, state, params)[0])
