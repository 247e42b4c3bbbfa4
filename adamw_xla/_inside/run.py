"""One step inside: flatten, make the step's scalars, update, put the trees together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamw_xla._check import options, trees
from adamw_xla._check.words import NATIVE, Words, misplaced
from adamw_xla._config import AdamW, check_config, needs_norm
from adamw_xla._info.norms import Measured, nothing, told
from adamw_xla._info.step_info import ReturnInfo, StepInfo, asked
from adamw_xla._inside import clipping, explicit
from adamw_xla._inside.across import Across, axes_of_leaves, not_over_layers
from adamw_xla._inside.clipping import SumOfSquares
from adamw_xla._inside.grouped import is_frozen, members
from adamw_xla._inside.hyper import Row, Scalar, as_scalar, increment, rates_of, rows_of
from adamw_xla._inside.offload import as_before, check_memory, check_places, to_device
from adamw_xla._inside.placed import Placement, columns_of
from adamw_xla._inside.update import (
    Backend,
    groups_of,
    hyper_dtype,
    scaled_like,
    update_leaves,
)
from adamw_xla._rules.groups import ScalarOrSchedule
from adamw_xla._rules.layered import Layered
from adamw_xla._rules.stacked import layers_of, one_layer
from adamw_xla._state import OF_ALL, AdamWState, check_kind, check_state
from adamw_xla_lowering import compute_dtype
from adamw_xla_lowering.contract import Sums


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """The leaves that have a gradient, and the way back to the whole trees."""

    treedef: Any
    live: tuple[int, ...]
    groups: tuple[int, ...]

    def take(self, flat: Sequence[Any]) -> list[jax.Array]:
        """Those of a flat list, as JAX's arrays: it has no float64 unless it is told to."""
        found = [flat[i] for i in self.live]
        return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in found]

    def put(self, flat: Sequence[Any], new: Sequence[Any]) -> Any:
        """The tree of a flat list with the new leaves in it."""
        whole = list(flat)
        for i, x in zip(self.live, new, strict=True):
            whole[i] = x
        return self.treedef.unflatten(whole)


class _Moving(NamedTuple):
    """What a call changes: leaves by kind, ``params`` and the state's, and what is of all.

    And what it measures, where that is asked for.
    """

    columns: dict[str, list[jax.Array]]
    counters: dict[str, jax.Array]
    measured: Measured | None = None


class Made(NamedTuple):
    """What a step makes: new params or their changes, the new state, and where asked for info."""

    params: Any
    state: AdamWState
    info: StepInfo | None = None


