"""Kernels in programs that XLA partitions over eight (virtual) devices.

The CPU's kernel stands for all: what differs by platform is what each device then runs.
Run one by hand: ``PYTHONPATH=tests/helpers XLA_FLAGS=--xla_force_host_platform_device_count=8
python tests/lowering/test_partitioned.py NAME``.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import itertools
from pathlib import Path
import re
from typing import Any

from checks.norms import RTOL
from cpu_oracle import check, hyper, leaves, require_native
from eight_devices import assert_passed, main
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from adamw_xla_lowering import NUM_SLOTS, NativeUnavailableError, adamw_sum_of_squares, adamw_update
from adamw_xla_lowering.rules import partitioned, partitioned_norm

GATHERS = re.compile(r"all-gather|all-to-all|collective-permute")
MOVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|dynamic-slice")
REDUCES = re.compile(r" all-reduce(?:-start)?\(")
SHAPES = [(16, 8), (8,), (7, 3), (0, 4), ()]
CALL = 'custom_call_target="adamw_xla_update_cpu"'


def update(h: Any, tree: dict[str, Any], **flags: Any) -> Any:
    return adamw_update(h, **tree, implementation="native", **flags)


def mesh_of(kind: AxisType = AxisType.Auto) -> Any:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def place(mesh: Any, h: Any, tree: dict[str, list[Any]], specs: Sequence[Any]) -> Any:
    def put(x: Any, spec: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, spec))

    columns = {k: [put(x, s) for x, s in zip(xs, specs, strict=True)] for k, xs in tree.items()}
    return put(h, P()), columns


def calls(step: Any, *args: Any) -> tuple[str, str]:
    """The compiled program, and its one line with the kernel."""
    text = jax.jit(step).lower(*args).compile().as_text()
    assert partitioned.TARGET_NAME not in text
    (line,) = [line for line in text.splitlines() if CALL in line]
    return text, line


# ------------------------------------------------------------------------------ checks


def each_device_updates_its_shards() -> None:
    """Nothing moves, however params and what belongs to them are sharded alike."""
    every = [
        [P("x", "y"), P("y"), P(), P(), P()],
        [P("y"), P(("x", "y")), P(), P(), P()],
        [P()] * 5,
    ]
    options: dict[str, dict[str, bool]] = {"float32": {}, "bfloat16": {"amsgrad": True}}
    for kind in (AxisType.Auto, AxisType.Explicit):
        for dtype, chosen in options.items():
            for specs in every:
                tree, mesh = leaves(SHAPES, dtype, **chosen), mesh_of(kind)
                with jax.set_mesh(mesh):
                    h, placed = place(mesh, hyper(), tree, specs)
                    text, _ = calls(update, h, placed)
                    assert not MOVES.search(text), text
                    got = jax.jit(update)(h, placed)
                check(got, hyper(), tree)
                for column in (got.params, got.m, got.v):
                    for x, spec in zip(column, specs, strict=True):
                        where = NamedSharding(mesh, spec)
                        assert x.sharding.is_equivalent_to(where, x.ndim), (spec, x.sharding)


def shards_that_are_not_even() -> None:
    """What pads a shard is updated too, and seen by nobody."""
    tree, mesh = leaves([(8, 3)]), mesh_of()
    h, placed = place(mesh, hyper(), tree, [P("x")])

    def in_parts(h: Any, tree: dict[str, Any]) -> Any:
        cut = {kind: [x[0][:7]] for kind, x in tree.items()}
        where = NamedSharding(mesh, P("x"))
        cut = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, where), cut)
        return update(h, cut)

    _, line = calls(in_parts, h, placed)
    assert "f32[2,3]" in line, line
    assert "f32[7,3]" not in line, line
    check(jax.jit(in_parts)(h, placed), hyper(), {k: [x[0][:7]] for k, x in tree.items()})


def float64_groups_and_scales() -> None:
    """The dtypes are those of the equation, whatever the compiling thread is set to."""
    with jax.enable_x64(True):
        tree, mesh = leaves(SHAPES[:2], "float64", state="float64"), mesh_of()
        scales = np.array([0.5, 2.0])
        rows = hyper(2, dtype=np.float64)
        _, placed = place(mesh, rows, tree, [P("x"), P()])
        # Scalars that come in pieces are put together.
        h, factors = (jax.device_put(x, NamedSharding(mesh, P("y"))) for x in (rows, scales))

        def step(h: Any, tree: dict[str, Any], factors: Any) -> Any:
            return update(h, tree, leaf_scale=factors, groups=[1, 0])

        program = jax.jit(step).lower(h, placed, factors)
    compiled = program.compile()
    with jax.enable_x64(True):
        check(compiled(h, placed, factors), rows, tree | {"leaf_scale": scales}, [1, 0])


def state_that_is_cut_smaller_than_its_param() -> None:
    """ZeRO: the device that has a part of the moments updates that part of the param."""
    tree, mesh = leaves([(16, 8)]), mesh_of()
    h, placed = place(mesh, hyper(), tree, [P()])
    for kind in ("m", "v"):
        placed[kind] = [jax.device_put(placed[kind][0], NamedSharding(mesh, P("x")))]

    def step(h: Any, tree: dict[str, Any]) -> Any:
        new = update(h, tree)
        whole = jax.lax.with_sharding_constraint(new.params, NamedSharding(mesh, P()))
        return new._replace(params=whole)

    for f in (update, step):
        _, line = calls(f, h, placed)
        assert "f32[4,8]" in line, line
        assert "f32[16,8]" not in line, line
        check(jax.jit(f)(h, placed), hyper(), tree)
    assert jax.jit(step)(h, placed).params[0].sharding.is_fully_replicated


def the_older_partitioner_is_refused() -> None:
    """And is never asked: its callbacks raise, and every other check here passes."""
    tree, mesh = leaves(SHAPES), mesh_of()
    h, placed = place(mesh, hyper(), tree, [P("x", "y"), P("y"), P(), P(), P()])
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        with pytest.raises(NativeUnavailableError, match="jax_use_shardy_partitioner is off"):
            jax.jit(update).lower(h, placed)
        text = jax.jit(adamw_update).lower(h, **placed).compile().as_text()
        assert not MOVES.search(text), text
        check(jax.jit(adamw_update)(h, **placed), hyper(), tree)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def while_another_program_is_traced() -> None:
    """What is known while tracing is computed then, and compiled on the tracing thread."""
    tree, mesh = leaves(SHAPES[:2]), mesh_of()
    h, placed = place(mesh, hyper(), tree, [P("x", "y"), P("y")])

    def outer(x: Any) -> Any:
        with jax.ensure_compile_time_eval():
            got = jax.jit(update)(h, placed)
        check(got, hyper(), tree)
        return x + got.params[1][0]

    jax.jit(outer)(1.0)


def gradients_follow_their_params() -> None:
    """One of unknown sharding is computed in its param's; one that differs is moved."""
    tree, mesh = leaves([(16, 8)]), mesh_of()
    h, placed = place(mesh, hyper(), tree, [P("x", "y")])

    def from_outer(h: Any, tree: dict[str, Any], a: Any, b: Any) -> Any:
        return update(h, tree | {"grads": [a[:, None] * b[None]]})

    a, b = np.linspace(-1, 1, 16, dtype=np.float32), np.linspace(0, 2, 8, dtype=np.float32)
    text, line = calls(from_outer, h, placed, a, b)
    assert not GATHERS.search(text), text
    assert "f32[4,4]" in line, line
    assert "f32[16,8]" not in line, line
    check(jax.jit(from_outer)(h, placed, a, b), hyper(), tree | {"grads": [a[:, None] * b]})
    placed["grads"] = [jax.device_put(tree["grads"][0], NamedSharding(mesh, P("y")))]
    check(jax.jit(update)(h, placed), hyper(), tree)


