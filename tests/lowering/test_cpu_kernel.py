"""The CPU kernel's numbers, against the formulas in float64."""

import functools
from typing import Any

from bounded import assert_within
from cpu_oracle import DTYPES, OPTIONS, check, expected, hyper, leaves, require_native, split
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamw_xla_lowering import Slot, UpdateResult, adamw_update

SHAPES = [(0,), (1,), (15,), (17,), (1000,), (), (3, 5), (2, 0, 4), (4, 3, 7), (40_000,)]
DTYPE_CASES = [
    (param, grad, state)
    for param in DTYPES
    for grad in sorted({param, "float32"})
    for state in ("float32", "float64")
]


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


@pytest.fixture(autouse=True)
def _x64() -> Any:
    with jax.enable_x64(True):
        yield


def run(
    h: Any, tree: dict[str, Any], implementation: Any = "native", **options: Any
) -> UpdateResult:
    step = functools.partial(adamw_update, implementation=implementation, **options)
    return jax.jit(lambda h, tree: step(h, **tree))(h, tree)


def as_dict(result: UpdateResult) -> dict[str, list[Any]]:
    return {kind: column for kind, column in result._asdict().items() if column is not None}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize(("param", "grad", "state"), DTYPE_CASES)
def test_matches_the_formulas(param: str, grad: str, state: str, options: dict[str, bool]) -> None:
    operands, flags = split(options)
    tree = leaves(SHAPES, param, grad, state, **operands)
    h = hyper(dtype=np.float64 if param == "float64" else np.float32)
    check(run(h, tree, **flags), h, tree, **flags)


def test_groups_and_leaf_scale_reach_their_leaves_across_buckets() -> None:
    n = 70  # five calls
    groups = [i * 7 % 3 for i in range(n)]
    h = hyper(3)
    tree: dict[str, Any] = {"leaf_scale": np.linspace(0.1, 2.0, n, dtype=np.float32)}
    tree |= leaves([(i % 5 + 1,) for i in range(n)])
    check(run(h, tree, groups=groups), h, tree, groups)


def test_dtypes_may_differ_from_leaf_to_leaf() -> None:
    trees = [leaves([(33,)], param, seed=i) for i, param in enumerate(DTYPES)]
    tree = {kind: [t[kind][0] for t in trees] for kind in trees[0]}
    h = hyper(dtype=np.float64)
    check(run(h, tree), h, tree)


@pytest.mark.parametrize("param", ["bfloat16", "float16"])
def test_every_16_bit_pattern_survives_unchanged(param: str) -> None:
    """With no step and no decay a param is widened and narrowed again."""
    bits = np.arange(2**16, dtype=np.uint16)
    wide = bits.view(DTYPES[param]).astype(np.float32)
    bits, wide = bits[~np.isinf(wide)], wide[~np.isinf(wide)]  # 0*inf, the decay, is NaN
    tree = leaves([bits.shape], param)
    tree["params"] = [bits.view(DTYPES[param])]
    tree["grads"] = [np.zeros(bits.shape, DTYPES[param])]
    h = hyper(STEP_SIZE=0.0, DECAY_RATE=0.0)
    got = np.asarray(run(h, tree).params[0])
    flushed = np.abs(wide) < np.finfo(np.float32).tiny  # as everywhere in XLA:CPU
    same = (got.view(np.uint16) == bits) | (np.isnan(wide) & np.isnan(got.astype(np.float32)))
    np.testing.assert_array_equal(same | flushed, True)
    np.testing.assert_array_equal(got[flushed].astype(np.float32), 0.0)