def run_step(
    params: Any,
    grads: Any,
    state: AdamWState,
    config: AdamW,
    *,
    learning_rate: ScalarOrSchedule | None,
    weight_decay: ScalarOrSchedule | None,
    backend: Backend,
    state_shardings: AdamWState | None = None,
    delta: bool = False,
    any_dtype_of_m: bool = False,
    words: Words = NATIVE,
    return_info: ReturnInfo = False,
) -> Made:
    """``adamw_step`` on any backend; ``reference`` brings its own.

    With ``delta``, the first result is what to add to the params, in the dtype of the
    arithmetic, and None where the gradient is. Where ``m`` may have any dtype, it keeps its own.
    With ``state_shardings`` the update is made where they say, and params stay where they are.
    Errors are in the ``words`` of the caller's API.
    """
    misplaced(words, params=params, grads=grads, state=state, config=config)
    check_config(config, words.call)
    check_kind(state, words)
    leaves, treedef = jax.tree.flatten(params)
    flat = trees.like_params("grads", params, treedef, grads)
    # What jax.grad(..., allow_int=True) has for integers and keys is no gradient either.
    flat = [None if getattr(g, "dtype", None) == jax.dtypes.float0 else g for g in flat]
    layers = layers_of(config.stacked, params)
    owners = members(config.groups, params, layers)
    frozen = {i for i, owner in enumerate(owners) if is_frozen(config.groups, owner)}
    unmoved = _unchanged(leaves, flat, frozen) if delta else leaves
    flat = [None if i in frozen else g for i, g in enumerate(flat)]
    live = tuple(i for i, g in enumerate(flat) if g is not None)
    columns = check_state(
        params, treedef, leaves, state, config, {*live}, any_dtype_of_m=any_dtype_of_m, words=words
    )
    trees.grads(params, leaves, flat, frozen)
    is_placed, offload = state_shardings is not None, backend.offload
    check_memory(params, leaves, flat, columns, live, state, config, offload, is_placed, words)
    spots: dict[str, list[Any]] = {}
    if state_shardings is None:
        explicit.check_state(params, leaves, columns, live, words)
        flat = explicit.grads_like_params(params, leaves, flat, live)
    else:
        spots = columns_of(state_shardings, params, treedef, config)
        if offload:
            check_places(params, spots)
    first = next(iter(columns.values()), [])
    held = [i for i, x in enumerate(first) if x is not None and i not in frozen]
    trained = _trained(params, treedef, leaves, held)
    seen = one_layer(trained, [layers[i] for i in held])
    mask = trees.mask(seen, len(held), config.weight_decay_mask, words.mask)
    overrides = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    for name, value in overrides.items():
        if value is not None:
            options.scalar_or_schedule(name, value)
    sums = asked("return_info", return_info)
    if not leaves and sums is None:
        return Made(params, state)

    over = axes_of_leaves(
        config.axis_names,
        needs_norm(config) or (sums and "return_info"),
        trained,
        [leaves[i] for i in held],
        [flat[i] for i in held],
        words,
    )
    if over is not None:
        names_of = dict(zip(held, over, strict=True))
        lying = tuple(names_of[i] for i in live)
        across = Across(backend.sum_of_squares, lying)
        backend = backend._replace(sum_of_squares=across, axes=lying)
    by_layer = config.clipnorm is not None or sums == "leaves"
    if by_layer and any(layers[i] for i in live):
        if over is not None:
            not_over_layers(config.axis_names, trained, [layers[i] for i in held], over)
        backend = _layered(backend, [layers[i] for i in live])
    decays = dict(zip(held, mask, strict=True))
    groups, kinds = groups_of([(owners[i], decays[i]) for i in live])
    chosen = _Leaves(treedef, live, groups)
    old = _Moving(
        {kind: chosen.take(column) for kind, column in {"params": leaves, **columns}.items()},
        {
            name: to_device(jnp.asarray(value, np.float32 if name == "norms" else np.int32))
            for name in OF_ALL
            if (value := getattr(state, name)) is not None
        },
    )
    dtype = hyper_dtype([p.dtype for p in old.columns["params"]])

    calls = _calls(old.counters, config)
    rate = rates_of(config, calls, dtype, overrides)
    rows = rows_of(config, kinds or ((len(config.groups), True),), calls, dtype, rate)
    slopes = chosen.take(flat)
    if spots:
        placement = Placement({kind: [at[i] for i in live] for kind, at in spots.items()})
        backend, slopes = placement.around(backend), placement.parts_of(slopes)
        if "accumulated" in spots:
            old.columns["accumulated"] = placement.fetched(old.columns["accumulated"])
    new = _Step(config, old, groups, backend, dtype, rows, delta, sums).made(slopes)
    if "accumulated" in spots:
        total = placement.kept("accumulated", new.columns["accumulated"])
        new.columns["accumulated"] = total

    put = chosen.put
    info = None
    if new.measured is not None:
        rates = [jnp.asarray(rate(name), dtype) for name in overrides]
        info = told(new.measured, rates, backend.layers, lambda xs: put([None] * len(leaves), xs))
    if not leaves:  # nothing is counted
        return Made(params, state, info)
    after = AdamWState(
        **{name: as_before(x, getattr(state, name)) for name, x in new.counters.items()},
        **{kind: put(column, new.columns[kind]) for kind, column in columns.items()},
    )
    return Made(put(unmoved, new.columns["params"]), after, info)


def _layered(backend: Backend, layers: Sequence[int | None]) -> Backend:
    """A backend that clips each layer of its leaves by itself, and has sums of each."""
    whole = backend.sum_of_squares

    def of_part(leaves: Sequence[int]) -> SumOfSquares:
        if not isinstance(whole, Across):
            return whole
        return dataclasses.replace(whole, axes=[whole.axes[i] for i in leaves])

    layered = Layered(layers, backend.update, whole, of_part)
    pairs = zip(backend.axes, layers, strict=False)
    return backend._replace(
        update=layered.update,
        sum_of_squares=layered.sum_of_squares,
        axes=[axes for axes, count in pairs for _ in range(count or 1)],
        layers=layers,
    )


def _unchanged(leaves: Sequence[Any], grads: Sequence[Any], frozen: set[int]) -> list[Any]:
    """The changes of leaves that are not updated: like their gradients, which may be None."""
    return [
        jnp.zeros_like(p, compute_dtype(p.dtype)) if i in frozen and g is not None else None
        for i, (p, g) in enumerate(zip(leaves, grads, strict=True))
    ]