def in_place_where_donated() -> None:
    tree, mesh = leaves([(64, 8)] * 3), mesh_of()
    h, placed = place(mesh, hyper(), tree, [P("x")] * 3)

    def step(h: Any, state: dict[str, Any], grads: Any) -> Any:
        new = update(h, state | {"grads": grads})
        return {kind: getattr(new, kind) for kind in state}

    grads = placed.pop("grads")
    compiled = jax.jit(step, donate_argnums=1).lower(h, placed, grads).compile()
    text = compiled.as_text()
    assert not re.search(r"f32\[16,8\]\S* copy\(", text), text
    assert compiled.memory_analysis().alias_size_in_bytes == 9 * 16 * 8 * 4


def what_cannot_be_partitioned_is_refused() -> None:
    tree, mesh = leaves([(16, 8)]), mesh_of()
    h, placed = place(mesh, hyper(), tree, [P("x")])
    with jax.set_mesh(mesh):
        some = jax.shard_map(update, in_specs=(P(), P("x")), out_specs=P("x"), axis_names={"x"})
        with pytest.raises(NativeUnavailableError, match="partly inside of shard_map"):
            jax.jit(some).lower(h, placed)
        many = jax.vmap(update, in_axes=(0, None))
        with pytest.raises(NativeUnavailableError, match="a batch is partitioned"):
            jax.jit(many).lower(np.stack([hyper()] * 2), placed)


