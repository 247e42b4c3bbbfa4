"""``keep_info`` of ``adamw_xla.keras.AdamW``, judged in float64 from variables and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras_models import compiled
import numpy as np
import pytest

import adamw_xla as ax
from adamw_xla.keras import AdamW

Array = np.ndarray[Any, Any]
SHAPES = ((6, 2), (3,), ())
STEPS, BOUND, SCALE = 4, 0.5, 8.0


def weights() -> list[keras.Variable]:
    rng = np.random.default_rng(5)
    return [
        keras.Variable(rng.standard_normal(shape), dtype="float32", name=f"leaf{i}")
        for i, shape in enumerate(SHAPES)
    ]


def gradients() -> list[list[Array]]:
    """Of each call, of each variable."""
    rng = np.random.default_rng(6)
    return [[rng.standard_normal(s).astype(np.float32) for s in SHAPES] for _ in range(STEPS)]


def norm(leaves: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in leaves)))


def eagerly(optimizer: AdamW, variables: list[keras.Variable], grads: list[list[Array]]) -> Any:
    """After each call, the variables' values and what it told."""
    for now in grads:
        optimizer.apply(now, variables)
        yield [v.numpy() for v in variables], optimizer.info


def statelessly(optimizer: AdamW, variables: list[keras.Variable], grads: list[list[Array]]) -> Any:
    state, values = [v.value for v in optimizer.variables], [v.value for v in variables]
    step = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
    for now in grads:
        values, state = step(state, now, values)
        for variable, value in zip(optimizer.variables, state, strict=True):
            variable.assign(jnp.array(value, copy=True))
        yield [np.asarray(x) for x in values], optimizer.info


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"loss_scale_factor": SCALE, "global_clipnorm": BOUND},
    "clipnorm": {"clipnorm": BOUND},
    "average": {"use_ema": True, "amsgrad": True},
    "accumulation": {"gradient_accumulation_steps": 2, "loss_scale_factor": SCALE},
    "every average": {
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_at_every_call": True,
        "global_clipnorm": BOUND,
    },
}


@pytest.mark.parametrize("calls", [eagerly, statelessly])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_norms_and_rates(options: dict[str, Any], calls: Any) -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    optimizer = AdamW(schedule, weight_decay=0.125, keep_info=True, **options)
    variables, grads = weights(), gradients()
    assert np.isnan(optimizer.info.grad_norm)
    optimizer.build(variables)
    assert not optimizer.info.applied
    assert all(np.isnan(x) for x in jax.tree.leaves(optimizer.info) if x.dtype != bool)
    before = [v.numpy() for v in variables]
    steps, scale = options.get("gradient_accumulation_steps", 1), options.get("loss_scale_factor")
    for i, (after, info) in enumerate(calls(optimizer, variables, grads)):
        is_made = (i + 1) % steps == 0
        assert bool(info.applied) == is_made
        assert {x.dtype for x in jax.tree.leaves(info)} == {np.dtype("float32"), np.dtype(bool)}
        assert info.learning_rate == 0.5 * 0.5**i
        assert info.weight_decay == 0.125
        norms = info.grad_norm, info.clip_factor, info.param_norm, info.update_norm
        if not is_made:
            assert all(np.isnan(x) for x in norms)
            continue
        summed = [
            np.sum(np.float64(leaf), 0) for leaf in zip(*grads[i + 1 - steps : i + 1], strict=True)
        ]
        mean = [g / steps / (scale or 1.0) for g in summed]
        factor = 1.0
        if bound := options.get("global_clipnorm"):
            factor = min(1.0, bound / norm(mean))
        elif bound := options.get("clipnorm"):
            factor = min(1.0, *(bound / norm([g]) for g in mean))
        added = [np.float64(x) - y for x, y in zip(after, before, strict=True)]
        want = norm(mean), factor, norm(after), norm(added)
        # Sums of 16 squares; what was added is seen through the rounding of variables of 2.
        np.testing.assert_allclose(norms[:3], want[:3], rtol=8 * 2.0**-24)
        np.testing.assert_allclose(norms[3], want[3], rtol=8 * 2.0**-24, atol=4 * 2.0**-24)
        before = after


class Told(keras.callbacks.Callback):
    def on_train_begin(self, logs: Any = None) -> None:
        self.infos: list[ax.StepInfo] = []
        self.kernels: list[Array] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.infos.append(self.model.optimizer.info)
        self.kernels.append(self.model.trainable_variables[0].numpy())


