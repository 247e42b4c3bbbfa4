"""``Group``: leaves with numbers of their own, chosen by their paths; a part of the config."""

from __future__ import annotations

from collections.abc import Callable, Hashable
import dataclasses
import re
from typing import Any, ClassVar, TypeAlias

import jax
from jax import export
from jax.typing import ArrayLike

from adamw_xla._check import calls, options, trees
from adamw_xla._inside import decay
from adamw_xla._rules.paths import no_pattern
from adamw_xla._saved.static import Compared, group_from_bytes, group_to_bytes

Schedule: TypeAlias = Callable[[jax.Array], ArrayLike] | Callable[[], ArrayLike]
ScalarOrSchedule: TypeAlias = ArrayLike | Schedule
Match: TypeAlias = str | Callable[[str, Any], bool]

_PARTS = ("complement", "log")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Group(Compared):
    """Leaves that have numbers of their own, or are frozen: one of ``AdamW(groups=...)``.

    A number that is None is that of the config. Like those of the config, numbers are leaves of a
    pytree, and all else is static: a traced number that changes does not recompile.

    Args:
      match: which leaves: a regular expression, found anywhere (``re.search``) in the leaf's path
        as ``jax.tree_util.keystr(path, simple=True, separator="/")`` writes it, such as
        ``layers/0/bias``; or a callable from that path and the leaf (of ``stacked`` layers the
        shape and dtype of one) to True or False. Leaves that are no arrays are in no group.
      learning_rate: a number, scalar array or schedule. An override of the step,
        ``adamw_step(learning_rate=...)``, takes the place of the config's rate alone: a group with
        a rate of its own keeps it.
      scale: a factor on the rate, which is the group's own, or the config's or what the step puts
        in place of that; a number or scalar array. Decay, which is times the rate, is scaled too,
        unless ``decay_times_lr=False``.
      weight_decay: a number, scalar array or schedule; overridden likewise. Where
        ``weight_decay_mask`` is False nothing decays, whatever the group says.
      beta_1: decay of the first moment, in [0, 1).
      beta_2: decay of the second moment, in [0, 1).
      epsilon: the small constant in the denominator.
      frozen: the leaves stay as they are, and have no state: ``adamw_init`` allocates none. They
        need no gradient (None in its place); one that is given is not looked at, and counts in no
        norm. State that they have already is kept (``adapt_state`` drops it). Leaves that are to
        be trained later need theirs: give them a schedule that begins with a rate of 0 instead.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: a number is out of its range, ``match`` is no regular expression, or a frozen
        group has numbers.

    Example:
      >>> import adamw_xla as ax, jax.numpy as jnp
      >>> head = ax.Group("head", learning_rate=1e-3)
      >>> biases = ax.Group(lambda path, leaf: leaf.ndim < 2, weight_decay=0.0)
      >>> config = ax.AdamW(1e-4, groups=(head, biases, ax.Group("embed", frozen=True)))
      >>> params = {"embed": jnp.ones((9, 2)), "head": jnp.ones((2, 9)), "bias": jnp.ones(9)}
      >>> ax.adamw_init(params, config).m["embed"] is None
      True
    """

    match: Match
    _: dataclasses.KW_ONLY
    learning_rate: ScalarOrSchedule | None = None
    scale: ArrayLike | None = None
    weight_decay: ScalarOrSchedule | None = None
    beta_1: ArrayLike | None = None
    beta_2: ArrayLike | None = None
    epsilon: ArrayLike | None = None
    frozen: bool = False

    NUMBERS: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "scale",
        "weight_decay",
        "beta_1",
        "beta_2",
        "epsilon",
    )

    def __post_init__(self) -> None:
        """Checks every argument."""
        self._check_match()
        given = {name: getattr(self, name) for name in self.NUMBERS}
        given = {name: value for name, value in given.items() if value is not None}

        def those(*names: str) -> dict[str, Any]:
            return {name: given[name] for name in names if name in given}

        options.coefficients(
            rates=those("learning_rate", "weight_decay"),
            betas=those("beta_1", "beta_2"),
            epsilons=those("epsilon", "scale"),
            api=self.name,
        )
        options.flag("frozen", self.frozen, self.name)
        if self.frozen and given:
            raise ValueError(
                f"{self.name}: is frozen and has {' and '.join(given)}, which nothing reads; "
                "leave out the one or the other."
            )

    def _check_match(self) -> None:
        match: Any = self.match
        if isinstance(match, str):
            if (why := no_pattern(match)) is not None:
                raise ValueError(f"{self.name}: match is no regular expression: {why}.")
        elif not callable(match) or not options.takes(match, 2):
            advice = "give its .pattern" if isinstance(match, re.Pattern) else "see Group"
            raise TypeError(
                "Group: match must be a regular expression (a string), or a callable "
                f"from a leaf's path and the leaf to True or False, got {match!r}; {advice}."
            )

    @property
    def name(self) -> str:
        """The group, as errors and tables have it."""
        return f"Group({shown(self.match)})"

    def called(self, field: str) -> str:
        """One of its arguments, as errors have it."""
        return f"{field} of {self.name}"

    def has(self, path: str, leaf: Any) -> bool:
        """Whether it matches a leaf.

        Raises:
          TypeError: its callable says neither True nor False.
        """
        if isinstance(self.match, str):
            return re.search(self.match, path) is not None
        found = self.match(path, leaf)
        if not trees.is_known_bool(found):
            raise TypeError(
                f"{self.name}: match must return True or False, known when the step is "
                f"traced; for {path!r} it returned {found!r}."
            )
        return bool(found)

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], Hashable]:
        """Numbers are children, with what follows from betas; all else is static."""
        values = {name: getattr(self, name) for name in self.NUMBERS}
        schedules = tuple((name, value) for name, value in values.items() if callable(value))
        following = {
            f"{part}_{name}": None
            if values[name] is None
            else getattr(decay.known(self, name), part)
            for name in ("beta_1", "beta_2")
            for part in _PARTS
        }
        children = tuple(
            (jax.tree_util.GetAttrKey(name), None if callable(value) else value)
            for name, value in (values | following).items()
        )
        return children, (self.match, schedules, self.frozen)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Group:
        """Rebuilds without checks, as ``AdamW`` does."""
        match, schedules, frozen = aux
        numbers, following = children[: len(cls.NUMBERS)], children[len(cls.NUMBERS) :]
        values = {**dict(zip(cls.NUMBERS, numbers, strict=True)), **dict(schedules)}
        group = object.__new__(cls)
        for name, value in {**values, "match": match, "frozen": frozen}.items():
            object.__setattr__(group, name, value)
        pairs = {"beta_1": following[:2], "beta_2": following[2:]}
        decays = {
            name: decay.Decay(values[name], *parts)
            for name, parts in pairs.items()
            if values[name] is not None
        }
        object.__setattr__(group, "_decays", decays)
        return group