def _trained(params: Any, treedef: Any, leaves: Sequence[Any], held: Sequence[int]) -> Any:
    """The params, with None where there is no state: what masks and specs are written for."""
    if len(held) == len(leaves):
        return params
    kept = {*held}
    return treedef.unflatten(p if i in kept else None for i, p in enumerate(leaves))


def _calls(counters: Mapping[str, jax.Array], config: AdamW) -> jax.Array:
    """How many calls came before this one, but for skipped ones: what schedules see."""
    if config.gradient_accumulation_steps is None:
        return counters["count"]
    return counters["count"] * config.gradient_accumulation_steps + counters["micro_step"]


@dataclasses.dataclass(frozen=True)
class _Step:
    config: AdamW
    old: _Moving
    groups: tuple[int, ...]
    backend: Backend
    dtype: Any
    rows: tuple[Row, ...]
    delta: bool
    asked: Sums | None

    def made(self, grads: list[jax.Array]) -> _Moving:
        """The call; with ``delta``, ``params`` holds their changes."""
        factor = self.config.loss_scale_factor
        unscale = 1.0 if factor is None else 1 / as_scalar(factor, self.dtype)
        if self.config.gradient_accumulation_steps is None:
            return self._updated(self.old, grads, unscale)
        return self._accumulated(grads, unscale)

    def _updated(
        self, moving: _Moving, grads: list[jax.Array], scale: Scalar, clear: bool = False
    ) -> _Moving:
        """A real update with ``scale`` times ``grads``; with ``clear`` they begin anew."""
        columns, counters, _ = moving
        new, apply, zeros, window, measured = update_leaves(
            self.config,
            # With delta, what moves are the changes.
            columns | {"params": self.old.columns["params"]} if self.delta else columns,
            grads,
            scale,
            count=counters["count"],
            window=counters.get("norms"),
            rows=self.rows,
            groups=self.groups,
            dtype=self.dtype,
            backend=self.backend,
            delta=self.delta,
            clear=clear,
            asked=self.asked,
        )
        made = {k: x for k, x in {**new._asdict(), "accumulated": zeros}.items() if x is not None}
        counted = {"count": increment(counters["count"], apply)}
        if zeros is not None:
            counted["micro_step"] = jnp.zeros_like(counters["micro_step"])
        if apply is not None:
            counted["skipped"] = increment(counters["skipped"], ~apply)
        if window is not None:
            counted["norms"] = window
        return _Moving(columns | made, counters | counted, measured)

    def _accumulated(self, grads: list[jax.Array], unscale: Scalar) -> _Moving:
        """Adds to the sum of gradients; every so many calls, updates with their mean.

        The calls between do no more than the addition: the update stands in a body of its own.
        """
        steps = self.config.gradient_accumulation_steps
        assert steps is not None
        columns, counters, _ = self.old
        old = columns["accumulated"]
        scaled = scaled_like(old, grads, unscale, self.dtype)
        good = jnp.asarray(True)
        if self.config.skip_nonfinite:
            total = [a + g for a, g in zip(old, scaled, strict=True)]
            squares = self.backend.sum_of_squares(jnp.ones((), self.dtype), total)
            good = clipping.is_good(self.config, squares)
            scaled = [jnp.where(good, g, 0) for g in scaled]
            counters = counters | {"skipped": increment(counters["skipped"], ~good)}
        done = counters["micro_step"] + good.astype(np.int32)
        # The mean is of what was summed: of more than ``steps`` where these have become fewer.
        # Else the factor is 1, and no bit changes.
        few = steps / jnp.maximum(done, steps).astype(self.dtype)
        total = [(a + g) * few.astype(a.dtype) for a, g in zip(old, scaled, strict=True)]
        layers = self.backend.layers or [None] * len(grads)
        between = _Moving(
            columns | {"params": self._unmoved(), "accumulated": total},
            counters | {"micro_step": done},
            self.asked and nothing(self.dtype, layers, self.asked),
        )

        def update(moving: _Moving) -> _Moving:
            return self._updated(moving, moving.columns["accumulated"], 1 / steps, clear=True)

        return self.backend.do_if(done >= steps, update, between)

    def _unmoved(self) -> list[jax.Array]:
        """What a call without an update returns in place of new params."""
        params = self.old.columns["params"]
        if not self.delta:
            return params
        return [jnp.zeros_like(p, compute_dtype(p.dtype)) for p in params]
