"""What ``inspect_hlo.py`` compiles: a model's optimizer step, or anybody's train step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import importlib
from inspect import signature
import json
import math
from pathlib import Path
import sys
from typing import Any

from inspection import aot
import jax
from jax.sharding import Mesh
import numpy as np
import peer_steps
import shapes

import adamw_xla as ax

OURS = "adamw_xla"

MOST_PARAMS = 1 << 48
"""More than any device holds; XLA ends the process where a leaf's bytes exceed 64 bits."""


class CaseError(ValueError):
    """What was asked for cannot be built; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to compile.

    Attributes:
      name: of the one whose step it is.
      function: of ``args``.
      args: arrays or structs.
      donate: positions in ``args``; of a jitted function its own are used.
      parameters: how many params are updated, where that is known; else the report says.
      mesh: of the target's devices, where the args lie on one.
    """

    name: str
    function: Callable[..., Any]
    args: Sequence[Any]
    donate: tuple[int, ...] = ()
    parameters: int | None = None
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A compiled case, read."""

    name: str
    target: str
    program: aot.Program
    text: str
    report: ax.hlo.Report
    parameters: int

    def microseconds(self, number_of_bytes: int) -> float | None:
        """The least time that moving them takes; None where the bandwidth is not known."""
        device = self.target.partition(":")[0]
        known = device in ax.hlo.BANDWIDTHS
        return ax.hlo.microseconds(number_of_bytes, device) if known else None

    def to_json(self) -> dict[str, Any]:
        seconds = {
            "trace_seconds": self.program.trace_seconds,
            "compile_seconds": self.program.compile_seconds,
        }
        found = {**self.report.to_json(), **seconds, "name": self.name, "target": self.target}
        for name in ("program", "update", "norm"):
            part, read = found[name], getattr(self.report, name)
            part["least_microseconds"] = self.microseconds(read.read + read.written)
            for kernel in part["kernels"]:
                each = self.microseconds(kernel["read"] + kernel["written"])
                kernel["least_microseconds"] = each
        return found


def load_shapes(model: str) -> shapes.Shapes:
    """The shapes of a model that is known by name, or listed in a JSON file."""
    if model in shapes.MODELS:
        return shapes.MODELS[model]()
    path = Path(model)
    try:
        if not path.is_file():
            raise CaseError(
                f"--model {model}: is neither a file nor one of {', '.join(shapes.MODELS)}."
            )
        found = json.loads(path.read_text())
    except CaseError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CaseError(f"--model {model}: cannot be read as JSON: {error}.") from None
    if isinstance(found, list):
        found = {str(i): shape for i, shape in enumerate(found)}
    if not isinstance(found, Mapping) or not found:
        raise CaseError(f"--model {model}: must hold a list of shapes, or an object of them.")
    result = {name: _shape(model, name, shape) for name, shape in found.items()}
    if sum(math.prod(max(n, 1) for n in shape) for shape in result.values()) > MOST_PARAMS:
        raise CaseError(f"--model {model}: has more than 2^48 params; no device holds as many.")
    return result


def _shape(model: str, name: str, shape: Any) -> shapes.Shape:
    sizes = shape if isinstance(shape, list) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes):
        raise CaseError(
            f"--model {model}: shape {name} is {shape!r}; must be a list of sizes, such as [768]."
        )
    return tuple(sizes)


def optimizer_step(
    who: str, model_shapes: shapes.Shapes, dtype: str, options: peer_steps.Options
) -> Case:
    """One donated step of ``who`` on gradients that are given."""
    try:
        init, step = peer_steps.PEERS[who](options)
        params = shapes.structs(model_shapes, dtype)
        state = jax.eval_shape(init, params)
    except peer_steps.NotOfferedError as error:
        raise CaseError(f"{error}; leave it out of --against.") from None
    except ModuleNotFoundError as error:
        raise CaseError(f"{who} needs {error.name}: pip install -e '.[peers]'") from None
    count = shapes.num_parameters(model_shapes)
    return Case(who, step, (params, params, state), donate=(0, 2), parameters=count)


def users_step(path: str, option: str = "--function") -> Case:
    """The case that ``module:callable`` returns.

    What the module or the callable itself raises is left to its traceback: it is the user's.
    """
    module_name, _, attribute = path.partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise CaseError(f"{option} {path}: must be module:callable.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise CaseError(f"{option} {path}: {error}.") from None
    build = getattr(module, attribute, None)
    if not callable(build):
        what = (
            f"is of type {type(build).__name__}" if hasattr(module, attribute) else "is not there"
        )
        raise CaseError(f"{option} {path}: {attribute} {what}; must be module:callable.")
    try:
        signature(build).bind()
    except TypeError as error:
        raise CaseError(f"{option} {path}: is called without arguments: {error}.") from None
    except ValueError:  # written in C, and does not say
        pass
    built = build()
    if not (
        isinstance(built, tuple)
        and len(built) == 2
        and callable(built[0])
        and isinstance(built[1], tuple | list)
    ):
        raise CaseError(
            f"{option} {path}: must return (function, args): what jax.jit returned, and a "
            f"tuple of arrays or jax.ShapeDtypeStructs to call it with; got {_kinds(built)}."
        )
    function, args = built[0], tuple(built[1])
    if all(hasattr(function, name) for name in ("donate_first", "donate_rest", "__wrapped__")):
        function, args = _of_arrays(function, args)
    if not hasattr(function, "trace"):
        raise CaseError(
            f"{option} {path}: returned a {type(built[0]).__name__} that jax.jit did not make, "
            "and nothing says what it donates; return jax.jit(function, donate_argnums=...) or "
            "equinox.filter_jit(function, donate=...)."
        )
    for key, leaf in jax.tree_util.tree_leaves_with_path(args):
        if not _has_type(leaf):
            name = f"args{jax.tree_util.keystr(key)}"
            raise CaseError(
                f"{option} {path}: {name} is of type {type(leaf).__name__}; must be an array or "
                "a jax.ShapeDtypeStruct."
            )
    return Case(path, function, args)


def _of_arrays(filtered: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """What ``equinox.filter_jit`` returned as a ``jax.jit`` of its arguments' arrays alone.

    Its own ``lower`` compiles for this machine only; what is no array is a constant to it too.
    """
    function = filtered.__wrapped__
    arrays = jax.tree.map(lambda x: x if _is_array(x) else None, args)

    @functools.wraps(function)
    def step(*given: Any) -> Any:
        whole = jax.tree.map(_first, given, args, is_leaf=lambda x: x is None)
        found = function(*whole)
        return jax.tree.map(lambda x: x if _is_array(x) else None, found)

    donated = [filtered.donate_first, *[filtered.donate_rest] * (len(args) - 1)]
    numbers = tuple(i for i, is_donated in enumerate(donated[: len(args)]) if is_donated)
    return jax.jit(step, donate_argnums=numbers), arrays


def _first(array: Any, other: Any) -> Any:
    return other if array is None else array


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _kinds(built: Any) -> str:
    """``(PjitFunction, int)``: as much as says what is wrong."""
    if not isinstance(built, tuple):
        return type(built).__name__
    return f"({', '.join(type(x).__name__ for x in built)})"


def _has_type(leaf: Any) -> bool:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return True
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


def inspect(case: Case, target: aot.Target) -> Inspected:
    """Compiles and reads a case."""
    try:
        program = aot.compile_for(target, case.function, case.args, case.donate, case.mesh)
    except aot.UnavailableError as error:
        raise CaseError(str(error)) from None
    except aot.MeshError as error:
        raise CaseError(f"{case.name}: {error}; give all of them one mesh.") from None
    except ValueError as error:
        if not any(x in str(error) for x in _OF_OTHER_DEVICES):
            raise
        raise CaseError(
            f"{case.name}: names shardings of this machine's devices where it is jitted or inside, "
            f"and {target.name} has others. Give them to the args alone, as "
            "jax.ShapeDtypeStruct(..., sharding=), and inside name PartitionSpecs of the mesh "
            "that the args lie on, which jax.shard_map takes where it is given no mesh."
        ) from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise DoesNotFitError(f"{case.name} does not fit on {target.name}: {first}") from None
    report = ax.hlo.report(program.compiled)
    text, count = program.compiled.as_text(), case.parameters or report.parameters
    return Inspected(case.name, target.name, program, text, report, count)


_OF_OTHER_DEVICES = (
    "incompatible devices",
    "does not match the sharding on the respective arg",
    "should match the mesh passed to shard_map",
)
"""What JAX says where a function names shardings that are not the arguments'."""


class DoesNotFitError(CaseError):
    """The compiler refuses a program that needs more memory than the device has."""
