"""Trains a small language model on text that Python ships, on one device or on many.

    python tools/train_lm.py
    python tools/train_lm.py --devices 8 --mesh data=4,model=2     # eight devices, simulated
    python tools/train_lm.py --coordinator HOST:PORT --processes 2 --process 0    # and 1 elsewhere

One donated train step serves them all: ``layout`` says how each param lies on the mesh, AdamW's
state follows the params, and XLA adds the collectives.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from platform import python_version
import sys
import time
from typing import Annotated, Any, Literal, NoReturn
import zlib

import cli

with cli.extra("train_lm", "train"):
    import jax
    from jax import NamedSharding, P, lax
    from jax.experimental import mesh_utils, multihost_utils
    import jax.numpy as jnp
    from jax.sharding import AxisType, Mesh
    from matplotlib.figure import Figure
    import numpy as np
    import optax
    import orbax.checkpoint as ocp
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    import typer

    import adamw_xla as ax

Params, State = dict[str, Any], ax.AdamWState
Text = np.ndarray[Any, Any]

AXES = ("data", "fsdp", "model")
BATCH = P(("data", "fsdp"))  # how a batch lies on them, and what is computed from it
VOCABULARY = 256  # bytes


# --------------------------------------------------------------------------------- model


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a decoder-only transformer, and the dtype that it computes in."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One float32 param: its shape, its place on the mesh, and its deviation (None: all ones)."""

    shape: tuple[int, ...]
    spec: P
    deviation: float | None = None

    def array(self, key: jax.Array) -> jax.Array:
        if self.deviation is None:
            return jnp.ones(self.shape)
        return self.deviation * jax.random.normal(key, self.shape)


