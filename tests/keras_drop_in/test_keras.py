"""``adamw_xla.keras.AdamW`` beside ``keras.optimizers.AdamW``: the same trainings.

Agreement: for each weight max|ours - theirs| <= 1e-5 max|theirs| after 3 epochs of
``model.fit`` on the digits. Stock Keras rounds beta_2 = 0.999 to float32 before it takes
powers of it, which moves every update by 6e-6, so most trainings use betas that float32 has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import sparse
import jax.numpy as jnp
import keras
from keras_models import BATCH, close, compiled, data, fit, mlp, train_step_jaxpr, varied
import numpy as np
import pytest
from small import equations

from adamw_xla.keras import AdamW

Stock = keras.optimizers.AdamW
BETAS = {"beta_1": 0.875, "beta_2": 1 - 2.0**-10}


def cosine() -> Any:
    return keras.optimizers.schedules.CosineDecay(
        1e-3, 60, warmup_target=3e-3, warmup_steps=10, alpha=0.1
    )


AVERAGE = {"use_ema": True, "ema_momentum": 0.9}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"beta_1": 0.9, "beta_2": 0.999},
    "rates": {"learning_rate": 3e-3, "weight_decay": 0.1, "epsilon": 1e-5},
    "no_decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True},
    "clipnorm": {"clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.2},
    "ema": AVERAGE,
    "ema_overwrite": {**AVERAGE, "ema_overwrite_frequency": 5},
    "amsgrad_ema": {"amsgrad": True, **AVERAGE},
    "loss_scale": {"loss_scale_factor": 128.0},
    "accumulation": {"gradient_accumulation_steps": 4},
    "accumulation_clip": {"gradient_accumulation_steps": 4, "global_clipnorm": 0.2},
    "accumulation_amsgrad": {"gradient_accumulation_steps": 4, "amsgrad": True},
    "schedule": {"learning_rate": cosine()},
    "schedule_accumulation": {"learning_rate": cosine(), "gradient_accumulation_steps": 3},
    "callable_rate": {"learning_rate": lambda: 2e-3},
}


QUICK = {"defaults", "accumulation", "ema", "amsgrad", "global_clipnorm", "schedule"}
FITS = [
    pytest.param(options, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for name, options in OPTIONS.items()
]


@pytest.mark.parametrize("options", FITS)
def test_fit(options: dict[str, Any]) -> None:
    options = {**BETAS, **options}
    ours, theirs = fit(AdamW(**options)), fit(Stock(**options))
    close(ours.trainable_variables, theirs.trainable_variables)
    close(ours.optimizer.variables, theirs.optimizer.variables, 2e-5)
    assert len(equations(train_step_jaxpr(ours).jaxpr)) == 1


def excluding(**excluded: Any) -> Callable[[Any], Any]:
    def make(cls: Any) -> Any:
        optimizer = cls(weight_decay=0.5, learning_rate=3e-3, **BETAS)
        optimizer.exclude_from_weight_decay(var_names=["nothing is called so"])
        optimizer.exclude_from_weight_decay(**excluded)  # replaces the first
        return optimizer

    return make


def scaled(cls: Any) -> Any:
    return keras.optimizers.LossScaleOptimizer(cls(**BETAS), dynamic_growth_steps=20)


def several(cls: Any) -> Any:
    chosen = {".*/scores/.*": cls(1e-2, **BETAS), ".*/hidden/.*": cls(1e-3, clipnorm=0.1, **BETAS)}
    other = keras.optimizers.SGD(0.01)
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(other, chosen))


WRAPPED = {
    "excluded_names": (excluding(var_names=["bias"]), mlp),
    "excluded_kernels": (excluding(var_names=["ker.el", "nothing"]), varied),
    "loss_scale_optimizer": (scaled, mlp),
    "multi_optimizer": (several, mlp),
    "frozen_and_constrained": (lambda cls: cls(1e-2, **BETAS), varied),
    "constrained_accumulation": (
        lambda cls: cls(1e-2, gradient_accumulation_steps=4, **BETAS),
        varied,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("wrap", "make"), WRAPPED.values(), ids=WRAPPED)
def test_fit_wrapped(wrap: Callable[[Any], Any], make: Callable[[], Any]) -> None:
    ours, theirs = fit(wrap(AdamW), make), fit(wrap(Stock), make)
    close(ours.trainable_variables, theirs.trainable_variables)
    optimizers = len(getattr(ours.optimizer, "optimizers", [0, 0])) - 1
    assert len(equations(train_step_jaxpr(ours).jaxpr)) == optimizers


def test_excluding_by_identity_and_after_build() -> None:
    def make(cls: Any) -> keras.Model:
        model = compiled(mlp(), cls(weight_decay=0.5, learning_rate=3e-3, **BETAS))
        model.optimizer.build(model.trainable_variables)
        model.optimizer.exclude_from_weight_decay(var_list=model.trainable_variables[:1])
        x, y = data()
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        return model

    ours, theirs = make(AdamW), make(Stock)
    close(ours.trainable_variables, theirs.trainable_variables)
    everything = fit(AdamW(weight_decay=0.5, learning_rate=3e-3, **BETAS), epochs=1)
    kernel, decayed = (m.trainable_variables[0].numpy() for m in (ours, everything))
    assert np.abs(kernel - decayed).max() > 1e-3


def test_an_assigned_rate_counts_and_does_not_retrace(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []

    def make(cls: Any) -> keras.Model:
        apply = cls._backend_apply_gradients
        monkeypatch.setattr(
            cls, "_backend_apply_gradients", lambda *args: traces.append(cls) or apply(*args)
        )
        model = fit(cls(1e-3, **BETAS), epochs=1)
        traces.clear()
        model.optimizer.learning_rate = 1e-2
        x, y = data()
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        assert not traces
        return model

    ours, theirs = make(AdamW), make(Stock)
    close(ours.trainable_variables, theirs.trainable_variables)
    unchanged = fit(AdamW(1e-3, **BETAS), epochs=2)
    assert np.abs(ours.get_weights()[0] - unchanged.get_weights()[0]).max() > 1e-2


# ----------------------------------------------------------------- by design otherwise


@pytest.mark.slow
def test_the_average_rests_between_updates_unless_asked() -> None:
    options = {"gradient_accumulation_steps": 4, **AVERAGE, "ema_overwrite_frequency": 3, **BETAS}
    theirs = fit(Stock(**options))
    asked = fit(AdamW(**options, ema_at_every_call=True))
    close(asked.trainable_variables, theirs.trainable_variables)
    close(asked.optimizer.variables, theirs.optimizer.variables, 2e-5)
    assert len(equations(train_step_jaxpr(asked).jaxpr)) == 1

    # At rest: the average is that of a training whose batches are four times as large.
    x, y = data()
    x, y = x[: 4 * BATCH * 4], y[: 4 * BATCH * 4]
    del options["gradient_accumulation_steps"]
    small = compiled(mlp(), AdamW(**options, gradient_accumulation_steps=4))
    large = compiled(mlp(), AdamW(**options))
    small.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    large.fit(x, y, batch_size=4 * BATCH, epochs=2, shuffle=False, verbose=0)
    close(small.trainable_variables, large.trainable_variables)


def test_accumulating_calls_do_nothing_but_add() -> None:
    model = compiled(mlp(), AdamW(gradient_accumulation_steps=4, global_clipnorm=1.0, **AVERAGE))
    eqns = train_step_jaxpr(model).jaxpr.eqns
    (loop,) = (eqn for eqn in eqns if eqn.primitive.name == "while")
    assert len(equations(loop.params["body_jaxpr"].jaxpr)) == 1
    outside = {eqn.primitive.name for eqn in eqns}
    assert not outside & {"adamw_update", "adamw_sum_of_squares", "cond"}


def test_state_of_16_bit_variables_is_float32_unless_asked() -> None:
    variable = keras.Variable(np.zeros(3), dtype="bfloat16", name="w")
    options = {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2}
    for cls, asked, expected in [
        (AdamW, {}, "float32"),
        (AdamW, {"float32_state": False}, "bfloat16"),
        (Stock, {}, "bfloat16"),
    ]:
        optimizer = cls(**options, **asked)
        optimizer.build([variable])
        state = [v for v in optimizer.variables if v.shape == (3,)]
        assert len(state) == 5
        assert {v.dtype for v in state} == {expected}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "mixed_float16"])
def test_16_bits_learn_the_digits(policy: str) -> None:
    model = fit(AdamW(3e-3), lambda: mlp(policy, width=64), epochs=20)
    x, y = data()
    assert {v.dtype for v in model.trainable_variables} == {
        "bfloat16" if policy == "bfloat16" else "float32"
    }
    assert model.evaluate(x, y, verbose=0)[1] >= 0.95


@pytest.mark.slow
def test_stock_bfloat16_does_not_learn() -> None:
    model = fit(Stock(3e-3, weight_decay=0.0), lambda: mlp("bfloat16"), epochs=1)
    for after, before in zip(model.get_weights(), mlp("bfloat16").get_weights(), strict=True):
        np.testing.assert_array_equal(after, before)


# --------------------------------------------------------------- odd gradients, eagerly


def applied(cls: Any, grads: list[Any], calls: int = 2, **options: Any) -> list[Any]:
    rng = np.random.default_rng(3)
    variables = [
        keras.Variable(rng.standard_normal((6, 2)), dtype="float32", name=f"leaf{i}")
        for i in range(len(grads))
    ]
    variables[-1].overwrite_with_gradient = options.pop("overwrite", False)
    optimizer = cls(**options, **BETAS)
    for _ in range(calls):
        optimizer.apply(grads, variables)
    return [*variables, *optimizer.variables]


def rows() -> sparse.BCOO:
    """Rows 1 and 4 of a [6, 2] gradient, row 1 given twice."""
    values = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [0.5, -1.0]])
    return sparse.BCOO((values, jnp.asarray([[1], [4], [1]])), shape=(6, 2))


def test_sparse_gradients() -> None:
    ours, theirs = (applied(cls, [rows()], amsgrad=True) for cls in (AdamW, Stock))
    close(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"clipnorm": 0.5}, {"clipvalue": 0.5}, {"gradient_accumulation_steps": 2}]
)
def test_sparse_gradients_are_clipped_and_accumulated(options: dict[str, Any]) -> None:
    close(applied(AdamW, [rows()], **options), applied(Stock, [rows().todense()], **options))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_variables_that_their_gradient_overwrites(options: dict[str, Any]) -> None:
    grads = [jnp.full((6, 2), 0.5), jnp.full((6, 2), 7.0)]
    ours, theirs = (
        applied(cls, grads, **options, **AVERAGE, overwrite=True) for cls in (AdamW, Stock)
    )
    close(ours, theirs)
    np.testing.assert_array_equal(ours[1].numpy(), 7.0)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_variables_without_a_gradient_are_averaged_all_the_same(calls: int) -> None:
    grads = [jnp.full((6, 2), 0.5), None]
    options = {**AVERAGE, "ema_overwrite_frequency": 2}
    ours, theirs = (applied(cls, grads, calls, **options) for cls in (AdamW, Stock))
    close(ours, theirs)


def test_a_step_with_an_overflow_is_skipped() -> None:
    def run(cls: Any) -> list[Any]:
        variable = keras.Variable(np.ones(3), dtype="float32", name="w")
        optimizer = keras.optimizers.LossScaleOptimizer(cls(**BETAS))
        optimizer.build([variable])
        state, values = [v.value for v in optimizer.variables], [variable.value]
        step = jax.jit(optimizer.stateless_apply)
        for grad in (2.0, np.inf, 3.0):
            values, state = step(state, [jnp.full(3, grad)], values)
        return [*values, *state]

    for ours, theirs in zip(run(AdamW), run(Stock), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
