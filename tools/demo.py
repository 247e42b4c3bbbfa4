"""Trains on real digits with ``adamw_step``: one model, then a population of them at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
import sys
import time
from typing import Annotated, Any

import cli

with cli.extra("demo", "demo"):
    import digits
    import jax
    import jax.numpy as jnp
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    import typer

    import adamw_xla as ax

BAR = 0.97
"""The held-out accuracy below which the demo fails."""

LEARNING_RATES = np.logspace(-3, 0, 10)
WEIGHT_DECAYS = np.logspace(-3, 0.5, 8)
GRID_HELD_OUT = 0.8

console = Console(highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the two plots.")] = Path("out"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batches.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of part one.")] = 120,
    quick: Annotated[bool, typer.Option("--quick", help="Half as long, for CI.")] = False,
) -> None:
    """Train on scikit-learn's handwritten digits with adamw_step.

    Part one trains an MLP: cosine schedule with warm-up, clipping by global
    norm, moving average of the weights. Part two trains 80 MLPs, one per pair
    of learning rate and weight decay, as one vmapped program. Exits with 1 if
    part one ends below 97 % held-out accuracy.
    """
    _check_writable(out)
    accuracy = train_one(out, seed, max(epochs // 2, 1) if quick else epochs)
    train_grid(out, seed, steps=300 if quick else 600)
    if accuracy < BAR:
        _fail(f"held-out accuracy {accuracy:.2%} is below {BAR:.0%}", code=1)


def _check_writable(out: Path) -> None:
    if problem := cli.folder_problem(out):
        _fail(f"cannot write to {out}: {problem}", code=2)


def _fail(message: str, code: int) -> None:
    print(f"demo: {message}", file=sys.stderr)
    raise typer.Exit(code)


# ------------------------------------------------------------------------------ part one


@dataclasses.dataclass
class History:
    """What the plot shows: a loss per step, an accuracy of either weights per epoch."""

    losses: list[np.ndarray[Any, Any]] = dataclasses.field(default_factory=list)
    raw: list[float] = dataclasses.field(default_factory=list)
    average: list[float] = dataclasses.field(default_factory=list)


def train_one(out: Path, seed: int, epochs: int) -> float:
    """Trains one model, reports, plots; returns the accuracy of its averaged weights."""
    train, held_out = digits.load()
    steps = epochs * (len(train.labels) // digits.BATCH)
    config = digits.make_config(steps)
    key = jax.random.key(seed)
    params = digits.init_mlp(key, [256, 128])
    state = ax.adamw_init(params, config)
    train_step = digits.make_train_step(config)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(
        f"[bold]One model[/]: an MLP of {size:,} parameters; {len(train.labels):,} digits, "
        f"{len(held_out.labels)} held out"
    )
    first = digits.Batch(train.images[: digits.BATCH], train.labels[: digits.BATCH])
    inspect(train_step, params, state, first, key)

    history = History()
    start = time.perf_counter()
    with _progress() as progress:
        task = progress.add_task("training", total=steps, note="")
        for batches in digits.epochs(train, epochs, seed):
            losses = []
            for batch in batches:
                params, state, loss = train_step(params, state, batch, key)
                losses.append(loss)
            averaged = ax.adamw_finalize(params, state, config)
            history.losses.append(np.asarray(jnp.stack(losses)))
            history.raw.append(float(digits.evaluate(params, held_out)[1]))
            history.average.append(float(digits.evaluate(averaged, held_out)[1]))
            note = f"loss {history.losses[-1].mean():.3f}  held out {history.average[-1]:.1%}"
            progress.update(task, advance=len(batches), note=note)
    seconds = time.perf_counter() - start
    accuracy = history.average[-1]
    console.print(
        f"  held-out accuracy [bold]{accuracy:.2%}[/] with averaged weights "
        f"({history.raw[-1]:.2%} with the last)\n  {steps:,} steps in {seconds:.1f} s"
    )
    _saved(plot_training(history, out / "training.png"))
    return accuracy


def inspect(train_step: Any, *args: Any) -> None:
    """Says how the program that runs contains the update."""
    lowered = train_step.lower(*args)
    report = ax.hlo.report(lowered.compile())
    composites = lowered.as_text().count(f'stablehlo.composite "{ax.lowering.COMPOSITE_NAME}"')
    kinds = ", ".join(f"{n} {kind}" for kind, n in report.update.by_kind.items())
    leaves = len(jax.tree.leaves(args[0]))
    console.print(
        f"  StableHLO: {composites} {ax.lowering.COMPOSITE_NAME} composites for {leaves} leaves\n"
        f"  compiled for {jax.default_backend()}: {report.program.count} kernels,\n"
        f"    {report.update.count} the update's ({kinds}), {report.norm.count} the norm's"
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def plot_training(history: History, path: Path) -> Path:
    """Loss per step on the left, held-out accuracy per epoch on the right."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    per_epoch = len(history.losses[0])
    losses = np.concatenate(history.losses)
    means = [epoch.mean() for epoch in history.losses]
    ends = np.arange(1, len(means) + 1)
    left.plot(
        np.arange(1, len(losses) + 1) / per_epoch,
        losses,
        color="C0",
        alpha=0.25,
        lw=0.7,
        label="each step",
    )
    left.plot(ends, means, color="C0", label="mean of each epoch")
    left.set(yscale="log", xlabel="epoch", ylabel="cross entropy", title="Training loss")
    left.legend(frameon=False)
    right.plot(ends, history.raw, color="C1", alpha=0.6, lw=1, label="last weights")
    right.plot(ends, history.average, color="C2", label="averaged weights (EMA)")
    right.axhline(BAR, color="0.5", ls=":", lw=1)
    right.annotate(f"{BAR:.0%}", (ends[-1], BAR), (0, -12), textcoords="offset points", ha="right")
    right.set(xlabel="epoch", title=f"Held-out accuracy, at the end {history.average[-1]:.2%}")
    right.set_ylim(min(0.9, *history.average[len(means) // 4 :]), 1.0)
    right.yaxis.set_major_formatter("{x:.0%}")
    right.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.08))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


# ------------------------------------------------------------------------------ part two


def train_grid(out: Path, seed: int, steps: int) -> None:
    """Trains the whole grid as one program, reports and plots."""
    parts = digits.load(GRID_HELD_OUT)
    train, held_out = jax.tree.map(jnp.asarray, parts)
    rates, decays = np.meshgrid(LEARNING_RATES, WEIGHT_DECAYS)
    console.print(
        f"[bold]{rates.size} models at once[/]: {LEARNING_RATES.size} learning rates x "
        f"{WEIGHT_DECAYS.size} weight decays, {len(train.labels)} digits to train on"
    )
    start = time.perf_counter()
    with console.status("  compiling and training ..."):
        losses = np.asarray(
            digits.train_population(
                rates.ravel(), decays.ravel(), train, held_out, jax.random.key(seed), steps=steps
            )
        ).reshape(rates.shape)
    seconds = time.perf_counter() - start
    best = np.unravel_index(np.nanargmin(losses), losses.shape)
    console.print(
        f"  best held-out loss [bold]{losses[best]:.3f}[/] at learning rate {rates[best]:.2g}, "
        f"weight decay {decays[best]:.2g}\n"
        f"  {rates.size} x {steps} steps in {seconds:.1f} s with compilation"
    )
    _saved(plot_grid(losses, best, out / "grid.png"))


def plot_grid(losses: np.ndarray[Any, Any], best: Any, path: Path) -> Path:
    """The heat map of held-out losses, the best one framed."""
    plt = _pyplot()
    from matplotlib.colors import LogNorm

    top = float(np.log(digits.CLASSES))  # of a model that knows nothing
    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    colors = plt.get_cmap("viridis_r").with_extremes(bad="0.85")
    norm = LogNorm(float(np.nanmin(losses)), top)
    image = axes.imshow(losses, origin="lower", aspect="auto", cmap=colors, norm=norm)
    for (row, column), loss in np.ndenumerate(losses):
        dark = np.isfinite(loss) and norm(loss) > 0.45
        text = f"{loss:.2f}" if np.isfinite(loss) else "nan"
        axes.text(column, row, text, ha="center", va="center", size=8, color="w" if dark else "0.1")
    row, column = best
    frame = plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec="crimson", lw=2.5)
    axes.add_patch(frame)
    axes.set_xticks(range(LEARNING_RATES.size), [f"{x:.2g}" for x in LEARNING_RATES])
    axes.set_yticks(range(WEIGHT_DECAYS.size), [f"{x:.2g}" for x in WEIGHT_DECAYS])
    axes.set(
        xlabel="peak learning rate",
        ylabel="weight decay",
        title=f"Held-out cross entropy of {losses.size} models trained by one vmapped program",
    )
    ticks = [x for x in (0.1, 0.2, 0.5, 1, 2) if norm.vmin <= x <= norm.vmax]
    bar = figure.colorbar(image, ax=axes, extend="max")
    bar.set_ticks(ticks, labels=[f"{x:g}" for x in ticks])
    bar.ax.minorticks_off()
    return _save(figure, path)


# --------------------------------------------------------------------------------- plots


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        _fail(f"cannot write {path}: {error.strerror}", code=2)
    return path


def _saved(path: Path) -> None:
    console.print(f"  wrote {path}", soft_wrap=True, markup=False, emoji=False)


if __name__ == "__main__":
    app()
