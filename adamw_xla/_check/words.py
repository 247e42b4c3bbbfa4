"""What the APIs call the same things: a check speaks the words of the API that was called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from adamw_xla._check import restored
from adamw_xla._check.leaves import kind

_STATES = ("AdamWState", "AdamWOptState", "ScaleByAdamState")
"""The classes that hold AdamW's state: here, in the drop-in for optax, and in optax."""


@dataclasses.dataclass(frozen=True)
class Words:
    """The names that one API has.

    Attributes:
      call: the call with its arguments in order.
      state: what the state is called.
      state_class: its class.
      state_is: what the argument must be, in words.
      new_state: how one is built.
      options: what holds the options.
      another: one that holds others.
      mask: the option that says which leaves decay.
      step: the call that makes a step, and what it returns.
      replace: the state for other options; where fields are named for it, with a place for them.
      adapt: the state in the containers of the params.
      offload: the call that streams a state from host memory; empty where none does.
      placed: the one that takes a state which lies elsewhere than its params; likewise.
      pack: the state in words.
      unpack: the state of moments.
      fields: its name for a field of ``AdamWState``, where it has another.
    """

    call: str
    state: str
    state_class: str
    state_is: str
    new_state: str
    options: str
    another: str
    mask: str
    step: str
    replace: str
    adapt: str
    offload: str = ""
    placed: str = ""
    pack: str = "adamw_xla.pack_state(state)"
    unpack: str = "adamw_xla.unpack_state(state)"
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def field(self, name: str) -> str:
        """What a field of the state is called here."""
        return self.fields.get(name, name)

    def of_state(self, name: str) -> str:
        """A field of the state, with the state in front."""
        return f"{self.state}.{self.field(name)}"


NATIVE = Words(
    call="adamw_step(params, grads, state, config)",
    state="state",
    state_class=restored.NATIVE_STATE,
    state_is="an adamw_xla.AdamWState",
    new_state="adamw_init(params, config)",
    options="the config",
    another="another config",
    mask="weight_decay_mask",
    step="adamw_step returns (params, state)",
    replace="adamw_xla.adapt_state(state, params, config)",
    adapt="adamw_xla.adapt_state(state, params, config)",
    offload="adamw_step(..., offload=True)",
    placed="adamw_step(..., state_shardings=...)",
)


def is_state(value: Any) -> bool:
    """Whether this is AdamW's state, here or in optax."""
    return type(value).__name__ in _STATES


def misplaced(words: Words, **arguments: Any) -> None:
    """Refuses a call with a state, a config or a step's result where something else belongs.

    Args:
      words: of the API that was called.
      arguments: params, grads, state and config, those that the call has.
    """
    for name, value in arguments.items():
        name = words.state if name == "state" else name
        if type(value) is tuple and len(value) in (2, 3) and is_state(value[1]):
            raise TypeError(
                f"{name}: got a tuple of {len(value)}, the second an {type(value[1]).__name__}: "
                f"{words.step}; unpack it, and pass the one of them that {name} stands for."
            )
    for name, value in arguments.items():
        wrong = _is_config(value) if name != "config" else is_state(value)
        if wrong or (is_state(value) and name != "state"):
            found = f"{name}: got an {type(value).__name__}"
            state = arguments.get("state")
            if "state" in arguments and name != "state" and not is_state(state):
                found = f"{words.state} must be {words.state_is}, got {kind(state)}, and {found}"
            raise TypeError(f"{found}; the order is {words.call}.")


def _is_config(value: Any) -> bool:
    return type(value).__name__ == "AdamW" and hasattr(value, "beta_1")


def not_a_state(words: Words, value: Any) -> TypeError:
    """The error for something else in place of the state."""
    return TypeError(
        f"{words.state} must be {words.state_is}, got {kind(value)}. {_way_to(words, value)} "
        f"(The order is {words.call}.)"
    )


