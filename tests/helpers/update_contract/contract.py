"""What every implementation of the update must do: one class of tests, and what some can more.

A subclass says of which: ``class TestIt(UpdateContract): implementation = ...``. Programs are
shared: those of one kind of update, on leaves of the same types, are compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import types
from typing import Any, ClassVar

from bounded import assert_within
from cpu_oracle import DTYPES, check, expected, hyper, leaves, split
from hypothesis import given, settings
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import words

from adamw_xla_lowering import Slot, UpdateResult

from .implementations import IMPLEMENTATIONS, Implementation
from .specs import (
    ALL,
    BATCH_SHAPES,
    BATCHES,
    FOR_CHANGES,
    NESTED,
    SHAPES,
    Batch,
    Dtypes,
    Nested,
    Options,
    cases,
    name_of,
    wide,
)

Tree = dict[str, Any]


def columns(result: UpdateResult) -> dict[str, list[Any]]:
    return {kind: column for kind, column in result._asdict().items() if column is not None}


def in_words(trees: Sequence[Tree]) -> Tree:
    """Leaves of several trees as one, with a word of each m and v."""
    tree = {kind: [x for t in trees for x in t[kind]] for kind in trees[0]}
    m, v = tree.pop("m"), tree.pop("v")
    pairs = zip(m, v, strict=True)
    return tree | {"words": [words.encode(m, v, np.uint32(0)) for m, v in pairs]}


class Tests:
    """Of one implementation."""

    implementation: ClassVar[Implementation]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _there(cls) -> Iterator[None]:
        with jax.enable_x64(True), cls.implementation.there():
            yield

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Options and dtypes are those that the implementation says."""
        if "options" in metafunc.fixturenames:
            metafunc.parametrize("options", self.implementation.options, ids=name_of)
        if "dtypes" in metafunc.fixturenames:
            metafunc.parametrize("dtypes", self.implementation.dtypes, ids="-".join)

    def run(self, h: Any, tree: Tree, groups: Any = None, **flags: Any) -> UpdateResult:
        groups = None if groups is None else tuple(groups)
        return self.implementation.step(groups, **flags)(h, tree)

    def check(self, h: Any, tree: Tree, groups: Any = None, **flags: bool) -> None:
        check(self.run(h, tree, groups, **flags), h, tree, groups, **flags)

    def shapes(self, options: Options, dtypes: Dtypes) -> Sequence[tuple[int, ...]]:
        """Those of the program of these options and dtypes."""
        here = self.implementation
        every = [*SHAPES, *here.shapes]
        if not here.in_turn:
            return every
        place = list(here.options).index(options) + list(here.dtypes).index(dtypes)
        return every[place % here.in_turn :: here.in_turn]


