"""The state of ``adamw_xla.optax.adamw``, and the ways between it and others."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
from jax import export
import jax.numpy as jnp
import optax

from adamw_xla._check import calls
from adamw_xla._formats import in_words, unpack_state
from adamw_xla._info.step_info import StepInfo
from adamw_xla._rules import spikes
from adamw_xla._state import AdamWState
from adamw_xla.optax import _check, _wrappers


class AdamWOptState(NamedTuple):
    """``AdamWState`` under optax's names, which ``optax.tree_utils`` looks for.

    Attributes:
      count: int32 scalar, updates done.
      mu: first moments (float32, or ``mu_dtype``).
      nu: second moments (float32; float64 for float64 params).
      nu_max: with ``amsgrad``, the running maxima of ``nu``.
      ema: with ``use_ema``, the average of the params.
      accumulated: with ``gradient_accumulation_steps``, the sum of the gradients so far.
      micro_step: with it too, int32 scalar: calls since the last update.
      skipped: with ``skip_nonfinite`` or ``skip_spikes``, int32 scalar: calls that were skipped.
      words: with ``state_format="word16"``, the moments of each element in one bfloat16.
      remainder: with ``master="split"``, int16: the rest of each param's float32 master.
      norms: with ``skip_spikes``, float32 [window]: the norms of the last updates' gradients.
      info: with ``keep_info``, what the last update told of itself, an ``adamw_xla.StepInfo``; all
        is NaN before the first.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    mu: Any
    nu: Any
    nu_max: Any = None
    ema: Any = None
    accumulated: Any = None
    micro_step: jax.Array | None = None
    skipped: jax.Array | None = None
    words: Any = None
    remainder: Any = None
    norms: jax.Array | None = None
    info: StepInfo | None = None

    @classmethod
    def of(cls, state: AdamWState, info: StepInfo | None = None) -> AdamWOptState:
        """The same state under optax's names."""
        values = (getattr(state, field.name) for field in dataclasses.fields(state))
        return cls(*values)._replace(info=info)

    def __getitem__(self, index: Any) -> Any:
        """``state[0]`` is the state, since that of ``optax.adamw`` is a tuple with it in front.

        So what reads ``opt_state[0].mu`` or ``opt_state[0].count`` goes on.
        """
        return self if type(index) is int and index == 0 else tuple.__getitem__(self, index)

    def native(self) -> AdamWState:
        """The same state under its own names."""
        return AdamWState(*self[:-1])


# Lets `jax.export` write functions that take or return a state.
export.register_namedtuple_serialization(
    AdamWOptState, serialized_name="adamw_xla.optax.AdamWOptState"
)

State = TypeVar("State")


@calls.explained("from_optax_state", aliases={}, lacking=_check.LACKING)
def from_optax_state(opt_state: Any, like: State) -> State:
    """Goes on here with a training that ``optax.adamw`` began.

    The count and the moments come from ``opt_state``, in the dtypes of ``like``; moments become
    words, to the nearest, and words moments, where ``like`` has the other. So does what
    wrappers hold that both have, in the same order around AdamW: what ``optax.MultiSteps`` has
    accumulated, hyperparameters that ``optax.inject_hyperparams`` holds (also those that were
    set by hand), the traces of others in an ``optax.chain``. Wrappers that ``like`` alone has
    stay as in ``like``, and schedules, wherever they are, count on.

    From ``like`` come, always, the options of the transformations themselves: hyperparameters
    that are not injected on both sides, masks and schedules' functions. ``skipped`` and ``norms``
    are lost where ``like`` has no place for them; of norms for another window the newest stay.

    The new state shares arrays with ``opt_state`` (and ``like``). Donating it to a jitted step
    deletes them there too; copy it first, ``jax.tree.map(jnp.copy, state)``, to use both.

    Args:
      opt_state: a state of ``optax.adamw`` (or of ``adamw`` here), alone or inside of
        others: ``optax.chain``, ``optax.inject_hyperparams``, ``optax.MultiSteps``. The count
        may be a Python int, as some checkpoints have it.
      like: a new state for the same params, to be filled: ``adamw_init(params, config)``,
        or ``init(params)`` of a transformation with ``adamw`` in it.

    Returns:
      A state built as ``like``.

    Raises:
      TypeError: a state has no AdamW in it, or several.
      ValueError: the trees or shapes differ, or ``like`` has no place for what is there: for
        a field of AdamW's state, or for what a wrapper holds; or a moment that is to become words
        has a NaN: names the leaf (under ``jax.jit`` it cannot be seen).
    """
    return _moved(opt_state, like, "opt_state", (AdamWState, AdamWOptState))


