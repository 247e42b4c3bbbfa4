"""``adamw_xla.keras.AdamW``: files, configs, layouts and refusals."""

from __future__ import annotations

import doctest
import os
from pathlib import Path
import pickle
import subprocess
import sys
from typing import Any

import keras
from keras_models import BATCH, close, compiled, data, fit, mlp
import numpy as np
from places import python_path
import pytest

import adamw_xla.keras
from adamw_xla.keras import AdamW

Stock = keras.optimizers.AdamW
OPTIONS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "beta_2": 1 - 2.0**-10,
    "amsgrad": True,
    "use_ema": True,
    "gradient_accumulation_steps": 5,  # epochs of 22 batches end between updates
    "clipnorm": 0.5,
}
OURS_ONLY = {"float32_state": False, "ema_at_every_call": True, "keep_info": True}


def go_on(model: keras.Model) -> keras.Model:
    x, y = data()
    model.fit(x, y, epochs=2, batch_size=BATCH, shuffle=False, verbose=0)
    return model


def same(model: keras.Model, other: keras.Model) -> None:
    """Weights and the optimizer's state, exactly."""
    for a, b in zip(
        [*model.variables, *model.optimizer.variables],
        [*other.variables, *other.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=b.path)


# ------------------------------------------------------------------------------- files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.weights.h5", "model.keras"])
@pytest.mark.parametrize("first", [AdamW, Stock], ids=["ours", "stock"])
def test_the_other_class_resumes(tmp_path: Path, first: Any, name: str) -> None:
    # An average that moves at every call, so that the two classes agree on it.
    options = {AdamW: OPTIONS | {"ema_at_every_call": True}, Stock: OPTIONS}
    model = fit(first(**options[first]), epochs=1)
    path = tmp_path / name
    model.save(path) if name.endswith(".keras") else model.save_weights(path)
    resumed = {}
    for cls in (AdamW, Stock):
        resumed[cls] = compiled(mlp(), cls(**options[cls]))
        resumed[cls].optimizer.build(resumed[cls].trainable_variables)
        resumed[cls].load_weights(path)
        same(resumed[cls], model)
        go_on(resumed[cls])
    close(resumed[AdamW].trainable_variables, resumed[Stock].trainable_variables)
    close(resumed[AdamW].optimizer.variables, resumed[Stock].optimizer.variables, 2e-5)


def test_fit_may_be_called_again_after_averaging() -> None:
    model = fit(AdamW(use_ema=True), epochs=1)
    average, weight = model.optimizer._model_variables_moving_average[0], model.weights[0]
    np.testing.assert_array_equal(weight.numpy(), average.numpy())
    go_on(model)


@pytest.mark.slow
def test_load_model_brings_the_optimizer_back(tmp_path: Path) -> None:
    kept = OURS_ONLY | {"keep_info": False}  # what a step told is in no file
    model = fit(AdamW(**OPTIONS, **kept), epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is AdamW
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    same(loaded, model)
    go_on(loaded)
    go_on(model)
    same(loaded, model)


@pytest.mark.slow
def test_a_file_of_ours_opens_without_this_package(tmp_path: Path) -> None:
    model = fit(AdamW(**OPTIONS), epochs=1)
    model.save(tmp_path / "model.keras")
    code = """
import keras, numpy, sys
stock = keras.optimizers.AdamW
try:
    keras.saving.load_model(sys.argv[1])
except TypeError as error:
    assert "Could not locate class" in str(error)
else:
    raise AssertionError
model = keras.saving.load_model(sys.argv[1], custom_objects={"adamw_xla>AdamW": stock})
assert type(model.optimizer) is stock
assert not any(name.startswith("adamw_xla") for name in sys.modules)
numpy.savez(sys.argv[2], *[v.numpy() for v in model.optimizer.variables])
"""
    arguments = [str(tmp_path / "model.keras"), str(tmp_path / "state.npz")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    with np.load(tmp_path / "state.npz") as found:
        for variable, key in zip(model.optimizer.variables, found, strict=True):
            np.testing.assert_array_equal(variable.numpy(), found[key])


@pytest.mark.slow
@pytest.mark.parametrize("cls", [AdamW, Stock], ids=["ours", "stock"])
def test_custom_objects_do_not_exchange_the_classes_once_both_are_known(
    tmp_path: Path, cls: Any
) -> None:
    """What the documentation says of ``load_model``: if Keras changes it, say less."""
    path = tmp_path / "model.keras"
    fit(cls(**OPTIONS), epochs=1).save(path)
    other = Stock if cls is AdamW else AdamW
    names = ("AdamW", "adamw", "adamw_xla>AdamW", "keras.optimizers>AdamW", "Custom>AdamW")
    for key in names:
        loaded = keras.saving.load_model(path, custom_objects={key: other})
        assert type(loaded.optimizer) is cls


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(AdamW, Stock), (Stock, AdamW)])
def test_a_loaded_model_goes_on_with_the_other_class(
    tmp_path: Path, first: Any, second: Any
) -> None:
    path = tmp_path / "model.keras"
    options = OPTIONS | ({"ema_at_every_call": True} if first is AdamW else {})
    fit(first(**options), epochs=1).save(path)
    model, loaded = (keras.saving.load_model(path) for _ in range(2))
    config = loaded.optimizer.get_config()
    if second is AdamW:
        optimizer = AdamW.from_config(config | {"ema_at_every_call": True})
    else:
        optimizer = Stock.from_config({k: v for k, v in config.items() if k not in OURS_ONLY})
    optimizer.build(model.trainable_variables)
    compiled(model, optimizer).load_weights(path)
    assert type(model.optimizer) is second
    same(model, loaded)
    close(go_on(model).trainable_variables, go_on(loaded).trainable_variables)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(AdamW, Stock), (Stock, AdamW)])