def shown(match: Match) -> str:
    """What a group matches, for people."""
    return repr(match) if isinstance(match, str) else getattr(match, "__qualname__", repr(match))


def checked(groups: Any) -> tuple[Group, ...]:
    """The groups of a config, in a tuple; refuses what are none."""
    if isinstance(groups, Group):
        raise TypeError("AdamW: groups must be a tuple of Group, got one Group; write (group,).")
    if not isinstance(groups, tuple | list):
        raise TypeError(
            f"AdamW: groups must be a tuple of adamw_xla.Group, got {groups!r}; () is for none."
        )
    for group in groups:
        if not isinstance(group, Group):
            raise TypeError(f"AdamW: groups must hold adamw_xla.Group alone, got {group!r} in it.")
    return tuple(groups)


# Lets `jax.export` write functions that take a config with groups.
export.register_pytree_node_serialization(
    Group,
    serialized_name="adamw_xla.Group",
    serialize_auxdata=group_to_bytes,
    deserialize_auxdata=group_from_bytes,
)


def _aliases() -> dict[str, str]:
    """Its arguments by other names, and which options are not a group's."""
    betas = "beta_1 and beta_2"
    names = calls.ALIASES | {name: name for name in calls.ALIASES.values() if name != betas}
    own = (*Group.NUMBERS, betas)
    found = {
        alias: name if name in own else f"AdamW({name}=...) has it, for all groups"
        for alias, name in names.items()
        if alias not in own
    }
    found |= dict.fromkeys(("pattern", "path", "regex", "name", "label", "params"), "match")
    found |= dict.fromkeys(("lr_scale", "lr_mult", "multiplier"), "scale")
    return found | dict.fromkeys(("trainable", "freeze", "requires_grad"), "frozen")


Group.__init__ = calls.explained(  # type: ignore[method-assign]
    "Group",
    aliases=_aliases(),
    lacking={"match": "a regular expression for paths, or a callable (path, leaf) -> bool"},
    is_method=True,
)(Group.__init__)
