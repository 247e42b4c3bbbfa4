"""Every private or unstable surface of JAX that this package touches, each with its reason.

``tests/lowering/test_surfaces.py`` has a test for each: it says what changed where one breaks.
Read with jax 0.10.0, 0.10.2, 0.11.2 and 0.12.0; where they differ, the function says so.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
import importlib.util
import sys
from types import ModuleType
from typing import Any, NoReturn

import jax
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe
from jaxlib import xla_client

HloSharding: Any = xla_client.HloSharding
"""What XLA tells a partitioner's callbacks, and is told by them; it has no public name."""


def reduced_axes(aval: Any) -> frozenset[Any]:
    """Mesh axes over which ``aval`` is a pending sum, or carries a reduced mark.

    ``ShapedArray.mat`` (``shard_map``) and ``PartitionSpec.unreduced`` (explicit
    mode) have no public reader.
    """
    spec = aval.sharding.spec
    mat = aval.mat
    return mat.unreduced | mat.reduced | spec.unreduced | spec.reduced


def varying_like(aval: Any, others: Iterable[Any]) -> Any:
    """``aval``, varying over each manual axis that one of ``others`` varies over.

    ``shard_map(check_vma=True)`` types every value with the axes that it varies
    over; a primitive outside of JAX has no public way to compute such a type.
    """
    others = list(others)
    varying = aval.mat.varying.union(*(other.mat.varying for other in others))
    if varying == aval.mat.varying:
        return aval
    if aval.sharding.mesh.empty:  # a constant's, which knows no axis
        mesh = next(other.sharding.mesh for other in others if other.mat.varying)
        aval = aval.update(sharding=aval.sharding.update(mesh=mesh))
    return aval.update(manual_axis_type=type(aval.mat)(varying=varying))


def varying_axes(x: Any) -> frozenset[Any]:
    """The manual axes that a value, or the type that ``jax.eval_shape`` has for it, varies over.

    Outside of ``shard_map(check_vma=True)`` there are none. Neither type has a public reader.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        kind = x.manual_axis_type
        return frozenset() if kind is None else kind.varying
    return jax.typeof(x).mat.varying


def manual_axes() -> dict[str, int]:
    """The mesh axes that ``shard_map`` makes manual here, in the mesh's order, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in sizes if kind == jax.sharding.AxisType.Manual}


def types_say_varying(axes: Mapping[str, int]) -> bool:
    """Whether types tell over which of these manual axes a value varies: ``check_vma=True``.

    The setting has no public reader; the index along an axis varies over it, if anything does.
    (Of axes of one device JAX can be told not to speak.)
    """
    told = [name for name, size in axes.items() if size > 1] or axes
    return all(a in varying_axes(jax.eval_shape(lambda a=a: jax.lax.axis_index(a))) for a in told)


def is_on_host(aval: Any) -> bool:
    """Whether a value of this type lies in the host's memory, and not the device's.

    ``ShapedArray.memory_space`` has no documented reader; ``jax.memory.Space`` is public. The
    type of a ``jax.ShapeDtypeStruct`` has it from a ``NamedSharding``, and from no other.
    """
    return aval.memory_space == jax.memory.Space.Host


def on_host(aval: Any) -> Any:
    """``aval`` in the host's memory."""
    return aval.update(memory_space=jax.memory.Space.Host)


def spec_of(aval: Any) -> tuple[Any, ...]:
    """The explicit-mode partition of ``aval``, one entry per dimension."""
    spec = tuple(aval.sharding.spec)
    return spec + (None,) * (len(aval.shape) - len(spec))


def with_shape_and_spec(
    aval: Any, shape: tuple[int, ...], spec: tuple[Any, ...], members: Iterable[Any] = ()
) -> Any:
    """``aval`` with another shape and explicit-mode partition, over the mesh of ``members``.

    ``ShapedArray.update`` keeps the memory space and the varying axes, which its
    public constructor would drop.
    """
    if shape == aval.shape:
        return aval
    meshes = (x.sharding.mesh for x in (aval, *members))
    mesh = next((mesh for mesh in meshes if not mesh.empty), aval.sharding.mesh)
    sharding = aval.sharding.update(mesh=mesh, spec=type(aval.sharding.spec)(*spec))
    return aval.update(shape=shape, sharding=sharding)


def batch_spec(batch: tuple[int, ...], members: Iterable[Any]) -> tuple[Any, ...]:
    """The partition of a batch that ``members`` share: who has the whole size says it."""
    avals = list(members)
    entries = (
        [spec_of(x)[dim] for x in avals if x.shape[dim] == size] for dim, size in enumerate(batch)
    )
    return tuple(next((e for e in found if e is not None), None) for found in entries)