def test_bfloat16_state_changes_its_dtype_on_loading(
    tmp_path: Path, first: Any, second: Any
) -> None:
    model = fit(first(1e-2, beta_2=0.5), lambda: mlp("bfloat16"), epochs=1)
    model.save_weights(tmp_path / "model.weights.h5")
    other = compiled(mlp("bfloat16"), second())
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(model.optimizer.variables, other.optimizer.variables, strict=True):
        np.testing.assert_allclose(
            a.numpy().astype(np.float32), b.numpy().astype(np.float32), rtol=2.0**-8
        )


def test_variables_have_the_stock_names_and_order() -> None:
    def named(cls: Any) -> list[tuple[str, Any]]:
        optimizer = cls(**OPTIONS, name="optimizer")
        optimizer.build(
            [keras.Variable(np.zeros(s), name=f"v{i}") for i, s in enumerate([(2,), ()])]
        )
        return [(v.path, v.shape, v.dtype) for v in optimizer.variables]

    assert named(AdamW) == named(Stock)


@pytest.mark.slow
def test_the_distribution_api() -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    script = Path(__file__).with_name("keras_sharded.py")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = python_path()
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.stdout == "passed\n", run.stderr[-3000:]


# ------------------------------------------------------------------------------ configs


def test_the_examples_run() -> None:
    found = doctest.testmod(adamw_xla.keras)
    assert found.attempted > 5
    assert found.failed == 0


def test_the_config_is_the_stock_one_where_nothing_else_is_asked_for() -> None:
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, 10)
    for options in ({}, OPTIONS, {"learning_rate": schedule, "loss_scale_factor": 2.0}):
        ours, theirs = AdamW(**options, name="a"), Stock(**options, name="a")
        assert ours.get_config() == theirs.get_config()
        assert Stock.from_config(ours.get_config()).get_config() == theirs.get_config()
        assert AdamW.from_config(theirs.get_config()).get_config() == theirs.get_config()
    config = AdamW(**OURS_ONLY).get_config()
    assert {name: config[name] for name in OURS_ONLY} == OURS_ONLY
    assert AdamW.from_config(config).get_config() == config


def test_serialization() -> None:
    optimizer = AdamW(1e-2, weight_decay=0.1)
    described = keras.optimizers.serialize(optimizer)
    assert described["registered_name"] == "adamw_xla>AdamW"
    again = keras.saving.deserialize_keras_object(described)
    assert type(again) is AdamW
    assert again.get_config() == optimizer.get_config()
    model = pickle.loads(pickle.dumps(fit(AdamW(), epochs=1)))
    assert type(model.optimizer) is AdamW


@pytest.mark.parametrize("rate", [1, np.float32(0.5), np.asarray(0.25)], ids=str)
def test_any_real_scalar_is_a_learning_rate(rate: Any) -> None:
    optimizer = AdamW(rate)
    assert float(optimizer.learning_rate.numpy()) == float(rate)


