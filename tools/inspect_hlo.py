"""Compiles an optimizer step for hardware that is not there, and says what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import cli

with cli.extra("inspect_hlo", "inspect"):
    from inspection import aot, asserted, demo_step, inspect_cases, tables
    from inspection.inspect_cases import OURS, Case, CaseError, Inspected
    from inspection.page import files
    import peer_steps
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    import shapes
    import typer

TARGET_HELP = (
    f"What to compile for, of: {', '.join(aot.TARGETS)}, or a TPU pod such as v5e:16x16 or "
    "v5p:8x8x8; may be given several times. GPUs need the extra gpu-compile, TPUs tpu-compile; no "
    "device is needed."
)
MODEL_HELP = (
    f"Shapes of the params: {', '.join(shapes.MODELS)}, or a JSON file with a list of shapes or "
    "an object of name: shape."
)
FUNCTION_HELP = (
    "Inspect a train step of your own in place of a model's optimizer step: a callable without "
    "arguments that returns (function, args), where function is what jax.jit returned, with "
    "your donate_argnums, and args is a tuple of arrays or jax.ShapeDtypeStructs to call it "
    "with. The module is looked for in the current folder too. Without the options that say "
    "what step to make of a model. Given several times, these stand side by side."
)
AGAINST_HELP = (
    "What to compile beside it: a peer's step of the model (optax, keras), or with --function "
    "another version of it, as module:callable; then what changed stands beside each figure."
)
MESH_HELP = (
    "Compile the whole train step of tools/train_lm.py's transformer for many devices: a mesh such "
    "as data=64,model=4, of the axes data, fsdp and model; needs the extra train."
)
DEVICES_HELP = "The same for so many devices; without --mesh all along data."
SIZES_HELP = (
    "Of that transformer, such as layers=24,width=2048; without it "
    f"{','.join(f'{name}={size}' for name, size in demo_step.SIZES.items() if size)}, and "
    f"{demo_step.WINDOWS} windows of text for each part of the batch."
)
ASSERT_HELP = (
    "Exit with status 1 and a list of all that is otherwise in this package's program, or a "
    "--function's: donated, no-gather-of-state, state-sharded-over=AXIS, in-host-memory or "
    "kernels-at-most=N; may be given several times. adamw_xla.hlo.Report.check says what they mean."
)
DUMP_HELP = (
    "Write StableHLO, HLO and an HTML page for each here, and a page for those of one target side "
    "by side."
)
FAIL_HELP = (
    "Exit with status 1 if this package's program, or a --function's, has more kernels than this."
)

OF_A_MODEL = ("model", "clip", "amsgrad", "ema", "accumulate", "dtype")
"""Options that say what step to make of a model; one's own step has all of it."""

