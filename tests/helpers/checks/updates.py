"""``adamw_update`` on the default device, against the formulas in float64.

Each function takes the implementation to check, and how far off the device's operations may
be; it raises AssertionError where a result is not what it must be.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

from bounded import Machine, assert_within
from cpu_oracle import check, expected, hyper, leaves, split
import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla_lowering import UpdateResult, adamw_update
from checks.tables import ALIKE, BATCHES, LARGE, SHAPES, mixed, random_case

Kinds = ("params", "m", "v")


def jitted(implementation: Any, **flags: Any) -> Callable[[Any, dict[str, Any]], UpdateResult]:
    """The update, compiled."""
    step = functools.partial(adamw_update, implementation=implementation, **flags)
    return jax.jit(lambda h, tree: step(h, **tree))


def _check(
    implementation: Any, machine: Machine, h: Any, tree: Any, groups: Any = None, **flags: Any
) -> None:
    got = jitted(implementation, groups=groups, **flags)(h, tree)
    check(got, h, tree, groups, **flags, machine=machine)


def options(
    implementation: Any, machine: Machine, chosen: dict[str, bool], param: str, grad: str
) -> None:
    """One choice of options, with leaves of every size that a kernel tells apart."""
    state = "float64" if param == "float64" else "float32"
    operands, flags = split(chosen)
    with jax.enable_x64(param == "float64"):
        tree = leaves(SHAPES, param, grad, state, **operands)
        h = hyper(dtype=np.float64 if param == "float64" else np.float32)
        _check(implementation, machine, h, tree, **flags)


def alike(implementation: Any, machine: Machine, param: str) -> None:
    """Leaves that XLA:GPU merges, in two groups."""
    groups = [i % 2 for i in range(len(ALIKE))]
    _check(implementation, machine, hyper(2), leaves(ALIKE, param), groups)


def large(implementation: Any, machine: Machine, param: str) -> None:
    """Leaves of many programs, each element of them."""
    _check(implementation, machine, hyper(), leaves(LARGE, param, amsgrad=True, ema=True))


def random(implementation: Any, machine: Machine, seed: int) -> None:
    """A tree of mixed dtypes with options drawn at random."""
    case = random_case(seed)
    tree, flags = mixed(case)
    h = hyper(3, APPLY=case["apply"])
    _check(implementation, machine, h, tree, case["groups"], **flags)


def float64_beside_bfloat16(implementation: Any, machine: Machine) -> None:
    """Two arithmetics in one tree."""
    with jax.enable_x64(True):
        tree: dict[str, list[Any]] = leaves([(70,)], "float64", state="float64")
        for kind, column in leaves([(70,)], "bfloat16").items():
            tree[kind] += column
        _check(implementation, machine, hyper(dtype=np.float64), tree)


def nan_and_infinity(implementation: Any, machine: Machine) -> None:
    """They stay where they are."""
    tree = leaves([(70,)])
    tree["grads"][0][[3, 69]] = np.nan, np.inf
    _check(implementation, machine, hyper(CLIP_VALUE=10.0), tree, clip_value=True)


def skipped(implementation: Any, machine: Machine, param: str) -> None:
    """What is skipped keeps its bits."""
    del machine
    tree = leaves(SHAPES, param, ema=True)
    tree["grads"] = [np.full_like(x, np.nan) for x in tree["grads"]]
    got = jitted(implementation, skip=True)(hyper(APPLY=0.0), tree)
    for kind in ("params", "m", "v", "ema"):
        for i, (x, y) in enumerate(zip(getattr(got, kind), tree[kind], strict=True)):
            assert np.asarray(x).tobytes() == y.tobytes(), f"{kind}[{i}] has moved"


def batched(implementation: Any, machine: Machine, case: str, shape: tuple[int, ...]) -> None:
    """Under ``vmap``, with a batch of what ``BATCHES[case]`` says."""
    hyper_axis, varying = BATCHES[case]
    rows = hyper(2, (3,)) if hyper_axis == 0 else hyper(2)
    wide = leaves([(3, *shape)] * 2)
    tree = {k: col if k in varying else [x[0] for x in col] for k, col in wide.items()}
    axes = (hyper_axis, {k: 0 if k in varying else None for k in tree})

    def one(h: Any, t: Any) -> Any:
        return adamw_update(h, **t, groups=[1, 0], implementation=implementation)[:3]

    columns = jax.jit(jax.vmap(one, in_axes=axes))(rows, tree)
    for replica in range(3):
        row = rows[replica] if hyper_axis == 0 else rows
        for i in range(2):
            leaf = {k: col[i][replica] if k in varying else col[i] for k, col in tree.items()}
            want = expected(row[1 - i], leaf, machine=machine)
            for kind, column in zip(Kinds, columns, strict=True):
                assert_within(column[i][replica], want[kind], f"{kind}[{i}]")


def batched_thrice(implementation: Any, machine: Machine) -> None:
    """Three batches, of which one operand has two and another the third."""
    tree = leaves([(6,)])
    rng = np.random.default_rng(1)
    m = rng.standard_normal((2, 3, 6)).astype(np.float32)
    grads = rng.standard_normal((4, 6)).astype(np.float32)

    def one(m: Any, g: Any) -> Any:
        operands = {**tree, "m": [m], "grads": [g]}
        return adamw_update(hyper(), **operands, implementation=implementation)[:3]

    last = jax.vmap(one, in_axes=(0, None))
    middle = jax.vmap(last, in_axes=(None, 0))
    columns = jax.jit(jax.vmap(middle, in_axes=(0, None)))(m, grads)
    for a, b, c in np.ndindex(2, 4, 3):
        leaf = {kind: tree[kind][0] for kind in ("params", "v")}
        want = expected(hyper()[0], leaf | {"m": m[a, c], "grads": grads[b]}, machine=machine)
        for kind, column in zip(Kinds, columns, strict=True):
            assert_within(column[0][a, b, c], want[kind], kind)


def deterministic(implementation: Any, machine: Machine) -> None:
    """The same bits, run after run."""
    del machine
    step, tree = jitted(implementation), leaves(LARGE, "bfloat16")
    first, *others = (jax.tree.leaves(step(hyper(), tree)) for _ in range(8))
    for again in others:
        for i, (x, y) in enumerate(zip(first, again, strict=True)):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f"result {i} differs"


def in_place(implementation: Any, machine: Machine, param: str) -> None:
    """What is donated is where the results are, and right all the same."""
    shapes = [shape for shape in LARGE if len(shape) == 1]
    tree = leaves(shapes, param)
    donated, grads = {k: jax.tree.map(jnp.asarray, tree[k]) for k in Kinds}, tree["grads"]

    def fn(donated: Any, h: Any, grads: Any) -> Any:
        result = adamw_update(h, **donated, grads=grads, implementation=implementation)
        return {kind: getattr(result, kind) for kind in Kinds}

    before = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), donated)
    got = jax.jit(fn, donate_argnums=0)(donated, hyper(), grads)
    assert jax.tree.map(lambda x: x.unsafe_buffer_pointer(), got) == before, "it was moved"
    for i in range(len(shapes)):
        leaf = {kind: column[i] for kind, column in tree.items()}
        want = expected(hyper()[0], leaf, machine=machine)
        for kind in Kinds:
            assert_within(got[kind][i], want[kind], f"{kind}[{i}]")


def beyond_32_bits(implementation: Any, machine: Machine) -> None:
    """A leaf of more than 2^31 elements, which repeats one block of them: so must its results."""
    del machine
    block, repeats = 1 << 20, (1 << 11) + 1
    one = leaves([(block,)], "bfloat16")
    wide = {k: [jnp.tile(jnp.asarray(x), repeats) for x in column] for k, column in one.items()}
    want = jitted(implementation)(hyper(), one)

    def fn(donated: Any, h: Any, grads: Any) -> Any:
        return adamw_update(h, **donated, grads=grads, implementation=implementation)[:3]

    grads = wide.pop("grads")
    got = jax.jit(fn, donate_argnums=0)(wide, hyper(), grads)
    same = jax.jit(lambda x, y: jnp.all(x.reshape(-1, block) == y))
    for kind, column in zip(Kinds, got, strict=True):
        assert same(column[0], getattr(want, kind)[0]), f"{kind} differs"
