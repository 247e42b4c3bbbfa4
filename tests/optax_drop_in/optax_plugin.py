"""A pytest plugin for optax's own tests: those about AdamW, with ours in its place.

    OPTAX_ADAMW=ours python -m pytest -p optax_plugin -c /dev/null --pyargs MODULE...

``OPTAX_ADAMW`` is ``stock``, ``ours``, or ``like_grads`` for ours with
``updates_like_grads=True``. The plugin must be loaded before optax's test modules, which
take the functions by their names when they are imported.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import jax
import optax
from optax._src import alias
import pytest

import adamw_xla.optax


def replace(adamw: Any) -> None:
    """Puts ``adamw`` wherever optax's tests look for the stock ones."""
    for module in (optax, alias):
        module.adamw = adamw
        module.nadamw = functools.partial(adamw, nesterov=True)


match os.environ["OPTAX_ADAMW"]:
    case "ours":
        replace(adamw_xla.optax.adamw)
    case "like_grads":
        replace(functools.partial(adamw_xla.optax.adamw, updates_like_grads=True))


@pytest.fixture(autouse=True)
def new_jax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """optax 0.2.8 compares JAX's version as a string, and takes 0.10 for too old for these."""
    if "sharding_test" in request.node.nodeid:
        monkeypatch.setattr(jax, "__version__", "9")


def arguments(item: pytest.Item) -> str:
    """What absl's parameterization calls the test with; its names are numbers only."""
    function = getattr(item, "obj", None)
    shown = getattr(getattr(function, "__func__", function), "__x_params_repr__", "")
    return re.sub(r"<function (\w+) at \w+>", r"\1", shown)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    about = [x for x in items if re.search(r"_n?adamw$|'n?adamw'", x.name + arguments(x))]
    config.hook.pytest_deselected(items=[x for x in items if x not in about])
    for item in about:
        item.user_properties.append(("arguments", arguments(item)))
    items[:] = about
