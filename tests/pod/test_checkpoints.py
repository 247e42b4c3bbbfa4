"""Checkpoints by Orbax: of this version and of others, on other devices, cut off and unfit.

Run the checks on eight devices by hand: ``PYTHONPATH=tests/helpers:tests/pod/checkpoints
XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/pod/test_checkpoints.py NAME``.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import hashlib
from pathlib import Path
import shutil
import tempfile
from typing import Any

from comparing import same
from eight_devices import assert_passed, main
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import make_checkpoint
from ml_dtypes import bfloat16
import numpy as np
import oracle
import pytest

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


@pytest.mark.slow
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


# --------------------------------------------------------- from one mesh to another
# Each check runs in a process with eight devices.

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
    "eight": ((8,), ("data",), AUTO, P("data"), P()),
    "four by two": ((4, 2), ("data", "model"), AUTO, P("data", "model"), P("model")),
    "explicit axes": ((4, 2), ("data", "model"), EXPLICIT, P("data", "model"), P("model")),
    "two": ((2,), ("data",), AUTO, P(None, "data"), P("data")),
    "one": ((1,), ("data",), AUTO, P(), P()),
}
FULL = dataclasses.replace(CONFIG, gradient_accumulation_steps=None)
LESS = ax.AdamW(**{"beta_2": 0.75})


def laid_out(name: str) -> Any:
    sizes, names, kind, of_matrix, of_vector = MESHES[name]
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = jax.make_mesh(sizes, names, (kind,) * len(sizes), devices=devices)
    return NamedSharding(mesh, of_matrix), NamedSharding(mesh, of_vector)


def params_on(name: str) -> Any:
    w, b = laid_out(name)
    rng = np.random.default_rng(3)
    return {
        "w": jax.device_put(np.float32(rng.standard_normal((16, 8))), w),
        "b": jax.device_put(np.float32(rng.standard_normal(8)), b),
    }


def counted_step(config: ax.AdamW) -> tuple[Any, list[None]]:
    """A train step, and a list that grows with each compilation of it."""
    traced: list[None] = []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traced.append(None)
        return ax.adamw_step(params, jax.tree.map(jnp.cos, params), state, config)

    return step, traced


def moves(source: str, target: str) -> None:
    step, _ = counted_step(FULL)
    kept = params_on(source)
    kept = step(kept, ax.adamw_init(kept, FULL))
    template = params_on(target)
    template = template, ax.sharding.abstract_state(template, FULL)
    with tempfile.TemporaryDirectory() as folder:
        found = restored(saved(Path(folder, "saved"), kept), template)
    same(found, kept)
    for x, y in zip(*map(jax.tree.leaves, (found, template)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    step, traced = counted_step(FULL)
    for _ in range(3):
        found = step(*found)
    assert len(traced) == step._cache_size() == 1


def adapts(name: str) -> None:
    params = params_on(name)
    step, _ = counted_step(LESS)
    params, state = step(params, ax.adamw_init(params, LESS))
    config = dataclasses.replace(FULL, gradient_accumulation_steps=2)
    wanted = ax.sharding.state_shardings(params, config)
    adapt = functools.partial(ax.adapt_state, config=config)
    for new in (adapt(state, params), jax.jit(adapt)(state, params)):
        for x, sharding in zip(*map(jax.tree.leaves, (new, wanted)), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)
        step, traced = counted_step(config)
        pair = params, new
        for _ in range(4):
            pair = step(*pair)
        assert len(traced) == step._cache_size() == 1


def adapts_zero1() -> None:
    """The state is cut, and its params are not."""
    w, _ = laid_out("eight")
    mesh = w.mesh
    params = jax.device_put(params_on("one"), NamedSharding(mesh, P()))
    lies = ax.sharding.zero1(mesh, "data", params, min_size=1)
    config = FULL
    state = jax.device_put(ax.adamw_init(params, LESS), ax.sharding.state_shardings(lies, LESS))
    wanted = ax.sharding.state_shardings(lies, config)
    adapt = functools.partial(ax.adapt_state, config=config)
    for new in (adapt(state, params), jax.jit(adapt)(state, params)):
        for x, sharding in zip(*map(jax.tree.leaves, (new, wanted)), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)


CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"{source} to {target}": functools.partial(moves, source, target)
        for source, target in (
            ("eight", "two"),
            ("eight", "one"),
            ("four by two", "two"),
            ("one", "four by two"),
            ("four by two", "explicit axes"),
        )
    },
    **{
        f"adapts on {name}": functools.partial(adapts, name)
        for name in ("eight", "four by two", "explicit axes", "one")
    },
    "adapts under ZeRO-1": adapts_zero1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(name: str) -> None:
    assert_passed(name, Path(__file__))


if __name__ == "__main__":
    main(CHECKS)
