"""``adamw_update_p``: one equation that updates a whole parameter tree."""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn, Primitive
import jax.numpy as jnp
import numpy as np

from . import platforms
from ._jax_private import (
    batch_spec,
    is_on_host,
    on_host,
    reduced_axes,
    register_dead_code_rule,
    spec_of,
    varying_like,
    with_shape_and_spec,
)
from .contract import (
    NUM_BESIDE_STATE,
    NUM_SLOTS,
    PARAM_DTYPES,
    UPDATE_NAME,
    Implementation,
    Sums,
    UpdateSpec,
    check_implementation,
    compute_dtype,
    dtype_names,
    join_leaves,
    num_operands,
    operand_name,
    split_operands,
)
from .rules import autodiff, batching, eager, partitioned, streamed

Leaves = Sequence[jax.Array]


class UpdateResult(NamedTuple):
    """What ``adamw_update`` returns: a list per kind, one entry per leaf, or None; and sums."""

    params: list[jax.Array]
    m: list[jax.Array] | None = None
    v: list[jax.Array] | None = None
    v_max: list[jax.Array] | None = None
    ema: list[jax.Array] | None = None
    words: list[jax.Array] | None = None
    remainder: list[jax.Array] | None = None
    sums: jax.Array | None = None


def adamw_update(
    hyper: jax.Array,
    params: Leaves,
    grads: Leaves,
    m: Leaves | None = None,
    v: Leaves | None = None,
    v_max: Leaves | None = None,
    ema: Leaves | None = None,
    leaf_scale: jax.Array | None = None,
    *,
    words: Leaves | None = None,
    remainder: Leaves | None = None,
    groups: Sequence[int] | None = None,
    ema_overwrite: bool = False,
    clip_value: bool = False,
    skip: bool = False,
    epsilon_root: bool = False,
    nesterov: bool = False,
    cautious: bool = False,
    stochastic: bool = False,
    delta: bool = False,
    sums: Sums | None = None,
    grad_sums: bool = False,
    offload: bool = False,
    implementation: Implementation | None = None,
) -> UpdateResult:
    """Updates all leaves as one operation. ``contract.py`` has the equations.

    Args:
      hyper: float32 [groups, NUM_SLOTS], float64 if a param is: the step's numbers.
      params: leaves of any shape, bfloat16, float16, float32 or float64.
      grads: one per param, of its shape; any of those dtypes.
      m: first moments, of the params' shapes; None where there are words.
      v: second moments, of the params' shapes; None where there are words.
      v_max: running maxima of ``v``; given, the update is AMSGrad's.
      ema: moving averages of the params; given, they are updated too.
      leaf_scale: [leaves], dtype of ``hyper``: one more factor on each gradient.
      words: m and v of each element in one bfloat16 (``formats/word.py``), of the params' shapes,
        for params that are not float64; the SALT slot is looked at.
      remainder: int16, of the params' shapes: with a bfloat16 param it is a float32 master
        (``formats/narrow.py``), and stays as it is beside another; not for float16.
      groups: for each leaf the row of ``hyper`` that it reads; None: row 0.
      ema_overwrite: look at the EMA_OVERWRITE slot.
      clip_value: look at the CLIP_VALUE slot.
      skip: look at the APPLY slot.
      epsilon_root: look at the EPSILON_ROOT slot.
      nesterov: look at the GRAD_STEP_SIZE slot.
      cautious: let an element decay only where that does not oppose its step.
      stochastic: round new bfloat16 params at random, and look at the SALT slot.
      delta: return the params' changes, unrounded, instead of the new params.
      sums: return sums of squares too, of the whole "tree" or of its "leaves": of new params and
        of what was added to them.
      grad_sums: among them, before these, those of the gradients as they came: of their squares,
        and of the squares of ``contract.small_unit`` times them.
      offload: the state (all but params and grads) lies in host memory and comes to the device
        a few leaves at a time; what replaces them lies in host memory, wherever they did.
      implementation: "xla", "native", or None to let the platform choose.

    Returns:
      The new leaves, each of the shape, dtype and sharding of what it replaces; with
      ``delta``, ``params`` holds the changes, in float32 (float64 for float64 params). ``sums``
      is [kinds] or [leaves, kinds], of the dtype of ``hyper``, with the columns of
      ``UpdateSpec.sum_kinds``.

    Raises:
      TypeError: an operand's shape, dtype or memory does not fit; the message names it.
      ValueError: an unknown ``implementation``, a count of leaves that differs, a group
        below 0, or operands that exclude or lack each other.
      NativeUnavailableError: at lowering, where "native" was asked for and cannot run.
      UpdateNotDifferentiableError: where a derivative is asked for.
    """
    check_implementation(implementation)
    state = {"m": m, "v": v, "words": words, "v_max": v_max, "ema": ema, "remainder": remainder}
    _check_formats(state, stochastic)
    columns = {"params": params, "grads": grads, **state}
    given = {kind: list(column) for kind, column in columns.items() if column is not None}
    n = len(given["params"])
    for kind, column in given.items():
        if len(column) != n:
            raise ValueError(f"{kind} has {len(column)} leaves, params has {n}")
    spec = UpdateSpec(
        groups=(0,) * n if groups is None else tuple(groups),
        amsgrad=v_max is not None,
        ema=ema is not None,
        ema_overwrite=ema_overwrite,
        clip_value=clip_value,
        skip=skip,
        epsilon_root=epsilon_root,
        nesterov=nesterov,
        cautious=cautious,
        words=words is not None,
        stochastic=stochastic,
        split_master=remainder is not None,
        delta=delta,
        offload=offload,
        leaf_scale=leaf_scale is not None,
        sums=sums,
        grad_sums=grad_sums,
        implementation=implementation,
    )
    if spec.num_leaves != n:
        raise ValueError(f"groups has {spec.num_leaves} entries, params has {n} leaves")
    if low := [i for i, group in enumerate(spec.groups) if group < 0]:
        raise ValueError(f"groups[{low[0]}] is {spec.groups[low[0]]}; must be a row of hyper")
    scalars = [hyper] if leaf_scale is None else [hyper, leaf_scale]
    leaves = [x for column in given.values() for x in column]
    results = adamw_update_p.bind(*scalars, *leaves, spec=spec) if n else _of_no_leaf(spec, hyper)
    end = n * len(spec.result_kinds)
    if offload:
        # JAX looks for transfers in jaxprs, and not in lowerings: where it finds none and no
        # argument lies in host memory, it takes all memory for the device's.
        results[n:end] = [jax.device_put(x, jax.memory.Space.Host) for x in results[n:end]]
    first, *rest = (list(results[i * n : (i + 1) * n]) for i in range(len(spec.result_kinds)))
    summed = results[end] if sums else None
    return UpdateResult(first, **dict(zip(spec.state_kinds, rest, strict=True)), sums=summed)