class UpdateContract(Tests):
    """Results are what the formulas say, of the shapes and dtypes of what they replace."""

    def test_it_is_what_is_tested(self) -> None:
        here = self.implementation
        text = here.lowered(here.plain(), hyper(), leaves([(4,)] * 2))
        others = {x.mark for x in IMPLEMENTATIONS.values() if x.platform == here.platform}
        assert {mark for mark in others if mark in text} == {here.mark}

    def test_each_option_matches_the_formulas(self, options: Options, dtypes: Dtypes) -> None:
        operands, flags = split(dict(options))
        tree = leaves(self.shapes(options, dtypes), *dtypes, **operands)
        self.check(hyper(dtype=wide(dtypes)), tree, **flags)

    def test_a_skipped_step_keeps_every_bit(self, dtypes: Dtypes) -> None:
        for options in self.implementation.options:
            if not options.get("skip"):
                continue
            operands, flags = split(dict(options))
            tree = leaves(self.shapes(options, dtypes), *dtypes, **operands)
            tiny = np.finfo(np.float16).tiny / 8  # subnormal in float16
            for column in tree.values():
                for x in column:
                    x.flat[:3] = [np.nan, np.inf, tiny][: x.size]
            result = self.run(hyper(dtype=wide(dtypes), APPLY=0.0), tree, **flags)
            for kind, column in columns(result).items():
                for got, want in zip(column, tree[kind], strict=True):
                    assert np.asarray(got).tobytes() == want.tobytes(), kind

    @pytest.mark.parametrize("flags", [{"stochastic": True}, {"split": True}], ids=name_of)
    def test_formats_keep_what_is_not_theirs(self, flags: dict[str, bool]) -> None:
        """Every bit where a step is skipped; and remainders beside params that are no halves."""
        shapes = [(17,), (3, 5), (1000,)]
        tree = in_words([leaves(shapes, param, ema=True) for param in ("bfloat16", "float32")])
        if flags.get("split"):
            size = [np.prod(x.shape, dtype=int) for x in tree["params"]]
            tree["remainder"] = [
                np.resize(np.arange(-9, n - 9, dtype=np.int16) * 331, x.shape)
                for n, x in zip(size, tree["params"], strict=True)
            ]
        stochastic = {"stochastic": True} if flags.get("stochastic") else {}
        for apply in (0.0, 1.0):
            result = self.run(hyper(APPLY=apply, SALT=3.0), tree, skip=True, **stochastic)
            for kind, column in columns(result).items():
                for i, (got, want) in enumerate(zip(column, tree[kind], strict=True)):
                    passes = kind == "remainder" and i >= len(shapes)
                    is_same = np.asarray(got).tobytes() == want.tobytes()
                    assert is_same == (not apply or passes), f"{kind}[{i}]"

    @pytest.mark.parametrize("where", ["params", "grads", "m", "v", "v_max", "ema"])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("flags", [{}, {"clip_value": True}], ids=name_of)
    def test_nan_and_infinity_keep_their_meaning(
        self, flags: dict[str, bool], value: float, where: str
    ) -> None:
        tree = leaves([(70,)], amsgrad=True, ema=True)
        tree[where][0][[0, 20, 49, 69]] = value  # in the bodies and in the tails of loops
        self.check(hyper(), tree, **flags)

    def test_a_nan_clip_bound_propagates(self) -> None:
        tree = leaves([(70,)], amsgrad=True, ema=True)
        result = self.run(hyper(CLIP_VALUE=np.nan), tree, clip_value=True)
        assert np.isnan(result.params[0]).all()

    def test_slots_of_unused_options_are_ignored(self) -> None:
        ignored = {"CLIP_VALUE": np.nan, "EMA_OVERWRITE": 1.0, "APPLY": 0.0, "EPSILON_ROOT": 9.0}
        rows = hyper(**ignored, GRAD_STEP_SIZE=np.nan)
        self.check(rows, leaves([(70,)], amsgrad=True, ema=True))

    def test_groups_and_leaf_scale_reach_their_leaves(self) -> None:
        n = 8
        tree: Tree = {"leaf_scale": np.linspace(0.1, 2.0, n, dtype=np.float32)}
        tree |= leaves([(i % 5 + 1,) for i in range(n)])
        self.check(hyper(3), tree, [i * 7 % 3 for i in range(n)])

    def test_dtypes_may_differ_from_leaf_to_leaf(self) -> None:
        trees = [leaves([(33,)], param, seed=i) for i, param in enumerate(DTYPES)]
        tree = {kind: [t[kind][0] for t in trees] for kind in trees[0]}
        self.check(hyper(dtype=np.float64), tree)

    @pytest.mark.parametrize("shapes", [[], [(0,)], [(2, 0, 4), (0, 1)]], ids=str)
    def test_there_may_be_nothing_to_update(self, shapes: list[tuple[int, ...]]) -> None:
        tree = leaves(shapes, "bfloat16", ema=True)
        result = self.run(hyper(), tree)
        for kind, column in columns(result).items():
            assert [(x.shape, x.dtype) for x in column] == [(x.shape, x.dtype) for x in tree[kind]]

    # ------------------------------------------------------------------- transformations

    @pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
    def test_vmap(self, batch: Batch) -> None:
        made = batch.make(5, [*BATCH_SHAPES, *self.implementation.batch_shapes])
        step = jax.vmap(self.implementation.plain(made.groups), made.axes)
        got = columns(self.implementation.jit(step)(made.rows, made.tree))
        for i in range(5):
            one = types.SimpleNamespace(**{k: [x[i] for x in c] for k, c in got.items()})
            check(one, *made.member(i), made.groups)

    def test_vmap_where_some_leaves_of_a_kind_are_shared(self) -> None:
        h, tree = hyper(batch=(3,)), leaves([(3, 2, 5), (3, 10)])
        shared = tree["m"][0][0]
        step = self.implementation.plain()

        def one(h: Any, tree: Tree) -> Any:
            return step(h, tree | {"m": [shared, *tree["m"]]})[:3]

        operands = tree | {"m": tree["m"][1:]}
        got = self.implementation.jit(jax.vmap(one))(h, operands)
        for replica, i in np.ndindex(3, 2):
            leaf = {kind: column[i][replica] for kind, column in tree.items()}
            leaf["m"] = leaf["m"] if i else shared
            want = expected(h[replica, 0], leaf)
            for kind, column in zip(("params", "m", "v"), got, strict=True):
                assert_within(column[i][replica], want[kind], f"{kind}[{i}]")

    @pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
    def test_vmap_of_vmap(self, nested: Nested) -> None:
        """Each operand has some of the batches, and finds its own member in them."""
        operands = {"hyper": hyper()} | {kind: x for kind, (x,) in leaves([(11,)]).items()}
        rng = np.random.default_rng(1)
        for kind, axes in nested.axes.items():
            own = [nested.sizes[axis] for axis in axes]
            factor = rng.uniform(0.5, 1.5, own).astype(np.float32)
            x = operands[kind]
            operands[kind] = factor.reshape(*own, *[1] * x.ndim) * x

        def step(operands: Tree) -> Any:
            h, tree = operands["hyper"], {k: [operands[k]] for k in ("params", "grads", "m", "v")}
            return self.implementation.plain()(h, tree)[:3]

        for axis in reversed(nested.sizes):
            in_axes = {kind: 0 if axis in nested.axes.get(kind, "") else None for kind in operands}
            step = jax.vmap(step, in_axes=(in_axes,))
        got = self.implementation.jit(step)(operands)
        for at in np.ndindex(*nested.sizes.values()):
            where = dict(zip(nested.sizes, at, strict=True))
            one = {
                kind: x[tuple(where[axis] for axis in nested.axes.get(kind, ""))]
                for kind, x in operands.items()
            }
            want = expected(one.pop("hyper")[0], one)
            for kind, (x,) in zip(("params", "m", "v"), got, strict=True):
                assert x.shape == (*nested.sizes.values(), 11)
                assert_within(x[at], want[kind], f"{kind}[{at}]")

    def test_a_skip_is_decided_for_each_member_of_a_batch(self) -> None:
        h = hyper(batch=(4,))
        h[1::2, ..., Slot.APPLY] = 0
        tree = leaves([(4, 9)])
        step = jax.vmap(self.implementation.plain(skip=True))
        params = np.asarray(self.implementation.jit(step)(h, tree).params[0])
        changed = (params != tree["params"][0]).all(axis=1)
        np.testing.assert_array_equal(changed, [True, False, True, False])
        np.testing.assert_array_equal(params[1::2], tree["params"][0][1::2])

    def test_in_the_bodies_of_scan_and_cond(self) -> None:
        tree, h, kinds = leaves([(100,), (10, 10)]), hyper(), ("params", "m", "v")
        step = self.implementation.plain()

        def body(state: Any, g: Any) -> Any:
            def apply(s: Any) -> Any:
                return step(h, dict(zip(kinds, s, strict=True)) | {"grads": g})[:3]

            return jax.lax.cond(g[0][0] > 0, apply, lambda s: s, state), None

        def loop(state: Any, grads: Any) -> Any:
            return jax.lax.scan(body, state, grads)[0]

        grads = [np.stack([g * sign for sign in (1, -1, 2, 3)]) for g in tree["grads"]]
        state = tuple([jnp.asarray(x) for x in tree[k]] for k in kinds)
        assert self.implementation.mark in self.implementation.lowered(loop, state, grads)
        got = self.implementation.jit(loop)(state, grads)
        applied = [k for k in range(4) if grads[0][k][0] > 0]
        assert 0 < len(applied) < 4
        for i in range(2):
            leaf = {kind: tree[kind][i] for kind in kinds}
            for k in applied:
                leaf = expected(h[0], leaf | {"grads": grads[i][k]})
            for kind, column in zip(kinds, got, strict=True):
                assert_within(column[i], leaf[kind], f"{kind}[{i}]")


