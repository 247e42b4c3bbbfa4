"""What a step tells, wherever its leaves lie: the numbers of one device, on every device."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from eight_devices import assert_passed, main
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from sharded.meshes import AUTO, EXPLICIT, GATHER, LAYOUTS, mesh_of, numbers, on

import adamw_xla as ax
from adamw_xla_lowering.rules import streamed

OPTIONS: dict[str, dict[str, Any]] = {
    "unclipped": {},
    "clipped": {"global_clipnorm": 0.5},
    "by_leaf": {"clipnorm": 0.5},
    "words": {"state_format": "word16", "skip_nonfinite": True},
}
MESHES = {"replicated": {"data": 8}, "fsdp": {"data": 8}, "tensor": {"data": 4, "model": 2}}


def told(config: ax.AdamW, info: Any = "per_leaf", **how: Any) -> Any:
    return jax.jit(lambda p, g, s: ax.adamw_step(p, g, s, config, return_info=info, **how))


@functools.cache
def alone(name: str) -> ax.StepInfo:
    config = ax.AdamW(0.01, **OPTIONS[name])
    params = numbers()
    return told(config)(params, numbers(1), ax.adamw_init(params, config))[2]


def same_everywhere(info: Any, want: Any) -> None:
    """Sums of some hundred squares, in another order."""
    for x, y in zip(jax.tree.leaves(info), jax.tree.leaves(want), strict=True):
        for shard in x.addressable_shards:
            np.testing.assert_allclose(shard.data, y, rtol=2e-6)


def laid_out(name: str, kind: Any, layout: str) -> None:
    config = ax.AdamW(0.01, **OPTIONS[name])
    with mesh_of(kind, **MESHES[layout]) as mesh:
        params, grads = on(mesh, layout), on(mesh, layout, numbers(1))
        state, step = ax.adamw_init(params, config), told(config)
        same_everywhere(step(params, grads, state)[2], alone(name))
        # Nothing but sums of squares passes between devices.
        text = step.lower(params, grads, state).compile().as_text()
        assert not GATHER.search(text), text


def manual(name: str, types_tell: bool) -> None:
    specs = LAYOUTS["tensor"]
    names = ("data", "model") if types_tell else specs
    config = ax.AdamW(0.01, **OPTIONS[name], axis_names=names)
    with mesh_of(AUTO, **MESHES["tensor"]) as mesh:
        params, grads = on(mesh, "tensor"), on(mesh, "tensor", numbers(1))
        state = ax.adamw_init(params, config)
        own = jax.tree.map(lambda _: P(), state)
        fields = [k for k in ("m", "v", "words") if getattr(state, k) is not None]
        own = dataclasses.replace(own, **dict.fromkeys(fields, specs))
        step = jax.shard_map(
            lambda p, g, s: ax.adamw_step(p, g, s, config, return_info="per_leaf"),
            mesh=mesh,
            in_specs=(specs, specs, own),
            out_specs=(specs, own, P()),
            check_vma=types_tell,
        )
        compiled = jax.jit(step).lower(params, grads, state).compile()
        same_everywhere(compiled(params, grads, state)[2], alone(name))
        sums = compiled.as_text().count(" all-reduce(")
        # Those of the norms that clip, or look for what is not finite, stand before the update.
        kinds = len(set(specs.values()) - {P()}) if types_tell else 0
        assert sums <= 1 + (name != "unclipped") * max(kinds, 2), sums


def zero1(name: str) -> None:
    config = ax.AdamW(0.01, **OPTIONS[name])
    with mesh_of(AUTO, data=8) as mesh:
        params, grads = on(mesh, "replicated"), on(mesh, "replicated", numbers(1))
        there = ax.sharding.state_shardings(ax.sharding.zero1(mesh, "data", params), config)
        state = jax.device_put(ax.adamw_init(params, config), there)
        step = told(config, state_shardings=there)
        same_everywhere(step(params, grads, state)[2], alone(name))


def offloaded(name: str) -> None:
    streamed.MIN_RUN_BYTES = 64  # several runs, whose sums are added
    config = ax.AdamW(0.01, **OPTIONS[name])
    with mesh_of(AUTO, data=8) as mesh:
        params, grads = on(mesh, "fsdp"), on(mesh, "fsdp", numbers(1))
        there = ax.sharding.state_shardings(params, config, memory_kind="pinned_host")
        state = jax.device_put(ax.adamw_init(params, config), there)
        same_everywhere(told(config, offload=True)(params, grads, state)[2], alone(name))
        whole = told(config, True, offload=True)(params, grads, state)[2]
        same_everywhere(whole, dataclasses.replace(alone(name), per_leaf=None))


def unsaid() -> None:
    """Whose parts a norm is of is to be said for this norm too."""
    config = ax.AdamW(0.01)
    with mesh_of(AUTO, data=8) as mesh:
        params = on(mesh, "fsdp")
        step = jax.shard_map(
            lambda p: ax.adamw_step(p, p, ax.adamw_init(p, config), config, return_info=True)[2],
            mesh=mesh,
            in_specs=(LAYOUTS["fsdp"],),
            out_specs=P(),
        )
        with pytest.raises(
            ValueError, match=r"return_info needs to know, inside of jax\.shard_map"
        ):
            jax.jit(step)(params)


CHECKS = {
    **{
        f"{name}-{kind.name.lower()}-{layout}": functools.partial(laid_out, name, kind, layout)
        for name in OPTIONS
        for kind in (AUTO, EXPLICIT)
        for layout in MESHES
    },
    **{
        f"{name}-manual-{'types' if types_tell else 'tree'}": functools.partial(
            manual, name, types_tell
        )
        for name in OPTIONS
        for types_tell in (True, False)
    },
    **{f"{name}-zero1": functools.partial(zero1, name) for name in OPTIONS},
    **{f"{name}-offload": functools.partial(offloaded, name) for name in OPTIONS},
    "unsaid": unsaid,
}
QUICK = ("unclipped-auto-tensor", "clipped-manual-types", "unsaid")


@pytest.mark.parametrize("check", QUICK)
def test_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__), *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("check", [name for name in CHECKS if name not in QUICK])
def test_everywhere_on_eight_devices(check: str) -> None:
    assert_passed(check, Path(__file__))


if __name__ == "__main__":
    main(CHECKS)