def _of_no_leaf(spec: UpdateSpec, hyper: jax.Array) -> list[jax.Array]:
    if spec.sums is None:
        return []
    shape = (0,) * (spec.sums == "leaves") + (len(spec.sum_kinds),)
    return [jnp.zeros(shape, hyper.dtype)]


def _check_formats(state: dict[str, Leaves | None], stochastic: bool) -> None:
    """Refuses operands that do not go together."""
    there = {kind for kind, column in state.items() if column is not None}
    if "words" in there:
        if both := sorted(there & {"m", "v", "v_max"}):
            raise ValueError(f"words stand in place of m and v; leave out {both[0]}")
    elif lacking := sorted({"m", "v"} - there):
        raise ValueError(f"{lacking[0]} is missing; without words, m and v are needed")
    if stochastic and "remainder" in there:
        raise ValueError("stochastic: nothing is rounded where a remainder holds the rest")


# ----------------------------------------------------------------- abstract evaluation


def _fail(spec: UpdateSpec, index: int, found: str, expected: str) -> TypeError:
    return TypeError(
        f"{UPDATE_NAME}: operand {operand_name(spec, index)} has {found}; expected {expected}."
    )


def _check_scalars(spec: UpdateSpec, avals: Sequence[Any], wide: bool) -> None:
    r = spec.batch_rank
    dtype = np.dtype(np.float64 if wide else np.float32)
    tails = [(max(spec.groups) + 1, NUM_SLOTS), (spec.num_leaves,)]
    for i, (aval, tail) in enumerate(zip(avals, tails[: spec.num_scalars], strict=True)):
        shape = aval.shape
        fits = len(shape) == r + len(tail) and shape[-1] == tail[-1] and shape[r] >= tail[0]
        if not fits:
            raise _fail(spec, i, f"shape {shape}", f"shape {tail} after {r} batch dimensions")
        if aval.dtype != dtype:
            raise _fail(spec, i, f"dtype {aval.dtype}", f"{dtype}, that of the arithmetic")
        _check_memory(spec, i, aval)


