"""What outlives a process or a trace: exported programs, Flax' checkpoints, configs as keys."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

from comparing import close, same
import equinox as eqx
import flax.serialization
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import adamw_xla as ax
from adamw_xla._saved.static import from_bytes, to_bytes

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "layers": [jnp.ones(3), jnp.ones(2)]}
FULL = ax.AdamW(
    amsgrad=True, use_ema=True, gradient_accumulation_steps=2, skip_nonfinite=True, clipnorm=1.0
)
MASK = {"w": True, "layers": [False, np.bool_(True)]}


def step(params: Any, state: Any, config: ax.AdamW) -> Any:
    return ax.adamw_step(params, jax.tree.map(jnp.cos, params), state, config)


# ------------------------------------------------------------------------ jax.export

EXPORTED: dict[str, ax.AdamW] = {
    "plain": ax.AdamW(),
    "every field": FULL,
    "a mask": ax.AdamW(weight_decay_mask=MASK, weight_decay=0.5),
    "a mask for all": ax.AdamW(weight_decay_mask=(False)),
    "a dtype": ax.AdamW(state_dtype=jnp.bfloat16, name="mine", ema_momentum=0.5),
    "names of axes": ax.AdamW(axis_names=("x", "y")),
    "specs": ax.AdamW(axis_names={"w": P("x", ("y", "z"), None), "layers": [P(), ("x",)]}),
    "rules": ax.AdamW(skip_spikes=ax.SpikeRule(), groups=(ax.Group("w", scale=2.0),)),
    "stacks": ax.AdamW(clipnorm=1.0, stacked=("^w", "layers/0")),
    "other choices": ax.AdamW(
        epsilon_hat=False, nesterov=True, use_ema=True, ema_overwrite_frequency=3
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_a_function_of_the_config_is_exported(config: ax.AdamW) -> None:
    args = PARAMS, ax.adamw_init(PARAMS, config), config
    data = export.export(jax.jit(step), platforms=("cpu", "cuda"))(*args).serialize()
    loaded = export.deserialize(data)
    other = dataclasses.replace(config, learning_rate=0.25)
    for c in (config, other):
        close(loaded.call(PARAMS, args[1], c), jax.jit(step)(PARAMS, args[1], c))
    with pytest.raises(ValueError, match="tree"):
        loaded.call(PARAMS, args[1], dataclasses.replace(config, nesterov=not config.nesterov))


def test_a_program_is_read_where_only_this_package_is() -> None:
    state = ax.adamw_init(PARAMS, FULL)
    data = export.export(jax.jit(step), platforms=("cpu",))(PARAMS, state, FULL).serialize()
    read = export.deserialize(data)
    (_, _, config), _ = jax.tree.unflatten(read.in_tree, range(read.in_tree.num_leaves))
    assert config.gradient_accumulation_steps == 2
    assert isinstance(config, ax.AdamW)


NOT_EXPORTED: dict[str, tuple[ax.AdamW, str]] = {
    "a schedule": (ax.AdamW(optax.constant_schedule(0.1)), "learning_rate is a callable"),
    "a decay schedule": (ax.AdamW(weight_decay=lambda count: 0.1), "weight_decay is a callable"),
    "a mask function": (
        ax.AdamW(weight_decay_mask=lambda p: True),
        "weight_decay_mask is a callable",
    ),
    "stacks by a function": (
        ax.AdamW(stacked=lambda path, leaf: True),
        "stacked is a callable",
    ),
    "a mask of a class": (
        ax.AdamW(weight_decay_mask=optax.EmptyState()),
        "weight_decay_mask has a EmptyState in it",
    ),
    "axes of a class": (
        ax.AdamW(axis_names=optax.ScaleByScheduleState(("x",))),
        "axis_names has a ScaleByScheduleState in it",
    ),
    "a mask of numbered layers": (ax.AdamW(weight_decay_mask={0: True}), "mask has a dict in it"),
}


@pytest.mark.parametrize(("config", "text"), NOT_EXPORTED.values(), ids=NOT_EXPORTED)
def test_what_no_file_holds(config: ax.AdamW, text: str) -> None:
    exported = export.export(jax.jit(lambda config: jnp.ones(())))(config)
    with pytest.raises(TypeError, match=f"AdamW: .*{text}.*close over the config"):
        exported.serialize()


def test_a_file_from_before_an_option_is_read_with_its_default() -> None:
    _, static = FULL.tree_flatten_with_keys()
    fields = json.loads(to_bytes(ax.AdamW._CHOICES, static))
    del fields["axis_names"]
    assert from_bytes(ax.AdamW._CHOICES, json.dumps(fields).encode()) == static


# ------------------------------------------------------------- flax.serialization


@pytest.mark.parametrize("config", [ax.AdamW(), FULL], ids=["plain", "every field"])
def test_flax_writes_and_reads_a_state(config: ax.AdamW) -> None:
    template = ax.adamw_init(PARAMS, config)
    _, state = step(PARAMS, template, config)
    as_dict = flax.serialization.to_state_dict(state)
    assert set(as_dict) == {field.name for field in dataclasses.fields(state)}
    assert set(as_dict["m"]["layers"]) == {"0", "1"}
    same(flax.serialization.from_state_dict(template, as_dict), state)
    data = flax.serialization.to_bytes({"opt": state})
    again = flax.serialization.from_bytes({"opt": template}, data)["opt"]
    same(again, state)
    same(step(PARAMS, again, config), step(PARAMS, state, config))
    same(flax.serialization.msgpack_restore(data)["opt"]["v"]["w"], state.v["w"])


def test_flax_reads_no_other_state() -> None:
    template = ax.adamw_init(PARAMS, ax.AdamW())
    full = flax.serialization.to_state_dict(ax.adamw_init(PARAMS, FULL))
    said = r"AdamWState.v_max: the file has it, and the template lacks it; .*adapt_state\(state, pa"
    with pytest.raises(ValueError, match=said):
        flax.serialization.from_state_dict(template, full)
    said = r"AdamWState: .* has the fields \['count'\]; must have .* another version.*adapt_state"
    with pytest.raises(ValueError, match=said):
        flax.serialization.from_state_dict(template, {"count": 0})
    same(ax.adapt_state(full, PARAMS, ax.AdamW()), template)


def test_flax_may_come_later_or_never() -> None:
    code = """