def one_weight(optimizer: Any, **how: Any) -> keras.Model:
    keras.utils.set_random_seed(7)
    layer = keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.layers.Input((1,)), layer])
    model.compile(optimizer=optimizer, loss="mse", **how)
    return model


X = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]


def fitted(
    optimizer: Any, epochs: int = 2, told: bool = True, **how: Any
) -> tuple[keras.Model, Told]:
    model, seen = one_weight(optimizer, **how), Told()
    callbacks = [seen] if told else []
    model.fit(X, 3 * X, epochs=epochs, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)
    return model, seen


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"jit_compile": False}], ids=str)
def test_callbacks_of_fit_have_it(how: dict[str, Any]) -> None:
    model, told = fitted(AdamW(0.25, keep_info=True), **how)
    kernel = one_weight("sgd").trainable_variables[0].numpy()
    for i, (info, after) in enumerate(zip(told.infos, told.kernels, strict=True)):
        x = np.float64(X[:16] if i % 2 == 0 else X[16:])
        slope = np.mean(2 * x * (x * kernel - 3 * x))
        np.testing.assert_allclose(info.grad_norm, abs(slope), rtol=1e-5)
        np.testing.assert_allclose(info.param_norm, abs(after.item()), rtol=1e-6)
        kernel = after
    assert len(told.infos) == 4
    # No array is there twice, so that a jitted step may have them all.
    model.compile(optimizer=model.optimizer, loss="mse", jit_compile=True)
    model.fit(X, 3 * X, verbose=0)
    assert model.optimizer.info.grad_norm != told.infos[-1].grad_norm


def test_without_it_nothing_is_there_and_with_it_nothing_else_changes() -> None:
    def made(**options: Any) -> tuple[str, list[Any]]:
        variables = weights()
        optimizer = AdamW(0.25, name="optimizer", **options)
        optimizer.build(variables)
        state = [v.value for v in optimizer.variables]
        step = jax.jit(optimizer.stateless_apply)
        lowered = step.lower(state, gradients()[0], [v.value for v in variables])
        return lowered.as_text(), [(v.path, v.shape, v.dtype) for v in optimizer.variables]

    (plain, stock), (told, more), (again, _) = made(), made(keep_info=True), made(keep_info=False)
    assert plain == again != told
    assert more == [*stock, ("optimizer/info", (7,), "float32")]
    assert "optimizer/info" not in [path for path, *_ in stock]


@pytest.mark.parametrize("keeps", [(True, False), (False, True)], ids=str)
def test_files_are_those_of_the_stock_class(tmp_path: Path, keeps: tuple[bool, bool]) -> None:
    first, second = ({"keep_info": True} if keep else {} for keep in keeps)
    classes = {True: AdamW, False: keras.optimizers.AdamW}  # without it, the stock class will do
    model, _ = fitted(AdamW(0.25, **first), epochs=1, told=keeps[0])
    model.save_weights(tmp_path / "model.weights.h5")
    other = compiled(one_weight("sgd"), classes[keeps[1]](0.25, **second))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    count = 4  # iteration, learning rate, and of one variable the moments
    for a, b in zip(model.optimizer.variables[:count], other.optimizer.variables, strict=False):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    assert int(other.optimizer.iterations.value) == 2
    other.optimizer.set_weights([v.numpy() for v in model.optimizer.variables[:count]])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert loaded.get_config() == model.optimizer.get_config()
    assert int(loaded.iterations.value) == 2
    assert loaded.keep_info == keeps[0]
    assert ("keep_info" in loaded.get_config()) == keeps[0]


def test_a_loss_scale_around_it() -> None:
    outer = keras.optimizers.LossScaleOptimizer(AdamW(keep_info=True), initial_scale=4.0)
    variables = weights()
    outer.build(variables)
    state, values = [v.value for v in outer.variables], [v.value for v in variables]
    step, (grads, *_) = jax.jit(outer.stateless_apply), gradients()
    for now in (grads, [np.full_like(g, np.inf) for g in grads]):
        values, state = step(state, now, values)
        for variable, value in zip(outer.variables, state, strict=True):
            variable.assign(value)
        # Of a step that it skips the optimizer knows nothing.
        np.testing.assert_allclose(
            outer.inner_optimizer.info.grad_norm, norm(grads) / 4, rtol=8 * 2.0**-24
        )
