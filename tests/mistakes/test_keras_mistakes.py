"""Mistakes with the drop-in for Keras, answered in Keras' words."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest

import adamw_xla as ax
import adamw_xla.keras
from adamw_xla.keras import AdamW

KEYWORDS = {
    "lr": "here it is learning_rate.",
    "b1": "here it is beta_1.",
    "betas": "here it is beta_1 and beta_2.",
    "eps": "here it is epsilon.",
    "wd": "here it is weight_decay.",
    "mask": "call exclude_from_weight_decay(...) of the optimizer.",
    "weight_decay_mask": "call exclude_from_weight_decay(...) of the optimizer.",
    "mu_dtype": "here it is float32_state.",
    "max_norm": "here it is global_clipnorm.",
    "axis_name": "here it is axis_names.",
    "nesterov": "stock Keras has none either; adamw_xla.AdamW has nesterov.",
    "stacked": "Keras' layers have variables of their own",
    "skip_spikes": "an optimizer's variables are stock Keras'",
    "epsilon_hat": "stock Keras has none either; adamw_xla.AdamW has epsilon_hat.",
    "cautious_decay": "stock Keras has none either; adamw_xla.AdamW has cautious_decay.",
    "maximize": "pass a loss of the other sign.",
    "param_groups": "an optimizer of its own, in keras.optimizers.MultiOptimizer.",
    "state_format": "stock Keras', which its files have; adamw_xla.adamw_step has it.",
    "return_info": "here it is keep_info.",
    "skip_nonfinite": "keras.optimizers.LossScaleOptimizer skips such steps.",
}


@pytest.mark.parametrize(("keyword", "advice"), KEYWORDS.items())
def test_keywords(refused: Any, keyword: str, advice: str) -> None:
    refused(lambda: AdamW(**{keyword: 0.5}), TypeError, f"AdamW: has no argument {keyword}", advice)


def test_every_option_of_the_config_is_here_or_answered(refused: Any) -> None:
    here = inspect.signature(AdamW).parameters
    for name in {field.name for field in dataclasses.fields(ax.AdamW)} - {*here}:
        refused(lambda name=name: AdamW(**{name: None}), TypeError, f"has no argument {name}; ")


def test_what_nobody_knows_is_answered_by_keras() -> None:
    with pytest.raises(ValueError, match="not recognized"):
        AdamW(fused=True)


def variable(dtype: str = "float32") -> keras.Variable:
    return keras.Variable(np.ones(3), dtype=dtype, name="kernel")


Call = Callable[[], Any]
CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    "one axis": (
        lambda: AdamW(axis_names="data"),
        TypeError,
        "axis_names | got 'data' | one name is ('data',)",
    ),
    "no rate": (lambda: AdamW(None), TypeError, "learning_rate | got None | 0 is for none"),
    "a word": (lambda: AdamW("1e-3"), TypeError, "learning_rate | '1e-3' | the number itself"),
    "what makes schedules": (
        lambda: AdamW(lambda first, last: 0.1),
        TypeError,
        "learning_rate | with the step count alone | call it, and pass what it returns",
    ),
    "info of each leaf": (
        lambda: AdamW(keep_info="per_leaf"),
        ValueError,
        'keep_info must be True or False | adamw_step(..., return_info="per_leaf")',
    ),
    "info that is not kept": (
        lambda: AdamW().info,
        AttributeError,
        'keep_info=True | AdamW.from_config(optimizer.get_config() | {"keep_info": True})',
    ),
    "beta": (lambda: AdamW(beta_1=None), TypeError, "beta_1 | got None | leave it out"),
    "integers": (
        lambda: AdamW().build([variable("int32")]),
        TypeError,
        "int32 | variable kernel | Set its trainable=False",
    ),
    "a scalar for a gradient": (
        lambda: AdamW().apply([np.float32(1)], [variable()]),
        ValueError,
        "has shape () | variable kernel | must be (3,)",
    ),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_calls(refused: Any, case: Any) -> None:
    call, error, parts = case
    refused(call, error, *parts.split(" | "))


@pytest.mark.parametrize(
    "rate", [lambda: 0.25, keras.optimizers.schedules.ExponentialDecay(0.25, 1, 1.0)]
)
def test_a_rate_that_is_called(rate: Any) -> None:
    weight = variable()
    AdamW(rate, weight_decay=0.0, epsilon=0.0).apply([np.ones(3, np.float32)], [weight])
    np.testing.assert_allclose(weight.numpy(), 0.75, rtol=1e-6)


STEPS: dict[str, tuple[int | None, int, int | None, str]] = {
    "in a sum": (4, 3, 2, "become 2 | 3 of 4 gradients are summed | after 1 more"),
    "the next sum": (4, 4, 3, "become 3 | after 4 calls: the next sum | after 8 more"),
    "off in a sum": (4, 2, None, "become None | 2 of 4 gradients are summed | after 2 more"),
    "no sums": (None, 0, 2, "become 2 | was built with None | from get_config()"),
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_other_accumulation_steps_where_a_mean_would_be_wrong(refused: Any, case: Any) -> None:
    old, calls, new, parts = case
    optimizer = AdamW(gradient_accumulation_steps=old)
    weight = variable()
    optimizer.build([weight])
    for _ in range(calls):
        optimizer.apply([np.ones(3, np.float32)], [weight])

    def change() -> None:
        optimizer.gradient_accumulation_steps = new

    refused(change, ValueError, "AdamW: gradient_accumulation_steps", *parts.split(" | "))
    assert optimizer.gradient_accumulation_steps == old


def test_other_accumulation_steps_between_updates() -> None:
    optimizer = AdamW(0.25, weight_decay=0.0, beta_1=0.0, gradient_accumulation_steps=4)
    weight = variable()
    for _ in range(4):
        optimizer.apply([np.ones(3, np.float32)], [weight])
    optimizer.gradient_accumulation_steps = 2
    for _ in range(2):
        optimizer.apply([np.full(3, 3.0, np.float32)], [weight])
    np.testing.assert_allclose(optimizer._momentums[0].numpy(), 3.0, rtol=1e-6)


BACKENDS: dict[str, tuple[dict[str, Any] | None, dict[str, str], str | None]] = {
    "nothing": (None, {}, "tensorflow"),
    "a file": ({"backend": "torch"}, {}, "torch"),
    "a file without it": ({"floatx": "float32"}, {}, "tensorflow"),
    "an empty variable": ({"backend": "torch"}, {"KERAS_BACKEND": ""}, "torch"),
    "the variable first": ({"backend": "jax"}, {"KERAS_BACKEND": "tensorflow"}, "tensorflow"),
    "a file of jax": ({"backend": "jax"}, {}, None),
    "a variable of jax": ({"backend": "torch"}, {"KERAS_BACKEND": "jax"}, None),
}


@pytest.mark.parametrize("home", ["KERAS_HOME", "HOME"])
@pytest.mark.parametrize("case", BACKENDS.values(), ids=BACKENDS)
def test_the_backend_is_known_before_keras_is_imported(
    refused: Any, case: Any, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, environment, name = case
    folder = tmp_path / ".keras"
    folder.mkdir()
    if file is not None:
        (folder / "keras.json").write_text(json.dumps(file))
    for variable in ("KERAS_BACKEND", "KERAS_HOME"):
        monkeypatch.delenv(variable, raising=False)
    places = {"KERAS_HOME": str(folder), "HOME": str(tmp_path)}
    for variable, value in {home: places[home], **environment}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delitem(sys.modules, "keras")
    if name is None:
        importlib.reload(adamw_xla.keras)
    else:
        said = (f"runs on the {name} backend", "adamw_xla.keras", "Set KERAS_BACKEND=jax before")
        refused(lambda: importlib.reload(adamw_xla.keras), RuntimeError, *said)


def test_it_is_not_keras_that_answers(tmp_path: Path) -> None:
    known = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    run = subprocess.run(
        [sys.executable, "-c", "import adamw_xla.keras"],
        env=known | {"KERAS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.stderr.strip().splitlines()[-1] == (
        "RuntimeError: adamw_xla.keras.AdamW: Keras runs on the tensorflow backend; it must run "
        "on JAX. Set KERAS_BACKEND=jax before Keras is imported, or use keras.optimizers.AdamW."
    )


def test_without_keras_the_error_says_what_to_install(
    refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    said = ("adamw_xla.keras", "needs keras, which is not installed", "pip install 'keras>=3.15'")
    refused(lambda: importlib.reload(adamw_xla.keras), ModuleNotFoundError, *said)