import sys, jax.numpy as jnp, adamw_xla as ax
config, params = ax.AdamW(), jnp.ones(3)
state = ax.adamw_init(params, config)
assert "flax" not in sys.modules
import flax.serialization as s
_, state = ax.adamw_step(params, params, state, config)
again = s.from_bytes(ax.adamw_init(params, config), s.to_bytes(state))
print(type(again).__name__, again.count)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["AdamWState", "1"], run.stderr


# ------------------------------------------------------------------- configs as keys

CONFIGS: dict[str, Any] = {
    "a dict": lambda: ax.AdamW(weight_decay_mask={"w": True, "layers": [False, True]}),
    "arrays in a mask": lambda: ax.AdamW(
        weight_decay_mask={"w": jnp.array(True), "layers": [np.array(False), True]}
    ),
    "an array": lambda: ax.AdamW(jnp.float32(0.1)),
    "numpy": lambda: ax.AdamW(np.float32(0.1), beta_2=np.array(0.9)),
    "a schedule": lambda: ax.AdamW(abs),
    "every field": lambda: dataclasses.replace(FULL, weight_decay_mask=MASK),
}


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_a_config_may_be_static(make: Any) -> None:
    config, again = make(), make()
    assert config == again
    assert hash(config) == hash(again)
    assert config != dataclasses.replace(config, epsilon=0.5)
    assert hash(config) != hash(dataclasses.replace(config, nesterov=True))
    if not callable(config.learning_rate):
        traces = []

        @functools.partial(jax.jit, static_argnames="config")
        def static_step(params: Any, state: Any, config: ax.AdamW) -> Any:
            traces.append(config)
            return step(params, state, config)

        state = ax.adamw_init(PARAMS, config)
        same(static_step(PARAMS, state, config), static_step(PARAMS, state, again))
        assert len(traces) == 1


def test_what_compiles_to_other_numbers_is_another_key() -> None:
    rates = [0.5, np.float32(0.5), jnp.float32(0.5), np.float16(0.5), jnp.bfloat16(0.5)]
    assert len({ax.AdamW(rate) for rate in rates}) == len(rates)
    assert ax.AdamW(weight_decay_mask={"w": True}) != ax.AdamW(weight_decay_mask={"w": False})
    assert ax.AdamW() != "adamw"


# ------------------------------------------------------------------ Equinox' compiled


def test_a_report_of_what_equinox_compiled() -> None:
    config = ax.AdamW()
    state = ax.adamw_init(PARAMS, config)
    ours = functools.partial(step, config=config)
    compiled = eqx.filter_jit(ours, donate="all").lower(PARAMS, state).compile()
    wanted = jax.jit(ours, donate_argnums=(0, 1)).lower(PARAMS, state).compile()
    report, plain = ax.hlo.report(compiled), ax.hlo.report(wanted)
    assert report.update.count == plain.update.count > 0
    assert (len(report.in_place), len(report.undonated)) == (10, 0)
    assert report.temporary_bytes is not None
    with pytest.raises(TypeError, match=r"lowered, and not compiled; add .compile\(\)"):
        ax.hlo.report(eqx.filter_jit(ours).lower(PARAMS, state))