def _check_memory(spec: UpdateSpec, index: int, aval: Any) -> None:
    """What XLA computes with lies in device memory; what is offloaded is brought there."""
    is_state = index >= spec.num_scalars + spec.num_leaves * NUM_BESIDE_STATE
    if is_on_host(aval) and not (spec.offload and is_state):
        way = "jax.device_put(..., jax.memory.Space.Device)"
        way += ", or offload=True" if is_state else ""
        raise _fail(spec, index, "its values in host memory", f"device memory (see {way})")


def _check_leaf(spec: UpdateSpec, leaf: int, row: Sequence[Any]) -> None:
    """The leaf's operands must agree in shape and partition behind the batch."""
    r, own = spec.batch_rank, row[0]
    for kind, aval in enumerate(row):
        index = spec.num_scalars + kind * spec.num_leaves + leaf
        if problem := _wrong_dtype(spec, spec.operand_kinds[kind], aval.dtype):
            raise _fail(spec, index, f"dtype {aval.dtype}", problem)
        if axes := reduced_axes(aval):
            raise _fail(spec, index, f"a sum pending over {sorted(axes)}", "a value that is summed")
        if aval.shape[r:] != own.shape[r:] or len(aval.shape) != len(own.shape):
            raise _fail(spec, index, f"shape {aval.shape}", f"params[{leaf}]'s, {own.shape}")
        _check_memory(spec, index, aval)
        if spec_of(aval)[r:] != spec_of(own)[r:]:
            raise _fail(
                spec,
                index,
                f"sharding {spec_of(aval)[r:]}",
                f"params[{leaf}]'s, {spec_of(own)[r:]} (see jax.sharding.reshard)",
            )


def _wrong_dtype(spec: UpdateSpec, kind: str, dtype: Any) -> str | None:
    """What an operand of this kind is to have in place of this dtype; None if it may."""
    exact = {"words": np.dtype(jnp.bfloat16), "remainder": np.dtype(np.int16)}.get(kind)
    if exact is not None:
        return None if dtype == exact else str(exact)
    if dtype not in PARAM_DTYPES:
        return dtype_names()
    if kind == "params" and spec.words and dtype == np.float64:
        return "a dtype whose arithmetic is float32, as that of words is"
    if kind == "params" and spec.split_master and dtype == np.float16:
        return "a dtype that a remainder can complete: bfloat16"
    return None


def _leaf_results(spec: UpdateSpec, leaf: int, scalars: Sequence[Any], row: Any) -> list[Any]:
    """What leaf ``leaf`` becomes: its operands' types, with the joined batch in front."""
    _check_leaf(spec, leaf, row)
    r, members = spec.batch_rank, [*scalars, *row]
    try:
        batch = np.broadcast_shapes(*(aval.shape[:r] for aval in members)) if r else ()
    except ValueError:
        shapes = [aval.shape[:r] for aval in members]
        raise TypeError(f"{UPDATE_NAME}: leaf {leaf} has batches {shapes}") from None
    results = []
    for kind in spec.replaced_kinds:
        replaced = row[spec.operand_kinds.index(kind)]
        shape = (*batch, *replaced.shape[r:])
        partition = (*batch_spec(batch, members), *spec_of(replaced)[r:])
        aval = with_shape_and_spec(replaced, shape, partition)
        if kind == "grads":
            aval = aval.update(dtype=compute_dtype(row[0].dtype))
        if spec.offload and kind not in ("params", "grads"):
            aval = on_host(aval)
        results.append(varying_like(aval.update(weak_type=False), members))
    return results


