"""Update and sum in one program have no more kernels than the native step.

Compiled for this CPU, and for an H100 that need not be there. Behind a clip of the gradients
it is compared with a native step behind the same clip.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import importlib.util
import os
from pathlib import Path
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
import optax
import pytest
from shapes import gpt2_small

import adamw_xla as ax
import adamw_xla.optax as axo

TARGETS = Path(__file__).parent.parent / "tools" / "targets"
CLIP, OUR_CLIP = optax.clip_by_global_norm(1.0), axo.clip_by_global_norm(1.0)
Pair = tuple[Callable[..., Any], Callable[..., Any]]
"""``init(params)`` and ``step(params, grads, state)``."""


def of(transform: Any) -> Pair:
    def step(params: Any, grads: Any, state: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return transform.init, step


def native(clip: Any = None, **options: Any) -> Pair:
    config = ax.AdamW(1e-3, 1e-4, epsilon=1e-8, epsilon_hat=False, **options)

    def step(params: Any, grads: Any, state: Any) -> Any:
        if clip is not None:
            grads, _ = clip.update(grads, optax.EmptyState())
        return ax.adamw_step(params, grads, state, config, implementation="xla")

    return functools.partial(ax.adamw_init, config=config), step


def ours(*front: Any, **options: Any) -> Pair:
    return of(optax.chain(*front, axo.adamw(1e-3, implementation="xla", **options)))


GLOBAL = {"global_clipnorm": 1.0}
CASES: dict[str, tuple[Pair, Pair, str]] = {
    "plain": (ours(), native(), "float32"),
    "bfloat16": (ours(), native(), "bfloat16"),
    "rounded": (ours(updates_like_grads=True), native(), "bfloat16"),
    "clipped": (ours(**GLOBAL), native(**GLOBAL), "float32"),
    "behind_our_clip": (ours(OUR_CLIP), native(OUR_CLIP), "float32"),
    "behind_optax_clip": (ours(CLIP), native(CLIP), "float32"),
    "ema_and_amsgrad": (
        ours(use_ema=True, amsgrad=True),
        native(use_ema=True, amsgrad=True),
        "float32",
    ),
}


def kernels(pair: Pair, shapes: dict[str, Any], dtype: str, device: Any, platform: str) -> int:
    """How many kernels the entry of one donated step launches."""
    init, step = pair
    sharding = SingleDeviceSharding(device)
    params = {k: jax.ShapeDtypeStruct(s, dtype, sharding=sharding) for k, s in shapes.items()}
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init, params),
    )
    traced = jax.jit(step, donate_argnums=(0, 2)).trace(params, params, state)
    text = traced.lower(lowering_platforms=(platform,)).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    launched = r"^ +(?:ROOT )?%\S+ = .*? (fusion|custom-call|copy|reduce|call|conditional|while)\("
    return len(re.findall(launched, entry, re.MULTILINE))


@pytest.mark.parametrize(("mine", "theirs", "dtype"), CASES.values(), ids=CASES)
def test_cpu(mine: Pair, theirs: Pair, dtype: str) -> None:
    shapes = {str(i): shape for i, shape in enumerate([(64, 32), (64, 32), (32,), (32,), ()])}
    device = jax.devices("cpu")[0]
    found, allowed = (kernels(pair, shapes, dtype, device, "cpu") for pair in (mine, theirs))
    assert len(shapes) <= found <= allowed


@pytest.fixture(scope="module")
def h100() -> Any:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("compiling for an H100 needs jax-cuda12-plugin and nvidia-cuda-nvcc-cu12")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    config = (TARGETS / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(
        "H100", platform="cuda", target_config=config, topology="1x1x1"
    )
    return topology.devices[0]


@pytest.mark.parametrize(("mine", "theirs", "dtype"), CASES.values(), ids=CASES)
def test_h100(mine: Pair, theirs: Pair, dtype: str, h100: Any) -> None:
    shapes = gpt2_small()
    found, allowed = (kernels(pair, shapes, dtype, h100, "cuda") for pair in (mine, theirs))
    assert 10 <= found <= allowed


def test_h100_needs_few_kernels(h100: Any) -> None:
    count = functools.partial(
        kernels, shapes=gpt2_small(), dtype="float32", device=h100, platform="cuda"
    )
    assert 5 * count(ours()) < count(of(optax.adamw(1e-3)))
    # The clip's factor is one more operand of each kernel, and may push a leaf out of some.
    behind = count(ours(OUR_CLIP))
    assert behind <= count(native(**GLOBAL)) + 3
    assert 5 * behind < count(ours(CLIP))