def sums_are_one_sum() -> None:
    """Of params, updates and gradients, however leaves are cut: those that one device makes."""
    options: dict[str, dict[str, bool]] = {"float32": {}, "bfloat16": {"amsgrad": True}}
    # The last is of 7 rows on 4 devices within the program: padding does not count.
    shapes = [(16, 8), (8,), (16, 3), (0, 4), (), (8, 3)]
    specs = [P("x", "y"), P("y"), P(("y", "x")), P(), P(), P("x")]
    kinds = itertools.product((AxisType.Auto, AxisType.Explicit), ("tree", "leaves"))
    for (kind, mode), dtype in zip(kinds, [*options] * 2, strict=True):
        tree, mesh = leaves(shapes, dtype, **options[dtype]), mesh_of(kind)
        is_cut = kind == AxisType.Auto

        def step(h: Any, tree: dict[str, Any], mode: str = mode, is_cut: bool = is_cut) -> Any:
            if is_cut:
                tree = {k: [*xs[:-1], xs[-1][:7]] for k, xs in tree.items()}
            return update(h, tree, sums=mode, grad_sums=True)

        want = jax.jit(step)(hyper(), tree).sums
        with jax.set_mesh(mesh):
            h, placed = place(mesh, hyper(), tree, specs)
            compiled = jax.jit(step).lower(h, placed).compile()
            text, found = compiled.as_text(), compiled(h, placed).sums
        assert CALL in text
        assert len(REDUCES.findall(text)) == 1, text
        np.testing.assert_allclose(found, want, rtol=RTOL)


def norms_are_one_sum() -> None:
    """However leaves are cut, of whatever magnitude: one all-reduce, and the norm of all."""
    shapes = [(8, 6), (8,), (16, 3), (16,), (3, 5), (2, 8), ()]
    specs = [P("x", "y"), P("x"), P("y"), P(("y", "x")), P(), P(None, "x"), P()]
    rng = np.random.default_rng(0)
    usual = [np.asarray(rng.standard_normal(shape), np.float32) for shape in shapes]
    # Where one device's sum overflows, the others' count in the small unit.
    huge = [np.asarray(1e25 * x if i == 0 else x, np.float32) for i, x in enumerate(usual)]
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind)
        for leaves_, per_leaf in itertools.product((usual, huge), (False, True)):
            placed = [
                jax.device_put(x, NamedSharding(mesh, spec))
                for x, spec in zip(leaves_, specs, strict=True)
            ]
            with jax.set_mesh(mesh):
                f = jax.jit(functools.partial(adamw_sum_of_squares, per_leaf=per_leaf))
                text = f.lower(np.float32(0.5), placed).compile().as_text()
                found = f(np.float32(0.5), placed)
            assert len(REDUCES.findall(text)) == 1, text
            assert not GATHERS.search(text)
            want = np.array([np.sum((0.5 * x.astype(np.float64)) ** 2) for x in leaves_])
            np.testing.assert_allclose(
                np.asarray(found.sum, np.float64) / np.asarray(found.unit, np.float64) ** 2,
                want if per_leaf else want.sum(),
                rtol=RTOL,
            )


def norms_see_what_is_not_finite() -> None:
    mesh = mesh_of()
    for bad in (np.nan, np.inf, -np.inf):
        x, y = np.ones((8, 6), np.float32), np.ones(4, np.float32)
        x[7, 5] = bad
        placed = [jax.device_put(x, NamedSharding(mesh, P("x", "y"))), y]
        assert not np.isfinite(jax.jit(adamw_sum_of_squares)(np.float32(1.0), placed).sum)
        by_leaf = functools.partial(adamw_sum_of_squares, per_leaf=True)
        sums = jax.jit(by_leaf)(np.float32(1.0), placed).sum
        np.testing.assert_array_equal(np.isfinite(sums), [False, True])


