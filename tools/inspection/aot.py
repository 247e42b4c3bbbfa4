"""Compiles for hardware that is not there: targets by name, steps as XLA's programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
from pathlib import Path
import re
import sys
import time
from typing import Any

# JAX's plugins read these when they are loaded: no search for devices, no warnings of it.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-4")
# Nothing is run on a TPU here, so several processes may compile at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "4")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "4")


@contextlib.contextmanager
def _native_stderr_to_nowhere() -> Iterator[None]:
    """The plugins' libraries report missing devices before any log level is looked at."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


with _native_stderr_to_nowhere():
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
    import numpy as np

DESCRIPTIONS = Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True)
class Target:
    """Something to compile for.

    Attributes:
      name: what users type.
      platform: as JAX's lowering calls it.
      topology: of the fewest chips that make one (TPU).
      pods: larger ones, in order.
      chips: how many a program must be for; 0: any number.
    """

    name: str
    platform: str
    topology: str = ""
    pods: tuple[str, ...] = ()
    chips: int = 0

    @property
    def kind(self) -> str:
        """Of a device: ``v5e`` of ``v5e:16x16``."""
        return self.name.partition(":")[0]


GPUS_OF_A_HOST = 8
_FLAT = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


def _pods(kind: str, sizes: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{kind}:{size}" for size in sizes)


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "cpu"),
        Target("h100", "cuda"),
        Target("a100", "cuda"),
        Target("b200", "cuda"),
        Target("v4", "tpu", "v4:2x2x1", _pods("v4", _DEEP)),
        Target("v5e", "tpu", "v5e:2x2", _pods("v5e", _FLAT)),
        Target("v5p", "tpu", "v5p:2x2x1", _pods("v5p", _DEEP)),
        Target("v6e", "tpu", "v6e:2x2", _pods("v6e", _FLAT)),
    )
}


def target_of(name: str) -> Target | None:
    """The target of a name, such as ``h100`` or ``v5e:16x16``; None if there is none."""
    kind, _, topology = name.partition(":")
    known = TARGETS.get(kind)
    if known is None or not topology:
        return TARGETS.get(name)
    if known.platform != "tpu" or not re.fullmatch(r"\d+x\d+(x\d+)?", topology):
        return None
    chips = math.prod(_sides(name))
    return dataclasses.replace(known, name=name, topology=name, pods=(name,), chips=chips)


_NEEDS = {
    "cuda": (("jax_cuda12_plugin", "nvidia.cuda_nvcc"), "gpu-compile"),
    "tpu": (("libtpu",), "tpu-compile"),
}
"""For each platform the modules that compile for it, and the extra that installs them."""


class UnavailableError(RuntimeError):
    """This installation cannot compile for a target."""


