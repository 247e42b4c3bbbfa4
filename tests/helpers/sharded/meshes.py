"""Eight devices as meshes: a small model laid out on one, trained, and looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import adamw_xla as ax

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SHAPES = {"in": (16, 32), "out": (32, 16), "bias": (16,)}
LAYOUTS: dict[str, dict[str, P]] = {
    "replicated": {"in": P(), "out": P(), "bias": P()},
    "fsdp": {"in": P("data"), "out": P(None, "data"), "bias": P("data")},
    "tensor": {"in": P(None, "model"), "out": P("model"), "bias": P()},
}
GATHER = re.compile(r"= \(?(\w+)\[([\d,]*)\][^=]* all-gather(?:-start)?\(")


@contextlib.contextmanager
def mesh_of(kind: AxisType, **axes: int) -> Iterator[Mesh]:
    """A mesh, which is the context's where its axes are explicit."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
    with jax.set_mesh(mesh) if kind == EXPLICIT else contextlib.nullcontext():
        yield mesh


def numbers(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {k: (rng.standard_normal(s) / 4).astype(np.float32) for k, s in SHAPES.items()}


def on(mesh: Mesh, layout: str, values: Mapping[str, Any] | None = None) -> dict[str, jax.Array]:
    values = numbers() if values is None else values
    specs = LAYOUTS[layout]
    return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in values.items()}


def batch() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((24, 16)).astype(np.float32)


def batch_on(mesh: Mesh) -> jax.Array:
    return jax.device_put(batch(), NamedSharding(mesh, P("data")))


def loss(params: Any, x: jax.Array) -> jax.Array:
    kept: dict[str, Any] = {}
    bias = params["bias"]
    if EXPLICIT in jax.typeof(x).sharding.mesh.axis_types:
        kept["out_sharding"], bias = P("data", None), jax.sharding.reshard(bias, P())
    hidden = jnp.tanh(jnp.dot(x, params["in"]))
    return jnp.mean((jnp.dot(hidden, params["out"], **kept) + bias - x) ** 2)


Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def step_of(config: ax.AdamW, **kwargs: Any) -> Step:
    def step(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, x)
        return ax.adamw_step(params, grads, state, config, **kwargs)

    return step


def trained(step: Any, params: Any, state: Any, x: Any, steps: int) -> tuple[Any, Any]:
    """After some steps, one at a time: eight devices on few cores may wait too long for each."""
    for _ in range(steps):
        params, state = jax.block_until_ready(step(params, state, x))
    return params, state


@functools.cache
def on_one_device(config: ax.AdamW, steps: int) -> Any:
    params = jax.tree.map(jnp.asarray, numbers())
    return trained(jax.jit(step_of(config)), params, ax.adamw_init(params, config), batch(), steps)


def near(got: Any, want: Any, rtol: float = 1e-6) -> None:
    """Leaf by leaf within this part of the leaf's largest number."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.max(np.abs(x - y)) <= rtol * np.max(np.abs(y)), np.max(np.abs(x - y))


def lies_as(got: Any, want: Any) -> None:
    """Every leaf of a tree lies as in a tree of arrays, shapes or shardings."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, x), place in pairs:
        place = getattr(place, "sharding", place)
        where = jax.tree_util.keystr(path)
        assert x.sharding.is_equivalent_to(place, x.ndim), (where, x.sharding, place)


def gathered(compiled: Any) -> list[tuple[int, ...]]:
    """The shapes that a compiled program's all-gathers make, sorted."""
    found = GATHER.finditer(compiled.as_text())
    return sorted(tuple(int(n) for n in m[2].split(",") if n) for m in found)


class Compilations:
    """Counts what XLA compiles inside of a ``with``."""

    _running: ClassVar[list[Compilations]] = []

    def __enter__(self) -> Compilations:
        self.count = 0
        self._running.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.remove(self)

    @classmethod
    def hear(cls, event: str, seconds: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            for counting in cls._running:
                counting.count += 1


jax.monitoring.register_event_duration_secs_listener(Compilations.hear)