def _abstract_eval(*avals: Any, spec: UpdateSpec) -> list[Any]:
    if len(avals) != num_operands(spec):
        raise TypeError(f"{UPDATE_NAME}: {len(avals)} operands; expected {num_operands(spec)}.")
    scalars, rows = avals[: spec.num_scalars], split_operands(spec, avals).leaves
    _check_scalars(spec, scalars, any(row[0].dtype == np.float64 for row in rows))
    sums = [_sums(spec, avals)] if spec.sums else []
    # Trees repeat few kinds of leaves, and JAX interns types: each kind is worked out once.
    known: dict[tuple[Any, ...], list[Any]] = {}
    for leaf, row in enumerate(rows):
        if row not in known:
            known[row] = _leaf_results(spec, leaf, scalars, row)
    return [*join_leaves([known[row] for row in rows]), *sums]


def _sums(spec: UpdateSpec, avals: Sequence[Any]) -> Any:
    """The type of the last result."""
    r = spec.batch_rank
    batch = np.broadcast_shapes(*(aval.shape[:r] for aval in avals)) if r else ()
    tail = (*[spec.num_leaves] * (spec.sums == "leaves"), len(spec.sum_kinds))
    partition = (*batch_spec(batch, avals), *(None for _ in tail))
    aval = with_shape_and_spec(avals[0], (*batch, *tail), partition, avals)
    return varying_like(aval.update(weak_type=False), avals)


# -------------------------------------------------------------------------- dead code


def _dead_code(used: list[bool], eqn: JaxprEqn) -> tuple[list[bool], JaxprEqn | None]:
    """Drops the sums where they are not used, and the leaves none of whose results is."""
    spec: UpdateSpec = eqn.params["spec"]
    n = spec.num_leaves
    if spec.sums:
        if used[-1]:
            return [True] * len(eqn.invars), eqn
        spec = dataclasses.replace(spec, sums=None, grad_sums=False)
        eqn, used = eqn.replace(outvars=eqn.outvars[:-1], params={"spec": spec}), used[:-1]
    keep = [any(used[leaf::n]) for leaf in range(n)]
    if not any(keep):
        return [False] * len(eqn.invars), None
    # leaf_scale has one entry per leaf, in order: dropping leaves would cut it up.
    if all(keep) or spec.leaf_scale:
        return [True] * len(eqn.invars), eqn
    keep_in = [True] * spec.num_scalars + keep * len(spec.operand_kinds)
    keep_out = keep * len(spec.result_kinds)
    smaller = eqn.replace(
        invars=[x for x, kept in zip(eqn.invars, keep_in, strict=True) if kept],
        outvars=[x for x, kept in zip(eqn.outvars, keep_out, strict=True) if kept],
        params={"spec": spec.of_leaves([leaf for leaf in range(n) if keep[leaf]])},
    )
    return keep_in, smaller


# -------------------------------------------------------------------------- registration

adamw_update_p = Primitive(UPDATE_NAME)
adamw_update_p.multiple_results = True
adamw_update_p.def_abstract_eval(_abstract_eval)
register_dead_code_rule(adamw_update_p, _dead_code)
autodiff.register(adamw_update_p)
batching.register(adamw_update_p)
eager.register(adamw_update_p)
partitioned.register(adamw_update_p)
streamed.register(adamw_update_p)
platforms.register(adamw_update_p)

__all__ = ["UpdateResult", "adamw_update", "adamw_update_p"]
