"""Checkpoints by Orbax: of this version and of others, on other devices, cut off and unfit."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time
from typing import Any

from comparing import same
import jax
import jax.numpy as jnp
import make_checkpoint
from ml_dtypes import bfloat16
import numpy as np
import oracle
from places import python_path
import processes
import pytest
import train_and_save

import adamw_xla as ax

ocp = pytest.importorskip("orbax.checkpoint")
RELEASES = sorted(make_checkpoint.FOLDER.glob("v*"))
CONFIG = make_checkpoint.config()


def shapes() -> Any:
    """A template of the stored checkpoints."""
    params = jax.eval_shape(lambda: make_checkpoint.tree(0))
    return params, ax.sharding.abstract_state(params, CONFIG)


def restored(folder: Path, template: Any = None) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), template)


def saved(folder: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)
    return folder


# ------------------------------------------------------------------ of each release

BIAS = 1  # the bfloat16 leaf


@functools.cache
def by_the_formulas(calls: int) -> tuple[list[Any], oracle.State]:
    """In float64, but for the bias, which is rounded as a param at each update."""
    params = [np.float64(x) for x in make_checkpoint.leaves(0)]
    options, state = oracle.Options(**make_checkpoint.OPTIONS), oracle.init(params)
    for call in range(1, calls + 1):
        grads = [np.float64(x) for x in make_checkpoint.leaves(call)]
        params, state, _ = oracle.step(params, [*grads], state, options)
        params[BIAS] = params[BIAS].astype(bfloat16).astype(np.float64)
    return params, state


def assert_by_the_formulas(params: Any, state: ax.AdamWState, calls: int) -> None:
    wanted, held = by_the_formulas(calls)
    assert (held.count, held.micro_step, held.skipped) == (*divmod(calls - 1, 2), 1)
    counters = (state.count, state.micro_step, state.skipped)
    assert counters == (held.count, held.micro_step, held.skipped)
    # Some ten operations on numbers of order one, each rounded to float32.
    atol = 10 * 2**-24
    fields = {field: getattr(state, field) for field in ("m", "v", "v_max", "ema", "accumulated")}
    for field, found in {"params": params, **fields}.items():
        leaves = wanted if field == "params" else getattr(held, field)
        for got, want in zip(jax.tree.leaves(found), leaves, strict=True):
            np.testing.assert_allclose(np.float64(got), want, rtol=0, atol=atol, err_msg=field)


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_what_an_earlier_version_saved(release: Path) -> None:
    params, state = restored(release, shapes())
    assert_by_the_formulas(params, state, make_checkpoint.CALLS)
    like, built = jax.eval_shape(make_checkpoint.trained)
    same(
        *(
            jax.tree.map(lambda x: np.dtype(x.dtype).name, x)
            for x in ((params, state), (like, built))
        )
    )
    # Without a template there are dicts and lists, and bits are the same.
    containers, fields = restored(release)
    assert isinstance(fields, dict)
    same(ax.adapt_state(fields, params, CONFIG), state)
    same(jax.tree.leaves(containers), jax.tree.leaves(params))
    call = make_checkpoint.CALLS + 1
    moved = ax.adamw_step(params, make_checkpoint.tree(call), state, CONFIG)
    assert_by_the_formulas(*moved, call)


def test_this_version_has_a_checkpoint() -> None:
    assert f"v{ax.__version__}" in [path.name for path in RELEASES]


# ------------------------------------------------------------------------- bad ones


def digests(folder: Path) -> dict[Path, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def other_params(params: Any, state: Any) -> Any:
    del state
    params = {"layers": params["layers"]}
    return params, ax.sharding.abstract_state(params, CONFIG)


def other_shapes(params: Any, state: Any) -> Any:
    del state
    params = params | {"scale": jax.ShapeDtypeStruct((5,), jnp.float32)}
    return params, ax.sharding.abstract_state(params, CONFIG)


def later_version(params: Any, state: Any) -> Any:
    return params, vars(state) | {"shampoo": state.count}


# what is asked for -> what Orbax says of it
UNFIT: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "other params": (other_params, r"(?s)do not match:\n\[0\]\.scale:\n.*Source: MISSING"),
    "other shapes": (other_shapes, r"\(5,\) is not compatible with the stored shape: \(\)"),
    "a field that is not there": (later_version, "shampoo"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_template_is_named(name: str) -> None:
    (template, said), (release, *_) = UNFIT[name], RELEASES
    before = digests(release)
    with pytest.raises(ValueError, match=said):
        restored(release, template(*shapes()))
    assert digests(release) == before


TRUNCATED = {"_METADATA": "line 1 column", "manifest.ocdbt": "manifest.ocdbt", "d/*": "/cut/d/"}


@pytest.mark.parametrize("file", TRUNCATED)
def test_a_truncated_file_is_an_error(file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(RELEASES[0], tmp_path / "cut")
    (path,) = folder.glob(file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = digests(folder)
    with pytest.raises(ValueError, match=TRUNCATED[file]):
        restored(folder, shapes())
    with pytest.raises(ValueError, match="cut already exists"):
        saved(folder, make_checkpoint.tree(0))
    assert digests(folder) == before


OTHERS: dict[str, tuple[ax.AdamW, ax.AdamW, str]] = {
    "on": (dataclasses.replace(CONFIG, amsgrad=False), CONFIG, "v_max"),
    "off": (CONFIG, dataclasses.replace(CONFIG, amsgrad=False), "v_max"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_is_turned_after_a_restore(name: str, tmp_path: Path) -> None:
    """Orbax names the field; it is restored as it was saved, and then adapted."""
    before, after, field = OTHERS[name]
    params = make_checkpoint.tree(0)
    pair = ax.adamw_step(params, make_checkpoint.tree(1), ax.adamw_init(params, before), before)
    folder = saved(tmp_path / "saved", pair)
    abstract = functools.partial(ax.sharding.abstract_state, params)
    with pytest.raises(ValueError, match=rf"(?s)do not match:\n\[1\]\.{field}:"):
        restored(folder, (params, abstract(after)))
    params, state = restored(folder, (params, abstract(before)))
    state = ax.adapt_state(state, params, after)
    assert (getattr(state, field) is None) == (name == "off")
    same(dataclasses.replace(state, v_max=pair[1].v_max), pair[1])
    ax.adamw_step(params, make_checkpoint.tree(2), state, after)


# ------------------------------------------------------------------ killed in a save

KILLS, FOREVER = 10, 1_000_000


def start(folder: Path, steps: int = FOREVER) -> subprocess.Popen[bytes]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()}
    env.pop("XLA_FLAGS", None)
    folder.mkdir(exist_ok=True)
    command = [sys.executable, train_and_save.__file__, str(folder), str(steps)]
    with (folder.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def ended(process: subprocess.Popen[bytes]) -> None:
    try:
        assert process.wait(processes.PATIENCE) == 0
    finally:
        processes.kill(process)


def unfinished(folder: Path) -> list[int]:
    """The steps of which a part is written."""
    names = [path.name.partition(".") for path in folder.iterdir()]
    return [int(step) for step, _, rest in names if "tmp" in rest]


def killed(folder: Path, step: int, delay: float) -> None:
    """Trains, and is killed so many seconds after it was seen to write this step or a later."""
    process = start(folder)
    end = time.monotonic() + processes.PATIENCE
    try:
        while process.poll() is None and max(unfinished(folder), default=0) < step:
            assert time.monotonic() < end
            time.sleep(0.002)
        assert process.poll() is None, (folder.parent / "log.txt").read_text()[-3000:]
        time.sleep(delay)
    finally:
        processes.kill(process)


def last_complete(folder: Path) -> int:
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        return manager.latest_step() or 0


def at_step(folder: Path, step: int) -> Any:
    """What is saved of four devices, on this process' one."""
    params = jax.device_put(train_and_save.initial_params(), jax.devices()[0])
    template = params, ax.sharding.abstract_state(params, train_and_save.CONFIG)
    return restored(folder / str(step) / "default", template)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """At moments of all kinds: what is complete is whole, and goes on bit for bit."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    rng = np.random.default_rng(14)
    last = in_the_middle = 0
    found = {}
    for _ in range(KILLS):
        killed(folder, last + int(rng.integers(1, 4)), rng.choice([0.0, rng.uniform(0.0, 0.1)]))
        in_the_middle += bool(unfinished(folder))
        before, last = last, last_complete(folder)
        assert last >= before
        if last > before:
            found[last] = at_step(folder, last)
    assert in_the_middle > KILLS // 2
    end = last + 2
    ended(start(folder, end))
    assert last_complete(folder) == end
    found[end] = at_step(folder, end)
    ended(start(whole, end))
    for step, (params, state) in found.items():
        assert state.count == step
        same((params, state), at_step(whole, step))