def zero_tangent(x: Any) -> ad.Zero:
    """A symbolic zero for ``x``: the tangent's type has no public constructor."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def register_dead_code_rule(
    primitive: Primitive,
    rule: Callable[[list[bool], JaxprEqn], tuple[list[bool], JaxprEqn | None]],
) -> None:
    """Has JAX ask ``rule(used_results, eqn)`` which operands ``eqn`` still needs.

    Up to 0.11 JAX calls a rule just so; from 0.12 it passes in between which operands live.
    """

    def adapted(used: list[bool], *rest: Any) -> tuple[list[bool], JaxprEqn | None]:
        return rule(list(used), rest[-1])

    pe.dce_rules[primitive] = adapted


def platforms_of(ctx: Any) -> tuple[str, ...]:
    """The platforms that ``ctx`` lowers for; the context has no public reader for them."""
    return tuple(ctx.module_context.platforms)


def functions_of(ctx: Any) -> tuple[Any, Any]:
    """The module that ``ctx`` lowers into, and its symbol table: for functions of our own."""
    return ctx.module_context.module, ctx.module_context.symbol_table


def donated_arguments(ctx: Any) -> dict[Any, bool]:
    """The arguments of the program's ``main``, and whether its caller gives each of them away.

    ``lower_jaxpr_to_fun`` (``jax/_src/interpreters/mlir.py``; 0.10.2, 0.11.2 and 0.12.0) marks
    them before it lowers the body: with the result that takes an argument's place where JAX
    knows it, else for XLA to choose.
    """
    _, symbols = functions_of(ctx)
    if "main" not in symbols:
        return {}
    main = symbols["main"]
    arguments = main.regions[0].blocks[0].arguments
    if "arg_attrs" not in main.attributes:
        return dict.fromkeys(arguments, False)
    marks = main.attributes["arg_attrs"]
    donated = ["tf.aliasing_output" in x or "jax.buffer_donor" in x for x in marks]
    return dict(zip(arguments, donated, strict=True))


def is_exporting(ctx: Any) -> bool:
    """Whether ``ctx`` lowers for ``jax.export``, whose artifact outlives this process."""
    return ctx.module_context.lowering_parameters.for_export


def devices_hold_whole_operands(ctx: Any) -> bool:
    """Whether no partitioner will come between ``ctx``'s operands and a custom call.

    True for one device, and inside of ``shard_map`` where every axis of more than one
    device is manual. The lowering context has no public reader for either.
    """
    axes = ctx.module_context.axis_context
    if (manual := getattr(axes, "manual_axes", None)) is not None:
        return all(size == 1 or name in manual for name, size in axes.mesh.shape.items())
    return getattr(axes, "num_devices", None) == 1


def partitions_automatically(ctx: Any) -> bool:
    """Whether XLA partitions ``ctx``'s whole program over several devices, none by hand.

    The lowering context has no public reader for it.
    """
    axes = ctx.module_context.axis_context
    return not hasattr(axes, "manual_axes") and (getattr(axes, "num_devices", None) or 1) > 1


def register_partitioner(name: str, partition: Callable[..., Any]) -> None:
    """Has XLA call back where it partitions a custom call of this name, on every platform.

    ``jax.experimental.custom_partitioning`` does this for its own primitive and no other
    (``jax/_src/custom_partitioning.py``, at its end, in 0.10.2 and 0.12.0). The other two
    callbacks are GSPMD's, which is going away: under Shardy nobody calls them.
    """
    from jax._src import xla_bridge  # by those alone who have a kernel partitioned

    register = functools.partial(
        xla_client.register_custom_call_partitioner,
        name=name,
        prop_user_sharding=_gspmd_is_off,
        partition=partition,
        infer_sharding_from_operands=_gspmd_is_off,
        can_side_effecting_have_replicated_sharding=True,
    )
    register()
    xla_bridge.register_plugin_callbacks(register)


def _gspmd_is_off(*args: Any) -> NoReturn:
    raise NotImplementedError("GSPMD's propagation of shardings is not supported: use Shardy")


def uses_shardy() -> bool:
    """Which of XLA's two partitioners is on: a public setting, which type checkers do not know."""
    return bool(getattr(jax.config, "jax_use_shardy_partitioner"))  # noqa: B009


def name_dialect_module(namespace: str, module: ModuleType) -> None:
    """Tells MLIR's bindings where the Python module of a dialect is.

    They import ``jaxlib.mlir.dialects.NAMESPACE`` whenever an operation is made or met, and where
    there is none (the Triton dialect's is elsewhere) search every path again: six sevenths of
    the time that it took to lower GPT-2 small to the GPU's kernel.
    """
    name = f"jaxlib.mlir.dialects.{namespace}"
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = module