class LowersAsAnother(Tests):
    """For a platform whose programs are those of one that keeps the contract: to the letter."""

    other: ClassVar[Implementation]

    def same(self, f: Callable[[Implementation], Any], *args: Any) -> None:
        ours, theirs = (x.lowered(f(x), *args) for x in (self.implementation, self.other))
        assert ours == theirs

    def test_programs_are_the_same(self, options: Options, dtypes: Dtypes) -> None:
        operands, flags = split(dict(options))
        tree = leaves([*SHAPES, *self.implementation.shapes], *dtypes, **operands)
        self.same(lambda x: x.plain(**flags), hyper(dtype=wide(dtypes)), tree)

    @pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
    def test_batched_programs_are_the_same(self, batch: Batch) -> None:
        made = batch.make(5, BATCH_SHAPES)
        self.same(lambda x: jax.vmap(x.plain(made.groups), made.axes), made.rows, made.tree)


class MakesChanges(Tests):
    """With ``delta``, what is to be added to the params: in the arithmetic's dtype."""

    @pytest.mark.parametrize("choice", FOR_CHANGES, ids=name_of)
    def test_changes_match_the_formulas(self, choice: Options) -> None:
        operands, flags = split(dict(choice))
        trees = [leaves([(17,)], param, **operands) for param in ("float32", "bfloat16")]
        tree = {kind: [x for t in trees for x in t[kind]] for kind in trees[0]}
        step = self.implementation.step(delta=True, **flags)
        check(step(hyper(), tree), hyper(), tree, delta=self.implementation.delta, **flags)

    def test_a_skipped_step_changes_nothing(self) -> None:
        operands, flags = split(ALL)
        trees = [leaves([(17,)], param, **operands) for param in ("float32", "bfloat16")]
        tree = {kind: [x for t in trees for x in t[kind]] for kind in trees[0]}
        tree["grads"] = [np.full_like(x, np.nan) for x in tree["grads"]]
        h = hyper(APPLY=0.0)
        result = self.implementation.step(delta=True, **flags)(h, tree)
        check(result, h, tree, delta=self.implementation.delta, **flags)