def check(target: Target) -> None:
    """Raises ``UnavailableError``, naming the pip command, where a compiler is missing."""
    modules, extra = _NEEDS.get(target.platform, ((), ""))
    missing = [module for module in modules if not _is_there(module)]
    if missing:
        raise UnavailableError(
            f"{target.name} needs {' and '.join(missing)}: pip install -e '.[{extra}]'"
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


@functools.cache
def prepare() -> None:
    """Has JAX load its plugins, with all that they have to say of missing devices.

    A device that happens to be there must not be taken for the target: from here on this
    process runs on the CPU.
    """
    jax.config.update("jax_platforms", "cpu")
    with _native_stderr_to_nowhere():
        jax.devices()


def device(target: Target) -> Any:
    """One device of the target: of this machine for ``cpu``, else only its description."""
    return devices(target, 1)[0]


@functools.cache
def devices(target: Target, count: int) -> tuple[Any, ...]:
    """So many devices of the target: of this machine for ``cpu``, else only descriptions.

    Raises:
      UnavailableError: this machine, or the target's topologies, have fewer.
    """
    check(target)
    prepare()
    if target.chips not in (0, count):
        raise UnavailableError(
            f"{target.name} has {target.chips} devices, and the program is for {count}."
        )
    if target.platform == "cpu":
        found = jax.devices("cpu")
        advice = f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
    else:
        with _native_stderr_to_nowhere():
            found = _topology(target, count).devices
        advice = "a mesh must fill a topology that exists"
    if len(found) < count:
        raise UnavailableError(f"{target.name}: {len(found)} devices, {count} needed; {advice}.")
    return tuple(found[:count])


def _topology(target: Target, count: int) -> Any:
    if target.platform == "tpu":
        name = target.topology
        if count > math.prod(_sides(name)):
            name = next((x for x in target.pods if math.prod(_sides(x)) >= count), target.pods[-1])
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=name)
        except jax.errors.JaxRuntimeError as error:
            said = str(error).splitlines()[0]
            raise UnavailableError(f"{target.name}: there is no such topology: {said}") from None
    hosts, each = (1, count) if count <= GPUS_OF_A_HOST else (-(-count // GPUS_OF_A_HOST), 8)
    return topologies.get_topology_desc(
        target.name.upper(),
        platform="cuda",
        target_config=(DESCRIPTIONS / f"{target.name}.txtpb").read_text(),
        topology=f"1x{hosts}x{each}",
    )


def _sides(topology: str) -> list[int]:
    return [int(side) for side in topology.partition(":")[2].split("x")]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program in all its forms.

    Attributes:
      compiled: what JAX returns.
      stablehlo: before XLA.
      trace_seconds: to trace and lower it.
      compile_seconds: that XLA took.
    """

    compiled: Any
    stablehlo: str
    trace_seconds: float
    compile_seconds: float


def compile_for(
    target: Target,
    function: Callable[..., Any],
    args: Sequence[Any],
    donate: Sequence[int] = (),
    mesh: Mesh | None = None,
) -> Program:
    """Compiles ``function`` for one device of ``target``, or for a mesh like that of the args.

    Args:
      target: what to compile for.
      function: any function of arrays; one that ``jax.jit`` returned keeps its own options.
      args: arrays, or ``jax.ShapeDtypeStruct`` in their place; only shapes, dtypes and the
        specs of ``NamedSharding`` matter. Where one lies on a mesh of several devices, the program
        is for a mesh of as many of the target's; what has no spec is whole on each.
      donate: positions of the args to donate, where ``function`` is not jitted yet.
      mesh: of the target's devices, where the args lie on one already.

    Raises:
      UnavailableError: the target has no such mesh.
      MeshError: the args lie on several meshes.
    """
    mesh = mesh or _mesh(target, jax.tree.leaves(tuple(args)))

    def struct(x: Any) -> jax.ShapeDtypeStruct:
        kind = jax.typeof(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
        return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=_place(target, mesh, x))

    if not hasattr(function, "trace"):
        function = jax.jit(function, donate_argnums=tuple(donate))
    structs = jax.tree.map(struct, tuple(args))
    start = time.perf_counter()
    # PartitionSpecs alone, inside of the function, are of the args' mesh.
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        lowered = function.trace(*structs).lower(lowering_platforms=(target.platform,))
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return Program(compiled, lowered.as_text(), lowered_at - start, end - lowered_at)


class MeshError(ValueError):
    """The arguments do not say for which mesh a program is."""


def _mesh(target: Target, leaves: Sequence[Any]) -> Mesh | None:
    """The mesh of the arguments, with the target's devices; None for a single device."""
    meshes = {x.mesh for x in map(_named, leaves) if x is not None and x.mesh.size > 1}
    if not meshes:
        return None
    if len(meshes) > 1:
        kinds = " and ".join(str(dict(mesh.shape)) for mesh in meshes)
        raise MeshError(f"the arguments lie on several meshes: {kinds}")
    (mesh,) = meshes
    found = np.array(devices(target, mesh.size)).reshape(tuple(mesh.shape.values()))
    return Mesh(found, mesh.axis_names, axis_types=mesh.axis_types)


def _place(target: Target, mesh: Mesh | None, x: Any) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(device(target))
    named = _named(x)
    if named is None or named.mesh.size == 1:
        return NamedSharding(mesh, PartitionSpec())
    kept = named.memory_kind if named.memory_kind == "pinned_host" else None
    return NamedSharding(mesh, named.spec, memory_kind=kept)


def _named(x: Any) -> NamedSharding | None:
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
