"""What ``inspect_hlo.py`` compiles: a model's optimizer step, or anybody's train step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib
import json
from pathlib import Path
import sys
from typing import Any

import aot
import jax
import peer_steps
import shapes

import adamw_xla as ax

OURS = "adamw_xla"


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
    """

    name: str
    function: Callable[..., Any]
    args: Sequence[Any]
    donate: tuple[int, ...] = ()
    parameters: int | None = None


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A compiled case, read."""

    name: str
    target: str
    program: aot.Program
    text: str
    report: ax.hlo.Report
    parameters: int

    def to_json(self) -> dict[str, Any]:
        seconds = {
            "trace_seconds": self.program.trace_seconds,
            "compile_seconds": self.program.compile_seconds,
        }
        return {**self.report.to_json(), **seconds, "name": self.name, "target": self.target}


def load_shapes(model: str) -> shapes.Shapes:
    """The shapes of a model that is known by name, or listed in a JSON file."""
    if model in shapes.MODELS:
        return shapes.MODELS[model]()
    path = Path(model)
    if not path.is_file():
        raise CaseError(
            f"--model {model}: is neither a file nor one of {', '.join(shapes.MODELS)}."
        )
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CaseError(f"--model {model}: cannot be read as JSON: {error}.") from None
    if isinstance(found, list):
        found = {str(i): shape for i, shape in enumerate(found)}
    if not isinstance(found, Mapping) or not found:
        raise CaseError(f"--model {model}: must hold a list of shapes, or an object of them.")
    return {name: _shape(model, name, shape) for name, shape in found.items()}


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


def users_step(path: str) -> Case:
    """The case that ``module:callable`` returns."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise CaseError(f"--function {path}: must be module:callable.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise CaseError(f"--function {path}: {error}.") from None
    built = build()
    if not isinstance(built, tuple) or len(built) != 2 or not callable(built[0]):
        raise CaseError(
            f"--function {path}: must return (function, args): what jax.jit returned, and a "
            f"tuple of arrays or jax.ShapeDtypeStructs to call it with; got {type(built)}."
        )
    return Case(path, built[0], tuple(built[1]))


def inspect(case: Case, target: aot.Target) -> Inspected:
    """Compiles and reads a case."""
    try:
        program = aot.compile_for(target, case.function, case.args, case.donate)
    except aot.UnavailableError as error:
        raise CaseError(str(error)) from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise DoesNotFitError(f"{case.name} does not fit on {target.name}: {first}") from None
    report = ax.hlo.report(program.compiled)
    text, count = program.compiled.as_text(), case.parameters or report.parameters
    return Inspected(case.name, target.name, program, text, report, count)


class DoesNotFitError(CaseError):
    """The compiler refuses a program that needs more memory than the device has."""