@pytest.mark.parametrize("param", ["bfloat16", "float16"])
def test_rounding_is_to_nearest_even(param: str) -> None:
    """A param of zero becomes -STEP_SIZE*m/EPSILON, rounded once."""
    rng = np.random.default_rng(0)
    edges = np.array([65504, 65519.99, 65520, 1e30, 6e-8, 2.9e-8, 3.1e-8, 6.1e-5, 0.0], np.float32)
    with np.errstate(over="ignore"):
        scales = 2.0 ** rng.integers(-26, 18, 20_000)
    m = np.concatenate([edges, -edges, (rng.standard_normal(20_000) * scales).astype(np.float32)])
    ties = np.arange(1, 4096, dtype=np.float32) / 2048 + np.float32(2**-12)
    m = np.concatenate([m, ties])
    zeros = np.zeros(m.shape, np.float32)
    tree = {"params": [zeros.astype(DTYPES[param])], "grads": [zeros], "m": [m], "v": [zeros]}
    h = hyper(STEP_SIZE=-1.0, EPSILON=1.0, BETA_1=1.0)
    got = np.asarray(run(h, tree).params[0])
    with np.errstate(over="ignore"):
        want = m.astype(DTYPES[param])
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("flags", [{}, {"clip_value": True}])
@pytest.mark.parametrize("where", ["params", "grads", "m", "v", "v_max", "ema"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_keep_their_meaning(
    value: float, where: str, flags: dict[str, bool]
) -> None:
    tree = leaves([(50,)], amsgrad=True, ema=True)
    for i in (0, 20, 49):  # in the body and in the tail of a vector loop
        tree[where][0][i] = value
    h = hyper()
    result = run(h, tree, **flags)
    check(result, h, tree, **flags)
    xla = as_dict(run(h, tree, "xla", **flags))
    for kind, column in as_dict(result).items():
        np.testing.assert_array_equal(np.isnan(column[0]), np.isnan(xla[kind][0]), kind)


def test_a_nan_clip_bound_propagates() -> None:
    tree = leaves([(50,)])
    assert np.isnan(run(hyper(CLIP_VALUE=np.nan), tree, clip_value=True).params[0]).all()


@pytest.mark.parametrize("param", DTYPES)
def test_a_skipped_step_keeps_every_bit(param: str) -> None:
    tree = leaves([(70,), ()], param, amsgrad=True, ema=True)
    for kind, column in tree.items():
        column[0][:3] = [np.nan, np.inf, np.finfo(np.float16).tiny / 8]
        assert kind == "grads" or np.isnan(column[0][0])
    dtype = np.float64 if param == "float64" else np.float32
    result = run(hyper(dtype=dtype, APPLY=0.0), tree, skip=True)
    for kind, column in as_dict(result).items():
        for got, want in zip(column, tree[kind], strict=True):
            assert np.asarray(got).tobytes() == want.tobytes(), kind


def test_slots_of_unused_options_are_ignored() -> None:
    tree = leaves([(33,)], ema=True)
    ignored = {"CLIP_VALUE": np.nan, "EMA_OVERWRITE": 1.0, "APPLY": 0.0, "EPSILON_ROOT": 9.0}
    h = hyper(**ignored)
    check(run(h, tree), h, tree)


# --------------------------------------------------------------- batches, loops, branches


@pytest.mark.parametrize(
    ("batched_hyper", "batched_leaves"), [(True, True), (True, False), (False, True)]
)
def test_vmap(batched_hyper: bool, batched_leaves: bool) -> None:
    replicas, shapes = 5, [(33,), (), (4, 7)]
    h = hyper(2, (replicas,)) if batched_hyper else hyper(2)
    tree = leaves([(replicas * batched_leaves or 1, *s) for s in shapes], ema=True)
    if not batched_leaves:
        tree = {kind: [x[0] for x in column] for kind, column in tree.items()}
    scale = np.linspace(0.5, 2, replicas * 3, dtype=np.float32).reshape(replicas, 3)
    axes = (0 if batched_hyper else None, 0 if batched_leaves else None, 0)

    def step(h: Any, tree: Any, scale: Any, implementation: Any = "native") -> UpdateResult:
        return adamw_update(
            h, **tree, leaf_scale=scale, groups=[0, 1, 1], implementation=implementation
        )

    got = as_dict(jax.jit(jax.vmap(step, axes))(h, tree, scale))
    for replica in range(replicas):
        rows = h[replica] if batched_hyper else h
        one = {k: [x[replica] if batched_leaves else x for x in c] for k, c in tree.items()}
        result = UpdateResult(*([x[replica] for x in got[k]] if k in got else None
                                for k in UpdateResult._fields))  # fmt: skip
        check(result, rows, {**one, "leaf_scale": scale[replica]}, [0, 1, 1])


def test_nested_vmap_with_operands_batched_along_different_axes() -> None:
    h = hyper(batch=(3,))
    tree = leaves([(4, 11)])
    tree["grads"] = [np.linspace(-1, 1, 3 * 4 * 11, dtype=np.float32).reshape(3, 4, 11)]

    def one(h: Any, p: Any, g: Any, m: Any, v: Any) -> Any:
        return adamw_update(h, [p], [g], [m], [v], implementation="native")[:3]

    inner = jax.vmap(one, (None, 0, 0, 0, 0))
    outer = jax.jit(jax.vmap(inner, (0, None, 0, None, None)))
    columns = outer(h, *(tree[k][0] for k in ("params", "grads", "m", "v")))
    for a, b in np.ndindex(3, 4):
        leaf = {kind: column[0][b] for kind, column in tree.items() if kind != "grads"}
        want = expected(h[a, 0], leaf | {"grads": tree["grads"][0][a, b]})
        for kind, (column,) in zip(("params", "m", "v"), columns, strict=True):
            assert column.shape == (3, 4, 11)
            assert_within(column[a, b], want[kind], f"{kind}[{a}, {b}]")


def test_batched_skip_is_decided_per_replica() -> None:
    h = hyper(batch=(4,))
    h[1::2, ..., Slot.APPLY] = 0
    tree = leaves([(4, 9)])
    step = jax.vmap(lambda h, t: adamw_update(h, **t, skip=True, implementation="native"))
    params = np.asarray(jax.jit(step)(h, tree).params[0])
    changed = (params != tree["params"][0]).all(axis=1)
    np.testing.assert_array_equal(changed, [True, False, True, False])


def test_scan_and_cond_bodies_use_it() -> None:
    tree = leaves([(100,), (3, 3)])
    h = hyper()

    kinds = ("params", "m", "v")

    def body(state: Any, g: Any) -> Any:
        def apply(s: Any) -> Any:
            return adamw_update(h, s[0], g, *s[1:], implementation="native")[:3]

        return jax.lax.cond(g[0][0] > 0, apply, lambda s: s, state), None

    @jax.jit
    def loop(state: Any, grads: Any) -> Any:
        return jax.lax.scan(body, state, grads)[0]

    grads = [np.stack([g * sign for sign in (1, -1, 2, 3)]) for g in tree["grads"]]
    state = tuple([jnp.asarray(x) for x in tree[k]] for k in kinds)
    assert "adamw_xla_update_cpu" in loop.lower(state, grads).compile().as_text()
    columns = loop(state, grads)
    applied = [k for k in range(4) if grads[0][k][0] > 0]
    assert 0 < len(applied) < 4
    for i in range(2):
        leaf = {kind: tree[kind][i] for kind in kinds}
        for k in applied:
            leaf = expected(h[0], leaf | {"grads": grads[i][k]})
        for kind, column in zip(kinds, columns, strict=True):
            assert_within(column[i], leaf[kind], f"{kind}[{i}]")
