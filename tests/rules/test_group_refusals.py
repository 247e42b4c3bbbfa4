"""What groups refuse, how they are shown, and what outlives a process."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from comparing import close
import jax
from jax import export
import jax.numpy as jnp
import pytest

import adamw_xla as ax
from adamw_xla._inside.processes import _text

PARAMS = {
    "embed": jnp.ones((9, 2)),
    "layers": [{"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for _ in range(2)],
}

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no match": (lambda: ax.Group(), TypeError, "Group: lacks match, a regular expression"),
    "other name": (lambda: ax.Group("w", lr=1.0), TypeError, "no argument lr; .* learning_rate"),
    "of all": (lambda: ax.Group("w", amsgrad=True), TypeError, "no argument amsgrad; AdamW"),
    "no pattern": (lambda: ax.Group(3), TypeError, "^Group: match must be .* got 3"),
    "compiled": (lambda: ax.Group(re.compile("w")), TypeError, r"give its \.pattern"),
    "one argument": (lambda: ax.Group(lambda path: True), TypeError, "path and the leaf"),
    "no schedule": (
        lambda: ax.Group("w", learning_rate=lambda a, b: a),
        TypeError,
        "^Group.'w'.: learning_rate is a callable that",
    ),
    "bad pattern": (
        lambda: ax.Group("w("),
        ValueError,
        r"^Group.'w\('.: match is no regular .*re\.escape",
    ),
    "scale": (lambda: ax.Group("w", scale=-1.0), ValueError, "^Group.'w'.: scale must be .*-1"),
    "rate": (
        lambda: ax.Group("w", learning_rate="x"),
        TypeError,
        "^Group.'w'.: learning_rate must",
    ),
    "beta": (lambda: ax.Group("w", beta_2=1.0), ValueError, "^Group.'w'.: beta_2 must be .*1.0"),
    "frozen": (lambda: ax.Group("w", frozen=1), TypeError, "^Group.'w'.: frozen must be True"),
    "at odds": (
        lambda: ax.Group("w", frozen=True, scale=2.0, epsilon=0.0),
        ValueError,
        "^Group.'w'.: is frozen and has scale and epsilon, which nothing reads",
    ),
    "one group": (lambda: ax.AdamW(groups=ax.Group("w")), TypeError, r"write .group,."),
    "no group": (lambda: ax.AdamW(groups=["w"]), TypeError, "must hold adamw_xla.Group alone"),
    "other option": (lambda: ax.AdamW(param_groups=[]), TypeError, "here it is groups"),
}


@pytest.mark.parametrize(("call", "error", "text"), WRONG.values(), ids=WRONG)
def test_wrong_groups(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


UNFIT: dict[str, tuple[tuple[ax.Group, ...], type[Exception], str]] = {
    "no path": (
        (ax.Group("bias"), ax.Group("embedding")),
        ValueError,
        r"groups\[1\], Group.'embedding'., matches no path in params; the nearest are 'embed'",
    ),
    "no leaf": (
        (ax.Group(lambda path, leaf: leaf.ndim > 3),),
        ValueError,
        r"groups\[0\], .*lambda.*, is True for no leaf.*'embed', 'layers/0/bias'",
    ),
    "behind another": (
        (ax.Group("layers"), ax.Group("bias", scale=2.0)),
        ValueError,
        r"groups\[1\], .* has no leaf: all that it matches .2. are of Group.'layers'. before it",
    ),
    "all frozen": (
        (ax.Group("bias", frozen=True), ax.Group("", frozen=True)),
        ValueError,
        "every leaf of params is frozen, by Group.'bias'. and Group.''., so there is nothing",
    ),
}


@pytest.mark.parametrize(("groups", "error", "text"), UNFIT.values(), ids=UNFIT)
def test_groups_that_do_not_fit_the_params(groups: Any, error: Any, text: str) -> None:
    config, state = ax.AdamW(groups=groups), ax.adamw_init(PARAMS, ax.AdamW())
    for call in (
        lambda: ax.adamw_init(PARAMS, config),
        lambda: ax.adamw_step(PARAMS, PARAMS, state, config),
    ):
        with pytest.raises(error, match=text):
            call()
    ax.describe_groups(PARAMS, config)  # says so too, in its own way


def test_a_match_that_is_no_bool() -> None:
    config = ax.AdamW(groups=(ax.Group(lambda path, leaf: 1),))
    with pytest.raises(
        TypeError, match=r"^Group.*: match must return True or False.* for 'embed' it returned 1"
    ):
        ax.adamw_init(PARAMS, config)


def test_gradients_of_frozen_leaves_alone() -> None:
    config = ax.AdamW(groups=(ax.Group("embed", frozen=True),))
    grads = jax.tree.map(lambda x: None, PARAMS) | {"embed": PARAMS["embed"]}
    with pytest.raises(ValueError, match="every leaf but frozen ones is None"):
        ax.adamw_step(PARAMS, grads, ax.adamw_init(PARAMS, config), config)


def test_a_schedule_of_a_group_is_named() -> None:
    config = ax.AdamW(groups=(ax.Group("bias", weight_decay=lambda count: -1.0),))
    with pytest.raises(ValueError, match=r"weight_decay of Group.'bias'. .or what its schedule"):
        ax.adamw_step(PARAMS, PARAMS, ax.adamw_init(PARAMS, config), config)


def test_it_is_described() -> None:
    config = ax.AdamW(
        weight_decay_mask=lambda params: jax.tree.map(lambda p: p.shape != (2, 2), params),
        groups=(
            ax.Group("bias", weight_decay=0.0, scale=2.0),
            ax.Group("^embed$", frozen=True),
            ax.Group("nothing"),
        ),
    )
    rows, leaves = (x.splitlines() for x in ax.describe_groups(PARAMS, config).split("\n\n"))
    assert [line.split() for line in rows[1:]] == [
        ["0", "'bias'", "2", "4", "0.001", "*", "2", "0", "0.9", "0.999", "1e-07"],
        ["1", "'^embed$'", "1", "18", "frozen", "-", "-", "-", "-"],
        ["2", "'nothing'", "0", "0", "0.001", "0.004", "0.9", "0.999", "1e-07"],
        ["-", "rest", "2", "8", "0.001", "0.004", "0.9", "0.999", "1e-07"],
    ]
    assert [line.split(maxsplit=3) for line in leaves[1:4]] == [
        ["1", "embed", "float32[9,2]"],
        ["0", "layers/0/bias", "float32[2]"],
        ["-", "layers/0/kernel", "float32[2,2]", "no decay, by the mask"],
    ]


# ------------------------------------------------------------------------ kept, and compared


def test_an_exported_function_takes_other_numbers() -> None:
    def step(config: ax.AdamW) -> Any:
        return ax.adamw_step(PARAMS, PARAMS, ax.adamw_init(PARAMS, config), config)

    groups = ax.Group("bias", learning_rate=0.5, beta_1=0.5), ax.Group("embed", frozen=True)
    config = ax.AdamW(groups=groups)
    exported = export.export(jax.jit(step), platforms=("cpu",))(config)
    loaded = export.deserialize(exported.serialize())
    other = dataclasses.replace(groups[0], learning_rate=0.25, beta_1=0.75)
    for c in (config, ax.AdamW(groups=(other, groups[1]))):
        close(loaded.call(c), jax.jit(step)(c))
    for group, what in (
        (ax.Group(lambda path, leaf: True), "match of a Group"),
        (ax.Group("w", weight_decay=lambda count: 0.0), "weight_decay of Group.'w'."),
    ):
        kept = export.export(jax.jit(lambda c: 0))(ax.AdamW(groups=(group,)))
        with pytest.raises(TypeError, match=f"AdamW: {what} is a callable, which no file holds"):
            kept.serialize()


def test_configs_with_equal_groups_are_equal() -> None:
    def made(**numbers: Any) -> ax.AdamW:
        return ax.AdamW(groups=[ax.Group("w", **numbers)])

    same = made(scale=jnp.float32(2)), made(scale=jnp.float32(2))
    assert same[0] == same[1]
    assert len({*same, made(scale=2.0), made(), ax.AdamW(), made(frozen=True)}) == 5
    assert jax.tree.map(lambda x: x, same[0]) == same[0]


def test_processes_compare_their_numbers() -> None:
    def text(scale: float) -> str:
        matched = ax.Group(lambda path, leaf: True, scale=scale, weight_decay=lambda k: 0.5)
        return _text("groups", (ax.Group("w", frozen=True), matched))

    assert text(2.0) == text(2.0)
    assert text(2.0) != text(3.0)