class UpdatesInPlace(Tests):
    """Results take the place of what a caller donates, and of nothing else."""

    def test_what_is_donated_is_updated_in_place(self) -> None:
        tree = leaves([(1000,), (30, 30)], ema=True)
        step = self.implementation.plain()

        # JAX pairs donated operands with results of their type in order.
        def update(h: Any, grads: Any, kept: Any) -> UpdateResult:
            return step(h, dict(zip(kinds, kept, strict=True)) | {"grads": grads})

        kinds = [kind for kind in UpdateResult._fields if kind in tree]
        kept = [tree[kind] for kind in kinds]
        donating = self.implementation.jit(update, donate_argnums=(2,))
        compiled = donating.lower(hyper(), tree["grads"], kept).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == sum(x.nbytes for column in kept for x in column)
        assert memory.temp_size_in_bytes < 1000
        assert " copy(" not in compiled.as_text()

    def test_what_is_not_donated_keeps_its_values(self) -> None:
        tree = jax.tree.map(jnp.asarray, leaves([(1000,), ()], ema=True))
        before = jax.tree.map(np.array, tree)
        self.run(hyper(), tree)
        jax.tree.map(np.testing.assert_array_equal, tree, before)

    def test_one_value_may_stand_for_several_operands(self) -> None:
        """XLA merges equal zeros; a kernel must still get separate buffers to write to."""
        step = self.implementation.plain()

        def first_step(p: Any) -> Any:
            zeros = jnp.zeros_like(p)
            result = step(hyper(), {"params": [p], "grads": [p], "m": [zeros], "v": [zeros]})
            return result.m[0], result.v[0]

        p = np.linspace(-1, 1, 100, dtype=np.float32)
        zeros = np.zeros_like(p)
        want = expected(hyper()[0], {"params": p, "grads": p, "m": zeros, "v": zeros})
        for kind, x in zip(("m", "v"), self.implementation.jit(first_step)(p), strict=True):
            assert_within(x, want[kind], kind)


class UpdatesAnyTree(Tests):
    """For what is compiled quickly: trees and options that nobody thought of."""

    def test_any_tree_and_options_match_the_formulas(self) -> None:
        @settings(max_examples=25, deadline=None, derandomize=True, database=None)
        @given(cases())
        def one(case: dict[str, Any]) -> None:
            self.check(case["h"], case["tree"], case["groups"], **case["flags"])

        one()