def padding_has_no_norm() -> None:
    """Of 7 rows on 4 devices the last has one, and one of 1 row none on three."""
    mesh = mesh_of()
    where = NamedSharding(mesh, P("x"))
    x = np.arange(1.0, 25.0, dtype=np.float32).reshape(8, 3)

    def f(x: jax.Array) -> Any:
        cut = [jax.lax.with_sharding_constraint(x[:n] + 1, where) for n in (7, 1)]
        return adamw_sum_of_squares(jnp.float32(1.0), cut)

    compiled = jax.jit(f).lower(jax.device_put(x, where)).compile()
    assert "f32[2,3]" in compiled.as_text()
    found = compiled(jax.device_put(x, where))
    assert found.sum == ((x[:7] + 1) ** 2).sum() + ((x[:1] + 1) ** 2).sum()  # whole numbers


def norms_that_no_partitioner_is_asked_for() -> None:
    """A batch, an exported program, the older partitioner: XLA's own partition of StableHLO."""
    mesh = mesh_of()
    x = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    placed = jax.device_put(x, NamedSharding(mesh, P("x")))

    def f(x: jax.Array) -> jax.Array:
        return adamw_sum_of_squares(jnp.float32(1.0), [x]).sum

    assert partitioned_norm.TARGET_NAME in jax.jit(f).lower(placed).as_text()
    assert partitioned_norm.TARGET_NAME not in jax.export.export(jax.jit(f))(placed).mlir_module()
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(placed), (x**2).sum(1))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        assert jax.jit(f)(placed) == (x**2).sum()
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def gradients_do_not_say_where_states_lie() -> None:
    """A gradient that XLA cuts, of a param that it does not: nothing but it is gathered."""
    mesh = mesh_of()
    whole = NamedSharding(mesh, P())
    state = jax.device_put([np.ones((64, 8), np.float32)], whole)
    x = jax.device_put(np.ones((64, 16), np.float32), NamedSharding(mesh, P("x")))

    def step(h: Any, p: Any, x: jax.Array) -> Any:
        grads = [x @ jnp.ones((16, 8))]  # rows are cut
        return adamw_update(h, p, grads, p, p)

    text = jax.jit(step, out_shardings=whole).lower(hyper(), state, x).compile().as_text()
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 1, text


def exported_programs_of_several_models() -> None:
    """Each says which of its own values lie alike, and nothing of another's in one program."""
    mesh, bound = mesh_of(), functools.partial(adamw_update, implementation="xla")
    step = jax.jit(lambda h, tree: bound(h, **tree))
    trees = [leaves([(8, n)]) for n in (8, 9)]
    (h, first), (_, second) = (place(mesh, hyper(), tree, [P("x")]) for tree in trees)
    one, two = (jax.export.export(step)(h, tree).call for tree in (first, second))
    for inner in (two, step):
        f = jax.jit(lambda x, y, inner=inner: (one(h, x), inner(h, y), one(h, x)))
        for got, tree in zip(f(first, second), (trees[0], trees[1], trees[0]), strict=True):
            check(got, hyper(), tree)


def lowers_for_an_abstract_mesh() -> None:
    mesh = AbstractMesh((4,), ("x",), (AxisType.Auto,))
    struct = jax.ShapeDtypeStruct((8,), np.float32, sharding=NamedSharding(mesh, P("x")))
    tree = {kind: [struct] for kind in ("params", "grads", "m", "v")}
    text = jax.jit(update).trace(hyper(), tree).lower(lowering_platforms=("cuda",)).as_text()
    assert f"stablehlo.custom_call @{partitioned.TARGET_NAME}" in text
    sizes = f"{{i=1, j={NUM_SLOTS}, k=8}}"
    rule = f"<([i, j], [k], [k], [k], [k])->([k], [k], [k]) {sizes}"
    assert f"{rule} need_replication={{i, j}}" in text, text


CHECKS = {
    f.__name__: f
    for f in (
        each_device_updates_its_shards,
        shards_that_are_not_even,
        float64_groups_and_scales,
        state_that_is_cut_smaller_than_its_param,
        the_older_partitioner_is_refused,
        while_another_program_is_traced,
        gradients_follow_their_params,
        in_place_where_donated,
        what_cannot_be_partitioned_is_refused,
        sums_are_one_sum,
        norms_are_one_sum,
        norms_see_what_is_not_finite,
        padding_has_no_norm,
        norms_that_no_partitioner_is_asked_for,
        gradients_do_not_say_where_states_lie,
        exported_programs_of_several_models,
        lowers_for_an_abstract_mesh,
    )
}


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check: str) -> None:
    require_native()
    assert_passed(check, Path(__file__))


if __name__ == "__main__":
    main(CHECKS)
