"""Sums of squares beside the update: of gradients, of new params, and of what was added to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from bounded import Bounded, assert_within
from cpu_oracle import DTYPES, compute_dtype, expected, hyper, leaves, split
import jax
import numpy as np
import pytest
import words

from adamw_xla_lowering import Slot, UpdateResult, small_unit

from .contract import Tests, Tree, in_words
from .specs import ALL, BATCHES, Batch, Options

Modes = Literal["tree", "leaves"]

SHAPES = [(17,), (0,), (), (4, 3, 7), (3, 5)]
NARROW = ["bfloat16", "float16", "float32"]


def mixed(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], **operands: bool) -> Tree:
    """Leaves of these dtypes in turn; the gradients of some are of another one."""
    trees = [
        leaves([shape], dtypes[i % n], dtypes[i // 2 % n], dtypes[-1], seed=i, **operands)
        for n in [len(dtypes)]
        for i, shape in enumerate(shapes)
    ]
    return {kind: [x for tree in trees for x in tree[kind]] for kind in trees[0]}


def wanted(
    got: UpdateResult, h: Any, tree: Tree, roundings: Any, groups: Any = None, **flags: Any
) -> list[list[Bounded]]:
    """For each leaf the sums that belong to a result: of its params as they are stored."""
    scales, found = tree.get("leaf_scale"), []
    for i in range(len(tree["params"])):
        leaf = {kind: column[i] for kind, column in tree.items() if kind != "leaf_scale"}
        dtype, params = compute_dtype(leaf["params"]), leaf["params"]
        stored = np.asarray(got.params[i]).astype(dtype)
        if flags.get("delta"):
            stored = params.astype(dtype) + stored
        if "words" in leaf:
            leaf |= dict(zip("mv", words.decode(leaf.pop("words")), strict=True))
        if "remainder" in leaf:
            master = words.join(params, leaf.pop("remainder")).reshape(params.shape)
            leaf |= {"params": master} if params.dtype == DTYPES["bfloat16"] else {}
        scale = 1.0 if scales is None else float(scales[i])
        row = h[groups[i] if groups else 0]
        added = expected(row, leaf, leaf_scale=scale, adds=True, **flags)["added"]
        grads = np.asarray(leaf["grads"]).astype(dtype)
        with np.errstate(all="ignore"):
            numbers = [Bounded.operand(x, dtype) for x in (grads, stored)]
            own = [x.sum_of_squares(roundings(stored.size)) for x in (*numbers, added)]
            small = Bounded.operand(grads.astype(np.float64) * small_unit(dtype), dtype)
        found.append([own[0], small.sum_of_squares(roundings(stored.size)), *own[1:]])
    return found


class GivesSums(Tests):
    """The last result, of every option, dtype, format and batch."""

    def sums(self, mode: Modes, h: Any, tree: Tree, groups: Any = None, **flags: Any) -> Any:
        return self.run(h, tree, groups, sums=mode, grad_sums=True, **flags)

    def check_sums(
        self, got: UpdateResult, h: Any, tree: Tree, mode: Modes, groups: Any = None, **flags: Any
    ) -> None:
        want = wanted(got, h, tree, self.implementation.roundings, groups, **flags)
        kinds = ("grads", "small_grads", "params", "updates")
        table = np.asarray(got.sums)
        assert table.dtype == h.dtype
        rows = want
        if mode == "tree":
            # In float64 the oracle rounds as well.
            rows = [[sum_of([row[k] for row in want], h.dtype) for k in range(len(kinds))]]
            table = table[None]
        assert table.shape == (len(rows), len(kinds))
        for i, row in enumerate(rows):
            for k, kind in enumerate(kinds):
                assert_within(table[i, k], row[k], f"{kind} of {i}")

    def test_sums_match_the_formulas(self, options: Options) -> None:
        operands, flags = split(dict(options))
        shapes = [*SHAPES, *self.implementation.shapes[-1:]]
        tree, h = mixed(shapes, NARROW, **operands), hyper()
        self.check_sums(self.sums("leaves", h, tree, **flags), h, tree, "leaves", **flags)

    @pytest.mark.parametrize("mode", ["tree", "leaves"])
    @pytest.mark.parametrize("among", [NARROW, ["float64"]], ids="-".join)
    def test_sums_of_groups_that_skip(self, among: list[str], mode: Modes) -> None:
        """A kept param has its own sum, and nothing is added to it."""
        operands, flags = split(ALL)
        h = hyper(3, dtype=np.float64 if among == ["float64"] else np.float32)
        h[1, Slot.APPLY] = 0
        tree = mixed(SHAPES, among, **operands)
        n = len(tree["params"])
        tree["leaf_scale"] = np.linspace(0.5, 2, n).astype(h.dtype)
        groups = [i % 3 for i in range(n)]
        got = self.sums(mode, h, tree, groups, **flags)
        self.check_sums(got, h, tree, mode, groups, **flags)
        if mode == "leaves":
            is_kept = [i % 3 == 1 or x.size == 0 for i, x in enumerate(tree["params"])]
            np.testing.assert_array_equal(np.asarray(got.sums)[:, 3] == 0, is_kept)

    @pytest.mark.parametrize("chosen", ["stochastic", "split"])
    def test_sums_of_formats(self, chosen: str) -> None:
        shapes = [(17,), (3, 5), (300,)]
        tree = in_words([leaves(shapes, dtype, ema=True) for dtype in ("bfloat16", "float32")])
        flags = {"stochastic": True} if chosen == "stochastic" else {}
        if chosen == "split":
            tree["remainder"] = [
                np.resize(np.arange(-9, 291, dtype=np.int16) * 331, x.shape) for x in tree["params"]
            ]
        h = hyper(SALT=3.0)
        got = self.sums("leaves", h, tree, ema_overwrite=True, **flags)
        self.check_sums(got, h, tree, "leaves", ema_overwrite=True)

    @pytest.mark.parametrize("name", ["everything", "gradients", "hyper and m"])
    @pytest.mark.parametrize("mode", ["tree", "leaves"])
    def test_vmap_of_sums(self, name: str, mode: Modes) -> None:
        batch: Batch = BATCHES[name]
        made = batch.make(3, [(5, 7), (), (0,), *self.implementation.batch_shapes[-1:]])
        step = jax.vmap(
            self.implementation.plain(made.groups, sums=mode, grad_sums=True), made.axes
        )
        got = self.implementation.jit(step)(made.rows, made.tree)
        for i in range(3):
            rows, tree = made.member(i)
            one = UpdateResult([x[i] for x in got.params], sums=got.sums[i])
            self.check_sums(one, rows, tree, mode, made.groups)

    def test_without_the_gradients_sums(self) -> None:
        """The same two columns, and the same update, as with them and as without any."""
        tree, h = leaves([(17,), (300,)]), hyper()
        every = self.sums("leaves", h, tree)
        some = self.run(h, tree, sums="leaves")
        np.testing.assert_array_equal(some.sums, np.asarray(every.sums)[:, 2:])
        none = self.run(h, tree)
        for x, y, z in zip(none.params, some.params, every.params, strict=True):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(x, z)

    @pytest.mark.parametrize("value", [1e25, np.inf, np.nan])
    def test_gradients_whose_squares_overflow(self, value: float) -> None:
        """They count in the small unit, in which nothing finite overflows."""
        tree, h = leaves([(17,), (70,)]), hyper()
        tree["grads"][1][33] = value
        sums = np.asarray(self.sums("leaves", h, tree).sums)
        assert np.isfinite(sums[0]).all()
        assert not np.isfinite(sums[1, 0])
        if value == 1e25:
            want = (1e25 * small_unit(np.float32)) ** 2
            np.testing.assert_allclose(sums[1, 1], want, rtol=1e-6)
        else:
            assert not np.isfinite(sums[1, 1])


def sum_of(terms: Sequence[Bounded], arithmetic: Any) -> Bounded:
    """In any order, rounded each time."""
    total = Bounded.operand(np.zeros(()), arithmetic)
    for term in terms:
        total = total + term
    return total
