"""Writes the compiled programs beside it anew: ``python tests/hlo/goldens/make.py``.

From a checkout with the extras gpu-compile and tpu-compile; those of the jaxlib that is installed,
0.10 or 0.12. ``programs`` also serves tests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import sys
from typing import Any

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[2] / "tools"))

from inspection import aot  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxlib  # noqa: E402
import shapes  # noqa: E402

import adamw_xla as ax  # noqa: E402

TARGETS = {
    "0.10": {
        "cpu": ("step", "clip", "train"),
        "h100": ("step", "clip", "train", "accumulate"),
        "v5e": ("step", "clip", "train", "accumulate"),
    },
    "0.12": {"cpu": ("clip",), "h100": ("train",), "v5e": ("train",)},
}
"""By jaxlib's version, and of each compiler, which programs."""

FOLDERS = {"0.10": FOLDER, "0.12": FOLDER / "0.12"}
STEP = {"a": (256, 128), "b": (256, 128), "c": (128,), "d": (128,), "e": (3, 5, 7)}
TRAIN = {"embed": (64, 32), "layers.b": (4, 32), "layers.w": (4, 32, 32)}

Program = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]
"""A function, its arguments, and which of them to donate."""


def step(config: ax.AdamW) -> Program:
    """One optimizer step on gradients that are given."""
    params = shapes.structs(STEP)
    state = jax.eval_shape(lambda p: ax.adamw_init(p, config), params)

    def function(params: Any, grads: Any, state: Any) -> Any:
        return ax.adamw_step(params, grads, state, config)

    return function, (params, params, state), (0, 2)


def train(config: ax.AdamW, donate: tuple[int, ...] = (0, 1)) -> Program:
    """A whole train step, with its layers scanned."""
    params = shapes.structs(TRAIN)
    state = jax.eval_shape(lambda p: ax.adamw_init(p, config), params)

    def loss_fn(params: Any, tokens: Any) -> Any:
        def layer(h: Any, weights: Any) -> Any:
            w, b = weights
            return h + jnp.tanh(h @ w + b), None

        h, _ = jax.lax.scan(
            layer, params["embed"][tokens], (params["layers.w"], params["layers.b"])
        )
        return -jnp.mean(jax.nn.log_softmax(h @ params["embed"].T)[:, 0])

    def train_step(params: Any, state: Any, tokens: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        params, state = ax.adamw_step(params, grads, state, config)
        return params, state, loss

    return train_step, (params, state, jax.ShapeDtypeStruct((16,), jnp.int32)), donate


def programs() -> dict[str, Program]:
    """Everything that is compiled, by the middle of its file's name."""
    return {
        "step": step(ax.AdamW()),
        "clip": step(ax.AdamW(global_clipnorm=1.0)),
        "train": train(ax.AdamW(global_clipnorm=1.0)),
        "accumulate": step(ax.AdamW(gradient_accumulation_steps=2)),
    }


def main() -> None:
    # Source locations would put this checkout's folders into the text.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    found = programs()
    version = ".".join(jaxlib.__version__.split(".")[:2])
    for target, names in TARGETS[version].items():
        for name in names:
            function, args, donate = found[name]
            compiled = aot.compile_for(aot.TARGETS[target], function, args, donate).compiled
            (FOLDERS[version] / f"{target}.{name}.hlo").write_text(compiled.as_text())


if __name__ == "__main__":
    main()
