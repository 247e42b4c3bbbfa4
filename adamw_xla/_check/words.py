"""What the APIs call the same things: a check speaks the words of the API that was called."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

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
      replace: a state with other fields, with a place for these.
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
    state_class="adamw_xla.AdamWState",
    state_is="an adamw_xla.AdamWState",
    new_state="adamw_init(params, config)",
    options="the config",
    another="another config",
    mask="weight_decay_mask",
    step="adamw_step returns (params, state)",
    replace="dataclasses.replace(state, {})",
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
        if type(value) is tuple and len(value) == 2 and is_state(value[1]):
            raise TypeError(
                f"{name}: got a tuple of 2, the second an {type(value[1]).__name__}: {words.step}; "
                f"unpack it, and pass the one of the two that {name} stands for."
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
    if _holds_state(value):
        return (
            f"adamw_xla.optax.from_optax_state({words.state}, {words.new_state}) makes one of it, "
            "with its moments."
        )
    if stars := stars_of(value, tuple(map(words.field, ("count", "m", "v")))):
        return (
            "It looks like one that a checkpoint returned without its class: "
            f"{words.state_class}({stars}{words.state}) has the same moments; or restore it with "
            f"{words.new_state} for the template."
        )
    return f"The first one is {words.new_state}, each other what the last step returned."


def stars_of(value: Any, fields: tuple[str, ...]) -> str:
    """How to pass on what has the fields of a state, and not its class: ``**``, ``*`` or not."""
    if isinstance(value, Mapping) and all(field in value for field in fields):
        return "**"
    is_sequence = type(value) in (tuple, list) and len(value) >= len(fields)
    return "*" if is_sequence and _is_count(value[0]) and not _is_count(value[1]) else ""


def _is_count(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return type(value) is int or (dtype == "int32" and value.shape == ())


def _holds_state(value: Any) -> bool:
    if is_state(value):
        return True
    return isinstance(value, tuple | list) and any(map(_holds_state, value))


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


def of_other_options(words: Words, field: str, option: str, needed: bool) -> ValueError:
    """The error for a state with, or without, a field that the options do not go with."""
    together = ("accumulated", "micro_step")
    names = [words.field(x) for x in (together if field in together else (field,))]
    has, wants, does = ("lacks", "sets", "adds") if needed else ("has", "does not set", "drops")
    new = [f"{name}={words.new_state}.{name}" if needed else f"{name}=None" for name in names]
    return ValueError(
        f"{words.of_state(field)}: the state {has} it, but {words.options} {wants} {option}: the "
        f"state was built for {words.another}. Go on with what it was built for; or "
        f"{words.replace.format(', '.join(new))} {does} it, and keeps the moments."
    )