def _way_to(words: Words, value: Any) -> str:
    """What to do to have the state that ``value`` may stand for."""
    if (held := _held(value, words.state)) is not None:
        where, state = held
        if kind(state) == words.state_class:
            return f"{where} is one."
        if hasattr(state, "native"):
            return f"{where}.native() is one."
        return _from_optax_state(words, words.state)
    found = restored.find(value, words.state, words.state_class)
    if found is None:
        return f"The first one is {words.new_state}, each other what the last step returned."
    it = "It" if found.where == words.state else found.where
    looks = f"{it} looks like one that a checkpoint returned without its class"
    if found.lacking:
        return (
            f"{looks}, but lacks {_names(found.lacking)}, which each state has: restore it from a "
            "checkpoint that has all of it."
        )
    makes = (
        f"{found.call} has the same moments"
        if found.state_class == words.state_class
        else _from_optax_state(words, found.call)[:-1]
    )
    if found.unknown:
        return (
            f"{looks}, with {_names(found.unknown)}, which this version of adamw_xla does not "
            f"know: go on with the version that saved it; or, if that may be lost, {makes}."
        )
    return f"{looks}: {makes}; or restore it with {words.new_state} for the template."


def _from_optax_state(words: Words, state: str) -> str:
    return (
        f"adamw_xla.optax.from_optax_state({state}, {words.new_state}) makes one of it, with its "
        "moments."
    )


def _names(names: tuple[Any, ...]) -> str:
    return " and ".join(map(repr, names))


def _held(value: Any, where: str) -> tuple[str, Any] | None:
    """The first state inside of a value, and where."""
    if is_state(value):
        return where, value
    inner = (_held(part, f"{where}[{key!r}]") for key, part in restored.parts(value))
    return next((x for x in inner if x is not None), None)


def not_a_config(value: Any, call: str) -> TypeError:
    """The error for something else in place of the config."""
    if isinstance(value, type) and value.__name__ == "AdamW":
        advice = "call it: AdamW(...)"
    elif isinstance(value, Mapping):
        advice = "AdamW(**config) makes one of options"
    elif isinstance(value, int | float) or callable(value) or getattr(value, "shape", None) == ():
        advice = "a learning rate goes into one: AdamW(learning_rate=...)"
    elif hasattr(value, "init") and hasattr(value, "update"):
        advice = "optax' transformations have an update of their own; here options are AdamW(...)"
    elif is_state(value):
        advice = "that is the state"
    else:
        advice = "the options are AdamW(...)"
    return TypeError(
        f"config must be an adamw_xla.AdamW, got {kind(value)}; {advice}. (The order is {call}.)"
    )


def of_other_options(
    words: Words, field: str, option: str, needed: bool, changed: Sequence[str]
) -> ValueError:
    """The error for a state with, or without, a field that the options do not go with.

    ``changed`` are all fields that are to come or to go with it.
    """
    names = [words.field(x) for x in changed]
    has, wants, does = ("lacks", "sets", "adds") if needed else ("has", "does not set", "drops")
    new = [f"{name}={words.new_state}.{name}" if needed else f"{name}=None" for name in names]
    return ValueError(
        f"{words.of_state(field)}: the state {has} it, but {words.options} {wants} {option}: the "
        f"state was built for {words.another}. Go on with what it was built for; or "
        f"{words.replace.format(', '.join(new))} {does} it, and keeps the moments."
    )


def in_another_format(words: Words, to_words: bool) -> ValueError:
    """The error for moments where the options ask for words, or for words where they do not."""
    has, wanted, way = "words", "moments", words.unpack
    if to_words:
        has, wanted, way = f"{words.field('m')} and {words.field('v')}", "word16", words.pack
    return ValueError(
        f'{words.state}: has {has}, and {words.options} sets state_format="{wanted}"; '
        f"{way} makes the one of the other, and keeps the moments."
    )


def in_other_containers(words: Words, field: str) -> ValueError:
    """The error for a state whose trees have the params' leaves, and not their containers."""
    return ValueError(
        f"{words.of_state(field)}: has the leaves of params in other containers, as a checkpoint "
        f"returns them that is not told theirs; {words.adapt} puts them into those of params."
    )
