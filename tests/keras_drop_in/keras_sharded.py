"""Keras' Distribution API on eight devices; ``test_keras_state.py`` runs it in a process.

By hand: ``KERAS_BACKEND=jax XLA_FLAGS=--xla_force_host_platform_device_count=8
PYTHONPATH=tests/helpers:tools python tests/keras_drop_in/keras_sharded.py``.
"""

from __future__ import annotations

from typing import Any

import jax
import keras
from keras_models import close, compiled, fit, mlp, train_step_jaxpr
from small import equations

from adamw_xla.keras import AdamW

OPTIONS = {
    "learning_rate": 3e-3,
    "beta_2": 1 - 2.0**-10,
    "amsgrad": True,
    "use_ema": True,
    "global_clipnorm": 0.5,
}


def data_parallel() -> Any:
    return keras.distribution.DataParallel()


def model_parallel() -> Any:
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), jax.devices())
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*hidden/kernel"] = (None, "model")
    layout[".*hidden/bias"] = ("model",)
    layout[".*scores/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def check(distribution: Any, split: set[str]) -> None:
    """Trains like the stock class and like one device; state lies where its variable does."""
    keras.distribution.set_distribution(None)
    alone = fit(AdamW(**OPTIONS), epochs=1)
    keras.distribution.set_distribution(distribution)
    ours, theirs = fit(AdamW(**OPTIONS), epochs=1), fit(keras.optimizers.AdamW(**OPTIONS), epochs=1)
    close(ours.trainable_variables, theirs.trainable_variables)
    close(ours.optimizer.variables, theirs.optimizer.variables, 2e-5)
    close(ours.trainable_variables, alone.trainable_variables)
    assert len(equations(train_step_jaxpr(ours).jaxpr)) == 1
    assert split_variables(ours) == split
    half = compiled(mlp("bfloat16"), AdamW(**OPTIONS))
    half.optimizer.build(half.trainable_variables)
    assert split_variables(half) == split


def split_variables(model: keras.Model) -> set[str]:
    """Which variables lie in parts; each one's state must lie as it does."""
    found = set()
    for variable in model.trainable_variables:
        prefix = variable.path.replace("/", "_") + "_"
        own = [v for v in model.optimizer.variables if f"/{prefix}" in v.path]
        assert len(own) == 4, [v.path for v in model.optimizer.variables]
        for state in own:
            where = variable.value.sharding
            assert state.value.sharding.is_equivalent_to(where, variable.ndim), state.path
        if not variable.value.sharding.is_fully_replicated:
            found.add("/".join(variable.path.split("/")[-2:]))
    return found


def main() -> None:
    assert jax.device_count() == 8
    check(data_parallel(), set())
    check(model_parallel(), {"hidden/kernel", "hidden/bias", "scores/kernel"})
    print("passed")


if __name__ == "__main__":
    main()
