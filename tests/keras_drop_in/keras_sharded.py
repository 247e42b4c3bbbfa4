"""Keras' Distribution API on eight devices; ``test_keras_state.py`` runs it in a process.

By hand: ``KERAS_BACKEND=jax XLA_FLAGS=--xla_force_host_platform_device_count=8
PYTHONPATH=tests/helpers:tools python tests/keras_drop_in/keras_sharded.py``.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
import keras
from keras_models import close, compiled, fit, mlp, train_step_jaxpr
import numpy as np
import pytest
from small import equations

from adamw_xla.keras import AdamW
from adamw_xla.keras._info import LENGTH

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
    alone = fit(AdamW(**OPTIONS, keep_info=True), epochs=1)
    keras.distribution.set_distribution(distribution)
    ours = fit(AdamW(**OPTIONS, keep_info=True), epochs=1)
    theirs = fit(keras.optimizers.AdamW(**OPTIONS), epochs=1)
    close(ours.trainable_variables, theirs.trainable_variables)
    *state, row = ours.optimizer.variables
    close(state, theirs.optimizer.variables, 2e-5)
    assert row.value.sharding.is_fully_replicated
    assert len(row.value.sharding.device_set) == 8
    np.testing.assert_allclose(row.value, alone.optimizer.variables[-1].value, rtol=1e-4)
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


def by_hand() -> None:
    """``stateless_apply`` inside of ``shard_map`` clips like one device, or says what it lacks."""
    keras.distribution.set_distribution(None)
    specs = {(8, 6): P("x", "y"), (4,): P("x"), (3,): P(), (): P(), (LENGTH,): P()}
    rng = np.random.default_rng(0)
    values = [
        rng.uniform(0.5, 1.5, shape).astype(np.float32)
        for shape in specs
        if shape not in ((), (LENGTH,))
    ]
    grads = [rng.standard_normal((5, *x.shape)).astype(np.float32) for x in values]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def trained(by_hand: bool, vma: bool = True, **options: Any) -> Any:
        def built(values: Any) -> AdamW:
            optimizer = AdamW(0.01, **options)
            optimizer.build([keras.Variable(x) for x in values])
            return optimizer

        state = [x.value for x in built(values).variables]
        mine = [[specs[x.shape] for x in tree] for tree in (values, state)]

        def run(params: Any, state: Any, grads: Any) -> Any:
            for k in range(5):
                params, state = optimizer.stateless_apply(state, [g[k] for g in grads], params)
            return params, state

        # Keras asks for values of its variables' shapes: those of one device's parts.
        places = [jax.sharding.NamedSharding(mesh, spec) for spec in mine[0]]
        pairs = zip(values, places, strict=True)
        parts = [np.zeros(place.shard_shape(x.shape), np.float32) for x, place in pairs]
        optimizer = built(parts if by_hand else values)
        rows = [P(None, *spec) for spec in mine[0]]
        kinds = {"in_specs": (*mine, rows), "out_specs": tuple(mine), "check_vma": vma}
        mapped = jax.shard_map(run, mesh=mesh, **kinds) if by_hand else run
        return jax.jit(mapped)(values, state, grads)

    clips: tuple[dict[str, float], ...] = ({"global_clipnorm": 2.0}, {"clipnorm": 1.0})
    told = {"keep_info": True}
    for more, clip in itertools.product(({}, {"gradient_accumulation_steps": 2}), (*clips, told)):
        options = {**more, **clip, **told}
        want, got = trained(False, **options), trained(True, **options, axis_names=["x", "y"])
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"global_clipnorm .* the optimizer .*=\('x', 'y'\)"):
        trained(True, **clips[0])
    with pytest.raises(ValueError, match=r"keep_info .* the optimizer .*=\('x', 'y'\)"):
        trained(True, **told)
    with pytest.raises(ValueError, match="types do not tell; leave check_vma on, or give the"):
        trained(True, vma=False, **clips[0], axis_names=["x", "y"])
    again = AdamW.from_config(AdamW(axis_names=("x",)).get_config())
    assert again.axis_names == ("x",)
    assert "axis_names" not in AdamW().get_config()


def main() -> None:
    assert jax.device_count() == 8
    by_hand()
    check(data_parallel(), set())
    check(model_parallel(), {"hidden/kernel", "hidden/bias", "scores/kernel"})
    print("passed")


if __name__ == "__main__":
    main()
