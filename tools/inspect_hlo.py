"""Compiles an optimizer step for hardware that is not there, and says what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import cli

with cli.extra("inspect_hlo", "inspect"):
    from inspection import aot, inspect_cases, inspect_page
    from inspection.inspect_cases import OURS, CaseError, Inspected
    import peer_steps
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    import shapes
    import typer

    from adamw_xla.hlo import Report, size

TARGET_HELP = (
    f"What to compile for, of: {', '.join(aot.TARGETS)}; may be given several times. GPUs need "
    "the extra gpu-compile, TPUs tpu-compile; no device is needed."
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
FAIL_HELP = (
    "Exit with status 1 if this package's program, or a --function's, has more kernels than this."
)

OF_A_MODEL = ("model", "against", "clip", "amsgrad", "ema", "accumulate", "dtype")
"""Options that say what step to make of a model; one's own step has all of it."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# Names and paths are the user's: neither [tags] nor :codes: mean anything in them.
errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
output = Console(markup=False, emoji=False)


@app.command()
def main(
    context: typer.Context,
    targets: Annotated[list[str], typer.Option("--target", help=TARGET_HELP)] = ["h100"],  # noqa: B006
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "gpt2-small",
    against: Annotated[
        list[str] | None, typer.Option(help="A peer to compile beside it: optax, keras.")
    ] = None,
    clip: Annotated[str, typer.Option(help="none, global, leaf (norms) or value.")] = "none",
    amsgrad: Annotated[bool, typer.Option("--amsgrad", help="With AMSGrad's maximum.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="With an average of the params.")] = False,
    accumulate: Annotated[
        int | None, typer.Option(min=2, help="Gradient accumulation: calls per update.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of params and gradients.")] = "float32",
    functions: Annotated[list[str] | None, typer.Option("--function", help=FUNCTION_HELP)] = None,
    dump: Annotated[
        Path | None, typer.Option(help="Write StableHLO, HLO and an HTML page for each here.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all reports into this file.")
    ] = None,
    fail_above: Annotated[int | None, typer.Option(min=0, help=FAIL_HELP)] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Print the whole report of each program too.")
    ] = False,
) -> None:
    """Compile an optimizer step for hardware that is not there, and say what becomes of it.

    Kernels are launches by the platform's own rule, see adamw_xla.hlo. Nothing is run: figures
    are the compiler's, and cycles are its estimate. For a GPU or a TPU:

    pip install -e '.\\[inspect,gpu-compile,tpu-compile]'

    Examples:

    inspect_hlo.py --target h100 --model gpt2-small --against optax --clip global --dump out

    inspect_hlo.py --target v5e --function my_project.train:inspected --fail-above 300
    """
    given = [name for name in OF_A_MODEL if _is_given(context, name)]
    if functions and given:
        names = ", ".join(f"--{name}" for name in given)
        _fail(f"--function compiles the step that it names; leave out {names}.")
    chosen = [_pick(aot.TARGETS, name, "--target") for name in targets]
    options = peer_steps.Options(clip=clip, amsgrad=amsgrad, ema=ema, accumulate=accumulate)
    if clip not in peer_steps.CLIPS:
        _fail(f"--clip {clip}: must be one of {', '.join(peer_steps.CLIPS)}.")
    try:
        for target in chosen:
            aot.check(target)
        aot.prepare()
        if functions:
            cases = [inspect_cases.users_step(path) for path in dict.fromkeys(functions)]
        else:
            _pick({name: name for name in ("float32", "bfloat16", "float16")}, dtype, "--dtype")
            model_shapes = inspect_cases.load_shapes(model)
            cases = [
                inspect_cases.optimizer_step(who, model_shapes, dtype, options)
                for who in [OURS, *_peers(against)]
            ]
        _check_outputs(dump, json_path)
        found = _inspect_all(cases, chosen)
    except (CaseError, aot.UnavailableError) as error:
        _fail(str(error))
    output.print(table(found))
    for inspected in found:
        if details:
            print(inspected.report)
    _write(found, dump, json_path)
    _check_counts(found, functions or [cases[0].name], fail_above)


def table(found: list[Inspected]) -> Table:
    """One column for each program; rows that say nothing of any are left out."""
    result = Table()
    result.add_column("")
    for x in found:
        result.add_column(f"{x.name}\n{x.target}", justify="right")
    for label, cells in rows(found).items():
        if any(cells):
            result.add_row(label, *cells)
    return result


def rows(found: list[Inspected]) -> dict[str, list[str]]:
    """What the table says, by row."""
    cells: dict[str, list[str]] = {}
    for x in found:
        report = x.report
        memory, cycles = report.temporary_bytes, report.program.estimated_cycles
        kinds = "\n".join(f"{n} {kind}" for kind, n in report.program.by_kind.items())
        column = {
            "kernels": str(report.program.count),
            "of which the update": str(report.update.count or ""),
            "of which the norm": str(report.norm.count or ""),
            "by kind": kinds,
            "devices": str(report.devices) if report.devices > 1 else "",
            "exchanged": _exchanged(report, None),
            "of it by the update": _exchanged(report, "update"),
            "of it by the norm": _exchanged(report, "norm"),
            "bytes per param": _per_param(x),
            "of which the update's": _of_update(report),
            "temporaries": "?" if memory is None else size(memory),
            "donated, not in place": str(len(report.undonated)),
            "trace and lower": f"{x.program.trace_seconds:.2f} s",
            "compile": f"{x.program.compile_seconds:.2f} s",
            "cycles (estimate)": "" if cycles is None else f"{cycles:,}",
        }
        for label, text in column.items():
            cells.setdefault(label, []).append(text)
    return cells


def _per_param(x: Inspected) -> str:
    moved = x.report.program.read + x.report.program.written
    return f"{moved / x.parameters:.1f}" if x.parameters else ""


def _of_update(report: Report) -> str:
    moved = report.per_parameter(report.update.read + report.update.written)
    return f"{moved:.1f}" if moved else ""


def _exchanged(report: Report, part: str | None) -> str:
    """Bytes that a device exchanges, of all or of a part of the program."""
    sizes = (
        (x.bytes if part is None else x.bytes_of.get(part, 0)) * (x.times or 1)
        for x in report.collectives
    )
    total = sum(sizes)
    return size(total) if total else ""


def _inspect_all(cases: list[inspect_cases.Case], targets: list[aot.Target]) -> list[Inspected]:
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, TimeElapsedColumn())
    found = []
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("", total=None)
        for target in targets:
            for case in cases:
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
        for inspected in found if dump is not None else []:
            for path in inspect_page.write(inspected, dump):
                errors.print(f"wrote {path}")
        if json_path is not None:
            json_path.write_text(json.dumps([x.to_json() for x in found], indent=1))
    except OSError as error:
        _fail(f"cannot write {error.filename}: {error.strerror}.")


def _peers(against: list[str] | None) -> list[str]:
    others = [name for name in peer_steps.PEERS if name != OURS]
    return [_pick({name: name for name in others}, name, "--against") for name in against or []]


def _check_counts(found: list[Inspected], names: list[str], bound: int | None) -> None:
    for x in found:
        count = x.report.program.count
        if bound is not None and x.name in names and count > bound:
            _fail(f"{x.name} has {count} kernels on {x.target}; --fail-above {bound}.", code=1)


def _pick(known: dict[str, Any], name: str, option: str) -> Any:
    if name not in known:
        _fail(f"{option} {name}: must be one of {', '.join(known)}.")
    return known[name]


def _fail(message: str, code: int = 2) -> NoReturn:
    errors.print(f"inspect_hlo: {message}", style="red")
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