def layout(model: Model) -> dict[str, Any]:
    """The tree of params, with a ``Leaf`` for each; layers are stacked, for ``lax.scan``."""
    n, w, h = model.layers, model.width, model.heads
    first, last = w**-0.5, (2 * n * w) ** -0.5
    return {
        "embed": Leaf((VOCABULARY, w), P("model", "fsdp"), 1.0),
        "blocks": {
            "attention_norm": Leaf((n, w), P()),
            "qkv": Leaf((n, w, 3, h, w // h), P(None, "fsdp", None, "model"), first),
            "out": Leaf((n, h, w // h, w), P(None, "model", None, "fsdp"), last),
            "mlp_norm": Leaf((n, w), P()),
            "up": Leaf((n, w, 4 * w), P(None, "fsdp", "model"), first),
            "down": Leaf((n, 4 * w, w), P(None, "model", "fsdp"), last / 2),
        },
        "norm": Leaf((w,), P()),
        "head": Leaf((w, VOCABULARY), P("fsdp", "model"), 0.0),
    }


def init_params(key: jax.Array, model: Model) -> Params:
    """Random weights; where the call is jitted with shardings, each device makes its part alone."""
    leaves, tree = jax.tree.flatten(layout(model))
    return tree.unflatten(map(Leaf.array, leaves, jax.random.split(key, len(leaves))))


def logits(params: Params, tokens: jax.Array, model: Model) -> jax.Array:
    """Scores float32[batch, length, 256] of the byte after each of int32[batch, length]."""
    params = jax.tree.map(lambda p: p.astype(model.dtype), params)

    def block(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        q, k, v = jnp.einsum("btw,wchd->cbthd", normed(x, w["attention_norm"]), w["qkv"])
        seen = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = over_batch(x + jnp.einsum("bthd,hdw->btw", seen, w["out"]))
        hidden = jnp.square(jax.nn.relu(normed(x, w["mlp_norm"]) @ w["up"]))
        return over_batch(x + hidden @ w["down"]), None

    x = over_batch(jax.nn.one_hot(tokens, VOCABULARY, dtype=model.dtype) @ params["embed"])
    x, _ = lax.scan(block, x, params["blocks"])
    return (normed(x, params["norm"]) @ params["head"]).astype(jnp.float32)


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm over the last dimension."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return x * lax.rsqrt(square + 1e-6).astype(x.dtype) * scale


def rotated(x: jax.Array) -> jax.Array:
    """Rotary position embedding of [batch, length, heads, head]."""
    length, half = x.shape[1], x.shape[3] // 2
    angle = jnp.arange(length)[:, None, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def over_batch(x: jax.Array) -> jax.Array:
    """Splits activations by the batch alone: so under FSDP it is weights that are gathered."""
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    return lax.with_sharding_constraint(x, BATCH) if on_mesh and len(x) > 1 else x


def loss_of(params: Params, tokens: jax.Array, model: Model) -> jax.Array:
    """The mean cross entropy of int32[batch, context + 1], in nats per byte."""
    scores = logits(params, tokens[:, :-1], model)
    return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()


def sample(params: Params, prompt: jax.Array, key: jax.Array, model: Model) -> jax.Array:
    """The bytes int32[160] that the model writes after a prompt int32[context]."""

    def write(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        byte = jax.random.categorical(key, logits(params, window[None], model)[0, -1] / 0.7)
        return jnp.append(window[1:], byte.astype(window.dtype)), byte

    return lax.scan(write, prompt, jax.random.split(key, 160))[1]


def make_config(steps: int, learning_rate: float = 6e-3, accumulate: int = 1) -> ax.AdamW:
    """Warm-up and cosine over so many calls, clipping by the global norm, no decay of norms."""
    return ax.AdamW(
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps),
        weight_decay=0.1,
        beta_2=0.95,
        global_clipnorm=1.0,
        gradient_accumulation_steps=accumulate if accumulate > 1 else None,
        # By path: stacked scales have two dimensions, as matrices have.
        weight_decay_mask=functools.partial(
            jax.tree.map_with_path, lambda path, _: not path[-1].key.endswith("norm")
        ),
        skip_nonfinite=True,
    )


def abstract(model: Model, config: ax.AdamW, mesh: Mesh, zero1: bool) -> tuple[Params, State]:
    """Shapes and shardings of params and state: what jit, Orbax and a compiler need."""

    def struct(leaf: Leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, "float32", sharding=NamedSharding(mesh, leaf.spec))

    params = jax.tree.map(struct, layout(model))
    cut = ax.sharding.zero1(mesh, "data", params, strict=False) if zero1 else params
    places = ax.sharding.state_shardings(cut, config)
    return params, ax.sharding.abstract_state(params, config, state_shardings=places)


def train_step(
    params: Params, state: State, tokens: jax.Array, model: Model, config: ax.AdamW, at: Any = None
) -> tuple[Params, State, jax.Array]:
    """One step on int32[batch, context + 1]: new params and state, and the loss of the old."""
    loss, grads = jax.value_and_grad(loss_of)(params, tokens, model)
    params, state = ax.adamw_step(params, grads, state, config, state_shardings=at)
    return params, state, loss


def jitted_step(model: Model, config: ax.AdamW, places: tuple[Any, Any]) -> Any:
    """``train_step`` in place: params and state are donated, and stay at ``places``."""
    step = functools.partial(train_step, model=model, config=config, at=places[1])
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, None))


# ------------------------------------------------------------------- text, checkpoints, plot


def load_text() -> tuple[Text, Text]:
    """The reference of this Python's language as bytes: nine tenths to train on, one held out."""
    from pydoc_data.topics import topics

    text = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def windows(text: Text, seed: Any, shape: tuple[int, int], mesh: Mesh) -> jax.Array:
    """Random windows int32[batch, context + 1]; the seed, such as a step's number, decides all."""
    batch, context = shape
    starts = np.random.default_rng(seed).integers(0, len(text) - context, batch)
    tokens = text[starts[:, None] + np.arange(context + 1)].astype(np.int32)
    # Each process hands over what its own devices hold.
    place = NamedSharding(mesh, BATCH)
    return jax.make_array_from_callback(tokens.shape, place, lambda index: tokens[index])


def open_checkpoints(folder: Path | None, resume: bool) -> ocp.CheckpointManager | None:
    """The folder of a training that begins, or of one that is to go on."""
    if folder is None:
        return fail("--resume needs --checkpoints, the folder to go on from") if resume else None
    there = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if resume and not there:
        fail(f"there is no checkpoint in {folder}; without --resume a training begins")
    if there and not resume:
        fail(f"{folder} has a training at step {max(there)}: add --resume, or name a new folder")
    if problem := cli.folder_problem(folder):
        fail(f"cannot write to {folder}: {problem}")
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def restore(manager: ocp.CheckpointManager, like: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The latest checkpoint, placed as ``like``, if its training had the same settings."""
    args, step = ocp.args.Composite, manager.latest_step()
    try:
        kept = manager.restore(step, args=args(kept=ocp.args.JsonRestore())).kept
        for name, value in settings.items():
            if (was := kept["settings"][name]) != value:
                fail(f"the training in {manager.directory} has {name} {was}, this one {value}")
        return manager.restore(
            step, args=args(trained=ocp.args.StandardRestore(like))
        ).trained, kept
    except (KeyError, OSError, ValueError) as error:
        where = manager.directory / str(step)
        fail(f"{where} cannot be read ({type(error).__name__}); the one before can, without it")


def draw(kept: dict[str, Any], path: Path) -> None:
    """Both losses over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(kept["losses"]) + 1), kept["losses"], lw=0.7, label="training")
    axes.plot(*zip(*kept["held_out"], strict=True), "o-", label="held out")
    axes.set(xlabel="step", ylabel="nats per byte")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


# ------------------------------------------------------------------------------ the command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def fail(message: str) -> NoReturn:
    print(f"train_lm: {message}", file=sys.stderr)
    raise typer.Exit(2)


def make_mesh(text: Any, model: Model, batch: int, devices: Any = (), fail: Any = fail) -> Mesh:
    """The mesh of ``data=4,model=2``: all axes, of size 1 where not named."""
    sizes, there = dict.fromkeys(AXES, 1), len(devices := devices or jax.devices())
    for part in (text or f"data={there}").split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or not int(size):
            fail(f"--mesh: {part!r} is no axis ({', '.join(AXES)}) with its size, as in data=4")
        if str(text).count(f"{name}=") > 1:
            fail(f"--mesh {text} names {name} twice")
        sizes[name] = int(size)
    if there != (needed := math.prod(sizes.values())):
        fail(f"--mesh {text} is of {needed} devices, and there are {there}; see --devices")
    for what, size, ways, why in (
        ("--batch", batch, sizes["data"] * sizes["fsdp"], "data times fsdp"),
        ("--width", model.width, 2 * model.heads, "twice --heads"),
        ("--width", model.width, sizes["fsdp"], "fsdp"),
        ("--heads", model.heads, sizes["model"], "model"),
        ("the vocabulary", VOCABULARY, sizes["model"], "model"),
    ):
        if size % ways:
            fail(f"{what} is {size} and must be a multiple of {ways} ({why})")
    grid = mesh_utils.create_device_mesh([*sizes.values()], devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def option(kind: Any, help: str, *names: str, **limits: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=help, **limits)]


@app.command()
def main(
    given: typer.Context,
    steps: option(int, "Batches to train on.", min=1) = 500,
    batch: option(int, "Windows of text in a batch.", min=1) = 16,
    context: option(int, "Bytes in a window.", min=1, max=10_000) = 64,
    layers: option(int, "Blocks of the transformer.", min=1) = 4,
    width: option(int, "Its width.", min=1) = 128,
    heads: option(int, "Heads of its attention.", min=1) = 4,
    dtype: option(Literal["bfloat16", "float32"], "What it computes in.") = "bfloat16",
    learning_rate: option(float, "At its peak.", min=0) = 6e-3,
    accumulate: option(int, "Batches for one update.", min=1) = 1,
    seed: option(int, "Of weights and batches.", min=0) = 0,
    mesh: option(str | None, "Such as data=4,model=2; its axes: data, fsdp, model.") = None,
    zero1: option(bool, "Cut the optimizer's state over data.", "--zero1") = False,
    devices: option(int | None, "Simulate so many on the CPU.", min=1) = None,
    coordinator: option(str | None, "HOST:PORT of process 0; on TPU pods: auto.") = None,
    processes: option(int | None, "How many there are.", min=1) = None,
    process: option(int | None, "Which of them this is, from 0.", min=0) = None,
    checkpoints: option(Path | None, "Folder to save them in.") = None,
    resume: option(bool, "Go on from the last of them.", "--resume") = False,
    every: option(int, "Evaluate and save every so many steps.", min=1) = 50,
    plot: option(Path | None, "Draw both losses into this PNG.") = None,
) -> None:
    """Train a small language model on the reference of Python's language, byte by byte."""
    if plot and (problem := cli.file_problem(plot)):
        fail(f"cannot write {plot}: {problem}")
    if devices:  # before JAX looks for any
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if coordinator == "auto":
        jax.distributed.initialize()
    elif (together := [coordinator, processes, process]) != [None] * 3:
        if None in together:
            fail("--coordinator, --processes and --process go together")
        jax.distributed.initialize(*together)
    out = Console(highlight=False, markup=False, emoji=False, quiet=jax.process_index() > 0)
    options = repr({k: v for k, v in given.params.items() if k not in ("process", "plot")})
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(options.encode())))
    if np.unique(sums).size > 1:
        fail("the processes were started with different options")
    model = Model(layers, width, heads, dtype)
    config = make_config(steps, learning_rate, accumulate)
    grid = make_mesh(mesh, model, batch)
    like = abstract(model, config, grid, zero1)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    manager = open_checkpoints(checkpoints, resume)
    settings = dataclasses.asdict(model) | {"accumulate": accumulate, "text": python_version()}
    kept: dict[str, Any] = {"settings": settings, "losses": [], "held_out": []}
    (text, unseen), key = load_text(), jax.random.key(seed)
    tokens = functools.partial(windows, shape=(batch, context), mesh=grid)

    with jax.set_mesh(grid):
        if manager and resume:
            (params, state), kept = restore(manager, like, settings)
        else:
            params = jax.jit(init_params, static_argnums=1, out_shardings=places[0])(key, model)
            init = jax.jit(ax.adamw_init, static_argnums=1, out_shardings=places[1])
            state = init(params, config)
        begin, since = len(kept["losses"]), time.perf_counter()
        if begin >= steps:
            fail(f"{checkpoints} is at step {begin}, and --steps is {steps}")
        step = jitted_step(model, config, places).lower(params, state, tokens(text, 0)).compile()
        loss = jax.jit(functools.partial(loss_of, model=model))
        compiling, size = time.perf_counter() - since, sum(p.size for p in jax.tree.leaves(params))
        out.print(f"{size:,} params on {dict(grid.shape)}; compiled in {compiling:.1f} s")
        seconds, columns = 0.0, (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=out) as progress:
            task = progress.add_task("", total=steps, completed=begin)
            for first in range(begin, steps, every):
                losses, last, since = [], min(first + every, steps), time.perf_counter()
                for now in range(first, last):
                    params, state, value = step(params, state, tokens(text, (seed, now)))
                    losses.append(value)
                    jax.block_until_ready(losses[-2:-1])  # one behind: the device need not wait
                    progress.advance(task)
                losses = [*kept["losses"], *map(float, losses)]
                seconds += time.perf_counter() - since
                found = float(np.mean([loss(params, tokens(unseen, i)) for i in range(8)]))
                # Anew, not in place: the last checkpoint may still be on its way to the disk.
                kept = kept | {"losses": losses, "held_out": [*kept["held_out"], (last, found)]}
                note = f"loss {losses[-1]:.3f}, held out {found:.3f}"
                progress.update(task, description=note)
                if manager:
                    args = {"trained": ocp.args.StandardSave((params, state))}
                    args |= {"kept": ocp.args.JsonSave(kept)}
                    manager.save(last, args=ocp.args.Composite(**args))
        write = jax.jit(sample, static_argnames="model", out_shardings=NamedSharding(grid, P()))
        written = write(params, unseen[:context].astype(np.int32), key, model)
    if manager:
        manager.close()  # waits for the last checkpoint
    size = (steps - begin) * batch * context
    out.print(f"{note} nats per byte; {size:,} bytes in {seconds:.1f} s, {size / seconds:,.0f} / s")
    out.print(bytes(np.asarray(written, np.uint8)).decode(errors="replace"))
    if plot and jax.process_index() == 0:
        draw(kept, plot)
        out.print(f"wrote {plot}", soft_wrap=True)


if __name__ == "__main__":
    app()
