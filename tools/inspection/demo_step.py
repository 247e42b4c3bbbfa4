"""The whole train step of ``train_lm.py``'s transformer, on a mesh of a target's devices."""

from __future__ import annotations

from collections import Counter
import dataclasses
import math
from typing import Any, NoReturn

from inspection import aot
from inspection.inspect_cases import Case, CaseError
import jax
from jax.sharding import NamedSharding

NAME = "train_lm"

SIZES = {"layers": 12, "width": 1024, "heads": 16, "context": 512, "batch": 0}
"""Of the transformer and its batch, where none are given; 0: 8 windows for each part of it."""

WINDOWS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
      mesh: such as ``data=64,model=4``; None: all devices along ``data``.
      devices: how many; None: as many as the mesh or the target's topology has.
      sizes: such as ``layers=24,width=2048``; the others are those of ``SIZES``.
      zero1: whether the optimizer's state is cut over ``data``.
    """

    mesh: str | None = None
    devices: int | None = None
    sizes: str | None = None
    zero1: bool = False


def train_step(options: Options, target: aot.Target) -> Case:
    """Params and state in their places, a batch cut over the mesh, donated.

    Raises:
      CaseError: there is no such mesh, or no such model on it.
    """
    import train_lm

    count = options.devices or target.chips or _product(options.mesh)
    sizes = _sizes(options.sizes)
    model = train_lm.Model(sizes["layers"], sizes["width"], sizes["heads"])
    try:
        devices = aot.devices(target, count)
        ways = train_lm.make_mesh(options.mesh, model, 0, devices, _refuse).shape
        batch = sizes["batch"] or WINDOWS * ways["data"] * ways["fsdp"]
        mesh = train_lm.make_mesh(options.mesh, model, batch, devices, _refuse)
    except aot.UnavailableError as error:
        raise CaseError(str(error)) from None
    config = train_lm.make_config(1000)
    params, state = train_lm.abstract(model, config, mesh, options.zero1)
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    shape, place = (batch, sizes["context"] + 1), NamedSharding(mesh, train_lm.BATCH)
    tokens = jax.ShapeDtypeStruct(shape, "int32", sharding=place)
    step = train_lm.jitted_step(model, config, places)
    return Case(NAME, step, (params, state, tokens), mesh=mesh)


def _refuse(message: str) -> NoReturn:
    raise CaseError(f"{message.partition('; see')[0]}.")


def _product(mesh: str | None) -> int:
    """How many devices ``data=64,model=4`` needs; what is no mesh is refused later."""
    named = [part.partition("=")[::2] for part in (mesh or "").split(",")]
    if twice := [name for name, times in Counter(name for name, _ in named).items() if times > 1]:
        raise CaseError(f"--mesh {mesh} names {twice[0]} twice.")
    return max(math.prod(int(size) for _, size in named if size.isdecimal()), 1)


def _sizes(text: str | None) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        name, _, size = part.partition("=")
        if name not in SIZES or not size.isdecimal() or not int(size):
            raise CaseError(
                f"--sizes: {part!r} is none of {', '.join(SIZES)} with its size, as in layers=24."
            )
        if name in sizes:
            raise CaseError(f"--sizes {text} names {name} twice.")
        sizes[name] = int(size)
    return SIZES | sizes