# ----------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "beta": ({"beta_1": 1.0}, ValueError, "AdamW: beta_1 must be finite and in"),
    "epsilon": ({"epsilon": -1e-7}, ValueError, "AdamW: epsilon must be"),
    "decay": ({"weight_decay": -0.1}, ValueError, "AdamW: weight_decay must be"),
    "no decay": ({"weight_decay": None}, ValueError, "weight_decay"),
    "rate": ({"learning_rate": "fast"}, TypeError, "AdamW: learning_rate must be a real"),
    "scale": ({"loss_scale_factor": 0.0}, ValueError, "AdamW: loss_scale_factor must be"),
    "clip": ({"clipnorm": -1.0}, ValueError, "AdamW: clipnorm must be"),
    "clips": ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "Only one of `clipnorm`"),
    "steps": ({"gradient_accumulation_steps": 1}, ValueError, "gradient_accumulation_steps"),
    "steps kind": ({"gradient_accumulation_steps": 2.0}, TypeError, "must be an integer"),
    "beta variable": ({"beta_1": keras.Variable(0.9)}, TypeError, "beta_1 must be a real number"),
    "momentum": ({"use_ema": True, "ema_momentum": 2.0}, ValueError, "ema_momentum"),
    "frequency": ({"use_ema": True, "ema_overwrite_frequency": 0}, ValueError, "at least 1"),
    "state": ({"float32_state": 1}, TypeError, "AdamW: float32_state must be True or False"),
    "average": ({"ema_at_every_call": None}, TypeError, "AdamW: ema_at_every_call must be"),
    "unknown": ({"momentum": 0.9}, ValueError, "momentum"),
}


@pytest.mark.parametrize(("options", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        AdamW(**options)


def test_an_option_that_is_assigned_is_checked_at_the_next_trace() -> None:
    optimizer = AdamW()
    optimizer.beta_2 = 1.5
    with pytest.raises(ValueError, match="beta_2 must be"):
        optimizer.apply([np.ones(2)], [keras.Variable(np.ones(2))])


def test_variables_and_gradients_that_do_not_fit_are_named() -> None:
    with pytest.raises(TypeError, match="variable counts has dtype int32"):
        AdamW().build([keras.Variable(np.ones(2, np.int32), dtype="int32", name="counts")])
    variable = keras.Variable(np.ones((2, 3)), name="kernel")
    optimizer = AdamW()
    for grad, shape in ((np.ones(3), r"\(3,\)"), (np.float32(1), r"\(\)"), (1.0, r"\(\)")):
        with pytest.raises(ValueError, match=rf"kernel has shape {shape}; must be \(2, 3\)"):
            optimizer.apply([grad], [variable])
    np.testing.assert_array_equal(variable.numpy(), 1.0)


@pytest.mark.parametrize(
    "name",
    [
        "update_step",
        "_backend_update_step",
        "_apply_weight_decay",
        "_clip_gradients",
        "_clip_by_norm",
        "_update_model_variables_moving_average",
        "_overwrite_model_variables_with_average_value",
    ],
)
def test_a_subclass_with_a_method_that_is_never_called(name: str) -> None:
    method = {name: lambda self, *args: getattr(super(AdamW, self), name)(*args)}
    other = type("Mine", (AdamW,), method)
    with pytest.raises(TypeError, match=rf"AdamW: Mine overrides {name}, .*from keras.optimizers"):
        other()
    called = {"_backend_apply_gradients": Stock._backend_apply_gradients}
    variable = keras.Variable(np.ones(3), name="w")
    type("Whole", (AdamW,), method | called)().apply([np.ones(3, np.float32)], [variable])
    assert np.all(variable.numpy() < 1)


def test_a_subclass_that_overrides_nothing_of_this_kind() -> None:
    class Mine(AdamW):
        def _use_weight_decay(self, variable: Any) -> bool:
            return False

    variable = keras.Variable(np.ones(3), name="w")
    Mine(weight_decay=1e3).apply([np.ones(3, np.float32)], [variable])
    np.testing.assert_allclose(variable.numpy(), 0.999, rtol=1e-6)


def test_another_backend_is_refused() -> None:
    code = "import adamw_xla.keras\nadamw_xla.keras.AdamW()"
    environment = os.environ | {"KERAS_BACKEND": "numpy"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert (
        "Keras runs on the numpy backend; it must run on JAX. Set KERAS_BACKEND=jax" in run.stderr
    )