@calls.explained("to_optax_state", aliases={}, lacking=_check.LACKING)
def to_optax_state(state: Any, like: State) -> State:
    """Goes on with ``optax.adamw`` with a training that began here.

    Args:
      state: an ``AdamWState``, or a state with an ``AdamWOptState`` in it.
      like: a new state for the same params, to be filled: ``init(params)`` of a
        transformation with ``optax.adamw`` in it.

    Returns:
      As ``from_optax_state``, which says what moves; it shares arrays with ``state``.

    Raises:
      TypeError, ValueError: as ``from_optax_state``.
    """
    return _moved(state, like, "state", (optax.ScaleByAdamState,))


def _moved(source: Any, like: Any, name: str, targets: tuple[type, ...]) -> Any:
    kinds = (AdamWState, AdamWOptState, optax.ScaleByAdamState)
    old, target = _the_only(source, kinds, name), _the_only(like, targets, "like")
    new = _filled(_as_native(target), old, name)
    filled: Any = new
    if isinstance(target, AdamWOptState):
        filled = AdamWOptState.of(new, target.info)
    elif isinstance(target, optax.ScaleByAdamState):
        filled = optax.ScaleByAdamState(new.count, new.m, new.v)
    return _wrappers.exchanged(name, source, like, old, target, filled, new.count)


def _the_only(tree: Any, kinds: tuple[type, ...], name: str) -> Any:
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds))
    found = [x for x in nodes if isinstance(x, kinds)]
    if len(found) != 1:
        _check.not_one_state(name, tree, kinds, len(found))
    return found[0]


def _as_native(state: Any) -> AdamWState:
    if isinstance(state, AdamWOptState):
        return state.native()
    return state if isinstance(state, AdamWState) else AdamWState(*state)  # the order is one


def _filled(like: AdamWState, source: Any, argument: str) -> AdamWState:
    """``like`` with what ``source`` has, in the format and the dtypes of ``like``."""
    to_words = like.words is not None
    if to_words == (_as_native(source).words is not None):
        return _filled_alike(like, source, argument)
    if to_words:
        new = _filled_alike(unpack_state(like), source, argument)
        return in_words(new, lambda field: f"{argument}.{_called(source, field)}")
    words = jax.eval_shape(lambda m: jax.tree.map(lambda x: x.astype(jnp.bfloat16), m), like.m)
    place = dataclasses.replace(like, m=None, v=None, v_max=None, words=words)
    new = unpack_state(_filled_alike(place, source, argument))
    m, v = (
        jax.tree.map(lambda x, place: x.astype(place.dtype), *pair)
        for pair in ((new.m, like.m), (new.v, like.v))
    )
    return dataclasses.replace(new, m=m, v=v, v_max=like.v_max)


def _filled_alike(like: AdamWState, source: Any, argument: str) -> AdamWState:
    """The same of two states in one format."""
    new, old = {}, _as_native(source)
    is_native = isinstance(source, AdamWState)
    for field in dataclasses.fields(like):
        place, value = getattr(like, field.name), getattr(old, field.name)
        if value is None or (place is None and field.name in _OF_ALL):
            continue
        if field.name == "norms":
            new["norms"] = spikes.resized(value, len(place))
            continue
        called = _called(source, field.name)
        replace = f"dataclasses.replace({argument}, " if is_native else f"{argument}._replace("
        leaves, treedef = _check.moved(
            f"{argument}.{called}", place, value, f"{replace}{called}=None)"
        )
        dtypes = [x.dtype for x in jax.tree.leaves(place)]
        new[field.name] = treedef.unflatten(map(jnp.asarray, leaves, dtypes))
    return dataclasses.replace(like, **new)


def _called(source: Any, field: str) -> str:
    return field if isinstance(source, AdamWState) else _check.WORDS.field(field)


_OF_ALL = ("micro_step", "skipped", "norms")
