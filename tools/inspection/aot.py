"""Compiles for hardware that is not there: targets by name, steps as XLA's programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
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
    from jax.sharding import SingleDeviceSharding

DESCRIPTIONS = Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True)
class Target:
    """Something to compile for.

    Attributes:
      name: what users type.
      platform: as JAX's lowering calls it.
      topology: of the fewest chips that make one (TPU).
    """

    name: str
    platform: str
    topology: str = ""


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "cpu"),
        Target("h100", "cuda"),
        Target("a100", "cuda"),
        Target("b200", "cuda"),
        Target("v4", "tpu", "v4:2x2x1"),
        Target("v5e", "tpu", "v5e:2x2"),
        Target("v5p", "tpu", "v5p:2x2x1"),
        Target("v6e", "tpu", "v6e:2x2"),
    )
}

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


@functools.cache
def device(target: Target) -> Any:
    """One device of the target: of this machine for ``cpu``, else only its description."""
    check(target)
    prepare()
    if target.platform == "cpu":
        return jax.devices("cpu")[0]
    with _native_stderr_to_nowhere():
        return _topology(target).devices[0]


def _topology(target: Target) -> Any:
    if target.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    return topologies.get_topology_desc(
        target.name.upper(),
        platform="cuda",
        target_config=(DESCRIPTIONS / f"{target.name}.txtpb").read_text(),
        topology="1x1x1",
    )


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
) -> Program:
    """Compiles ``function`` for one device of ``target``.

    Args:
      target: what to compile for.
      function: any function of arrays; one that ``jax.jit`` returned keeps its own options.
      args: arrays, or ``jax.ShapeDtypeStruct`` in their place; only shapes and dtypes matter.
      donate: positions of the args to donate, where ``function`` is not jitted yet.
    """
    sharding = SingleDeviceSharding(device(target))

    def struct(x: Any) -> jax.ShapeDtypeStruct:
        kind = jax.typeof(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
        return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=sharding)

    if not hasattr(function, "trace"):
        function = jax.jit(function, donate_argnums=tuple(donate))
    structs = jax.tree.map(struct, tuple(args))
    start = time.perf_counter()
    lowered = function.trace(*structs).lower(lowering_platforms=(target.platform,))
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return Program(compiled, lowered.as_text(), lowered_at - start, end - lowered_at)