OF_A_MESH = ("mesh", "devices", "sizes", "zero1")
"""Options of the transformer's train step."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# Names and paths are the user's: neither [tags] nor :codes: mean anything in them.
errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
output = Console(markup=False, emoji=False)


@app.command()
def main(
    context: typer.Context,
    targets: Annotated[list[str], typer.Option("--target", help=TARGET_HELP)] = ["h100"],  # noqa: B006
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "gpt2-small",
    against: Annotated[list[str] | None, typer.Option(help=AGAINST_HELP)] = None,
    clip: Annotated[str, typer.Option(help="none, global, leaf (norms) or value.")] = "none",
    amsgrad: Annotated[bool, typer.Option("--amsgrad", help="With AMSGrad's maximum.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="With an average of the params.")] = False,
    accumulate: Annotated[
        int | None, typer.Option(min=2, help="Gradient accumulation: calls per update.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of params and gradients.")] = "float32",
    functions: Annotated[list[str] | None, typer.Option("--function", help=FUNCTION_HELP)] = None,
    mesh: Annotated[str | None, typer.Option(help=MESH_HELP)] = None,
    devices: Annotated[int | None, typer.Option(min=1, help=DEVICES_HELP)] = None,
    sizes: Annotated[str | None, typer.Option(help=SIZES_HELP)] = None,
    zero1: Annotated[bool, typer.Option("--zero1", help="Its state is cut over data.")] = False,
    dump: Annotated[Path | None, typer.Option(help=DUMP_HELP)] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all reports into this file.")
    ] = None,
    asked: Annotated[list[str] | None, typer.Option("--assert", help=ASSERT_HELP)] = None,
    fail_above: Annotated[int | None, typer.Option(min=0, help=FAIL_HELP)] = None,
    details: Annotated[
        bool,
        typer.Option("--details", help="Print each program's report and heaviest kernels too."),
    ] = False,
) -> None:
    """Compile an optimizer step for hardware that is not there, and say what becomes of it.

    Kernels are launches by the platform's own rule, see adamw_xla.hlo. Nothing is run: figures
    are the compiler's, and cycles are its estimate. For a GPU or a TPU:

    pip install -e '.\\[inspect,gpu-compile,tpu-compile]'

    Examples:

    inspect_hlo.py --target h100 --model gpt2-small --against optax --clip global --dump out

    inspect_hlo.py --target v5e --function my_project.train:inspected --assert donated

    inspect_hlo.py --target v5e:16x16 --mesh data=64,model=4 --zero1
    """
    chosen = [_target(name) for name in targets]
    given = [name for name in (*OF_A_MODEL, *OF_A_MESH, "against") if _is_given(context, name)]
    options = peer_steps.Options(clip=clip, amsgrad=amsgrad, ema=ema, accumulate=accumulate)
    on_mesh = demo_step.Options(mesh, devices, sizes, zero1)
    is_demo = not functions and (on_mesh != demo_step.Options() or any(x.chips for x in chosen))
    try:
        wanted = asserted.wanted(asked or [])
        for target in chosen:
            aot.check(target)
        aot.prepare()
        if functions:
            cases = _users_steps(functions, against or [], given)
        elif is_demo:
            cases = {x: [demo_step.train_step(on_mesh, x)] for x in _of_a_mesh(chosen, given)}
        else:
            _pick({name: name for name in peer_steps.CLIPS}, clip, "--clip")
            _pick({name: name for name in ("float32", "bfloat16", "float16")}, dtype, "--dtype")
            model_shapes = inspect_cases.load_shapes(model)
            cases = [
                inspect_cases.optimizer_step(who, model_shapes, dtype, options)
                for who in [OURS, *_peers(against)]
            ]
        _check_outputs(dump, json_path)
        jobs = cases if isinstance(cases, dict) else dict.fromkeys(chosen, cases)
        found = _inspect_all([(case, x) for x, of_it in jobs.items() for case in of_it])
    except (CaseError, aot.UnavailableError) as error:
        _fail(str(error))
    _print(found, compared=bool(functions and against), details=details)
    _write(found, dump, json_path)
    own = [x for x in found if x.name in (functions or (OURS, demo_step.NAME))]
    _check(own, fail_above, wanted)


def _users_steps(functions: list[str], against: list[str], given: list[str]) -> list[Case]:
    if others := [name for name in given if name != "against"]:
        names = ", ".join(f"--{name}" for name in others)
        raise CaseError(f"--function compiles the step that it names; leave out {names}.")
    if against and len(functions) > 1:
        raise CaseError("--against compares one --function; leave out the others.")
    cases = [inspect_cases.users_step(path) for path in dict.fromkeys(functions)]
    return cases + [inspect_cases.users_step(path, "--against") for path in dict.fromkeys(against)]


def _of_a_mesh(chosen: list[aot.Target], given: list[str]) -> list[aot.Target]:
    if others := [name for name in given if name not in OF_A_MESH]:
        names = ", ".join(f"--{name}" for name in others)
        raise CaseError(
            "a pod, --mesh, --devices, --sizes and --zero1 are of the transformer's train step; "
            f"leave out {names}."
        )
    return chosen


def _print(found: list[Inspected], *, compared: bool, details: bool) -> None:
    by_target: dict[str, list[Inspected]] = {}
    for x in found:
        by_target.setdefault(x.target, []).append(x)
    # What changed is compared on one target.
    for group in by_target.values() if compared else [found]:
        output.print(tables.programs(group, compared=compared))
    for x in found:
        if x.report.collectives:
            output.print(tables.collectives(x))
        if details:
            print(x.report)
            output.print(tables.kernels(x))


def _inspect_all(jobs: list[tuple[Case, aot.Target]]) -> list[Inspected]:
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, TimeElapsedColumn())
    found = []
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("", total=None)
        for case, target in jobs:
            progress.update(task, description=f"{case.name} for {target.name}")
            found.append(inspect_cases.inspect(case, target))
    return found


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_outputs(dump: Path | None, json_path: Path | None) -> None:
    """Refuses what cannot be written before anything is compiled."""
    if json_path is not None and (problem := cli.file_problem(json_path)):
        _fail(f"--json {json_path}: cannot be written: {problem}.")
    if dump is not None and (problem := cli.folder_problem(dump)):
        _fail(f"--dump {dump}: cannot be written to: {problem}.")


def _write(found: list[Inspected], dump: Path | None, json_path: Path | None) -> None:
    try:
        for path in files.write(found, dump) if dump is not None else []:
            errors.print(f"wrote {path}")
        if json_path is not None:
            json_path.write_text(json.dumps([x.to_json() for x in found], indent=1))
    except OSError as error:
        _fail(f"cannot write {error.filename}: {error.strerror}.")


def _peers(against: list[str] | None) -> list[str]:
    others = [name for name in peer_steps.PEERS if name != OURS]
    return [_pick({name: name for name in others}, name, "--against") for name in against or []]


def _check(own: list[Inspected], bound: int | None, wanted: dict[str, Any]) -> None:
    if wanted and (wrong := asserted.violations(own, wanted)):
        _fail("\n".join(["--assert:", *wrong]), code=1)
    for x in own:
        count = x.report.program.count
        if bound is not None and count > bound:
            _fail(f"{x.name} has {count} kernels on {x.target}; --fail-above {bound}.", code=1)


def _target(name: str) -> aot.Target:
    target = aot.target_of(name)
    if target is None:
        _fail(
            f"--target {name}: must be one of {', '.join(aot.TARGETS)}, or a TPU pod such as "
            "v5e:16x16."
        )
    return target


def _pick(known: dict[str, Any], name: str, option: str) -> Any:
    if name not in known:
        _fail(f"{option} {name}: must be one of {', '.join(known)}.")
    return known[name]


def _fail(message: str, code: int = 2) -> NoReturn:
    errors.print(f"inspect_hlo: {message}", style="red")
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
