"""Where the CPU kernel is chosen, how it is called, and what happens without it."""

import logging
import os
import subprocess
import sys
import textwrap
from typing import Any

from cpu_oracle import hyper, leaves, require_native
import jax
import jax.export
import numpy as np
from places import python_path
import pytest

from adamw_xla_lowering import NativeUnavailableError, UpdateResult, adamw_update
from adamw_xla_lowering.contract import CPU_TARGET_NAME
from adamw_xla_lowering.cpu import kernel as cpu
from adamw_xla_lowering.cpu import library as native

TARGET = CPU_TARGET_NAME


@pytest.fixture
def with_native() -> None:
    require_native()


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "this is a test")


def lowered(tree: dict[str, Any], implementation: Any = None, donate: bool = False) -> Any:
    # JAX pairs donated operands with results of their type in order: keep the order.
    order = [kind for kind in UpdateResult._fields if kind in tree]

    def update(h: Any, grads: Any, rest: Any) -> Any:
        leaves = dict(zip(order, rest, strict=True))
        return adamw_update(h, grads=grads, **leaves, implementation=implementation)

    rest = [tree[kind] for kind in order]
    return jax.jit(update, donate_argnums=(2,) * donate).lower(hyper(), tree["grads"], rest)


def run_python(code: str, **environment: str) -> str:
    """Runs a program of its own, because XLA reads these settings only once."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path(), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --------------------------------------------------------------------------- the choice


@pytest.mark.usefixtures("with_native")
@pytest.mark.parametrize(
    ("implementation", "variable", "is_native"),
    [
        (None, "", True),
        (None, "native", True),
        (None, "xla", False),
        ("xla", "native", False),
        ("native", "xla", True),
    ],
)
def test_argument_then_environment_then_platform(
    implementation: Any, variable: str, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAMW_XLA_IMPLEMENTATION", variable)
    assert (TARGET in lowered(leaves([(3,)]), implementation).as_text()) == is_native


def test_an_unknown_implementation_in_the_environment_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ADAMW_XLA_IMPLEMENTATION", "fast")
    with pytest.raises(ValueError, match=r"ADAMW_XLA_IMPLEMENTATION .* 'fast'"):
        lowered(leaves([(3,)]))


@pytest.mark.usefixtures("without_native")
def test_without_the_kernel_none_is_stablehlo_and_native_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not native.native_available()
    with caplog.at_level(logging.DEBUG, "adamw_xla"):
        assert TARGET not in lowered(leaves([(3,)])).as_text()
    assert "1 leaves in StableHLO: this is a test" in caplog.text
    with pytest.raises(NativeUnavailableError, match="this is a test"):
        lowered(leaves([(3,)]), "native")


@pytest.mark.usefixtures("with_native")
def test_the_log_says_that_the_kernel_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "adamw_xla"):
        lowered(leaves([(3,)] * 20))
    assert "20 leaves in 2 calls of the CPU kernel" in caplog.text


@pytest.mark.usefixtures("with_native")
def test_export_gets_stablehlo() -> None:
    tree = leaves([(3,)])
    step = jax.jit(lambda h, t: adamw_update(h, **t))
    exported = jax.export.export(step)(hyper(), tree)
    assert TARGET not in exported.mlir_module()
    native_step = jax.jit(lambda h, t: adamw_update(h, **t, implementation="native"))
    with pytest.raises(ValueError, match=TARGET):
        jax.export.export(native_step)(hyper(), tree)


# ----------------------------------------------------------------------------- the calls


@pytest.mark.usefixtures("with_native")
def test_the_call_is_in_place_when_donated() -> None:
    tree = leaves([(1000,), (30, 30)], ema=True)
    compiled = lowered(tree, "native", donate=True).compile()
    replaced = sum(x.nbytes for kind, xs in tree.items() if kind != "grads" for x in xs)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == replaced
    assert memory.temp_size_in_bytes < 1000
    assert " copy(" not in compiled.as_text()


@pytest.mark.usefixtures("with_native")
@pytest.mark.parametrize(("batch", "slices"), [(16, 0), (128, 8)], ids=["whole", "element"])
def test_a_train_step_copies_no_weights(
    batch: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backpropagation reads the weights too; all of it must come before the call.

    The call waits for what read them last, or for an element of it where it is large.
    """
    monkeypatch.setattr(cpu, "MAX_BUCKET_BYTES", 1 << 20)
    size, layers = 256, 8
    weights = [jax.ShapeDtypeStruct((size, size), np.float32)] * layers

    def loss(weights: Any, x: Any) -> Any:
        for w in weights:
            x = jax.nn.relu(x @ w.T)
        return (x * x).mean()

    def step(p: Any, m: Any, v: Any, x: Any, implementation: Any) -> Any:
        grads = jax.grad(loss)(p, x)
        return adamw_update(hyper(), p, grads, m, v, implementation=implementation)[:3]

    def lowered_step(implementation: Any) -> Any:
        jitted = jax.jit(step, donate_argnums=(0, 1, 2), static_argnums=4)
        x = jax.ShapeDtypeStruct((batch, size), np.float32)
        return jitted.lower(weights, weights, weights, x, implementation)

    assert lowered_step("native").as_text().count("stablehlo.slice") == slices
    native, xla = (lowered_step(name).compile() for name in ("native", "xla"))
    assert f"f32[{size},{size}]{{1,0}} copy(" not in native.as_text()
    peaks = [c.memory_analysis().temp_size_in_bytes for c in (native, xla)]
    in_flight = 1 << 20  # a bucket's gradients
    assert peaks[0] <= peaks[1] + in_flight


@pytest.mark.usefixtures("with_native")
def test_buckets_are_bounded_and_named() -> None:
    text = lowered(leaves([(2,)] * 33), "native").compile().as_text()
    calls = [line for line in text.splitlines() if f'custom_call_target="{TARGET}"' in line]
    assert len(calls) == 3
    assert all('op_name="jit(update)/adamw_update"' in line for line in calls)
    large = lowered(leaves([(3 << 20,)] * 3), "native").as_text()  # 12 MB each
    assert large.count(f"@{TARGET}") == 3


# --------------------------------------------------------------------- threads, devices


@pytest.mark.usefixtures("with_native")
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    code = """
        import hashlib, jax
        from adamw_xla_lowering import adamw_update
        from cpu_oracle import hyper, leaves
        tree = leaves([(100_003,), (7,), (0,), (50_001, 3), (1,)], "bfloat16", ema=True)
        tree["m"] = [x * 1e-39 for x in tree["m"]]  # subnormal: flushed on every thread
        sums = dict(sums="leaves", grad_sums=True)
        step = jax.jit(lambda h, t: adamw_update(h, **t, **sums, implementation="native"))
        result = jax.device_get(step(hyper(), tree))
        data = b"".join(x.tobytes() for x in jax.tree.leaves(result))
        print(hashlib.sha256(data).hexdigest())
    """
    digests = {run_python(code, NPROC=threads) for threads in ("1", "2", "7")}
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("with_native")
@pytest.mark.parametrize("threads", ["1", "2", "4"])
def test_concurrent_steps_neither_deadlock_nor_mix(threads: str) -> None:
    code = """
        import concurrent.futures, jax, numpy as np
        from adamw_xla_lowering import adamw_update
        from cpu_oracle import hyper, leaves
        trees = [leaves([(60_000,)] * 40, seed=i) for i in range(8)]
        step = jax.jit(lambda h, t: adamw_update(h, **t, implementation="native"))
        want = [jax.device_get(step(hyper(), tree)) for tree in trees]

        def work(i):
            for _ in range(25):
                got = step(hyper(), trees[i])
                jax.tree.map(np.testing.assert_array_equal, got, want[i])

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        print("done")
    """
    assert run_python(code, NPROC=threads).strip() == "done"


@pytest.mark.usefixtures("with_native")
def test_a_partitioned_program_gathers_nothing() -> None:
    """Whole operands on each device: the kernel. Else StableHLO, and no collective."""
    code = """
        import re, jax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from adamw_xla_lowering import adamw_update
        from cpu_oracle import check as check_numbers, hyper, leaves

        COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute")
        tree, h = leaves([(16, 8), (8,)]), hyper()

        def step(h, t, implementation=None):
            return adamw_update(h, **t, implementation=implementation)

        def check(name, f, args, is_native):
            compiled = f.lower(*args).compile()
            text = compiled.as_text()
            assert ("adamw_xla_update_cpu" in text) == is_native, (name, text)
            assert not COLLECTIVE.search(text), (name, text)
            got = f(*args)
            check_numbers(got, h, tree)
            for new, old in zip(got.params, args[1]["params"]):
                assert new.sharding.is_equivalent_to(old.sharding, new.ndim), name

        for axis_type in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
            put = lambda spec: jax.device_put((h, tree), (NamedSharding(mesh, P()),
                                                          NamedSharding(mesh, spec)))
            with jax.set_mesh(mesh):
                check("sharded", jax.jit(step), put(P("x")), False)
                check("replicated", jax.jit(step), put(P()), False)
                manual = jax.shard_map(step, in_specs=(P(), P("x")), out_specs=P("x"))
                check("manual", jax.jit(manual), put(P("x")), True)

        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        args = jax.device_put((h, tree), (NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))))
        with jax.set_mesh(mesh):
            some = jax.shard_map(step, in_specs=(P(), P("x")), out_specs=P("x"), axis_names={"x"})
            check("some axes manual", jax.jit(some), args, False)
        mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[3:4])
        args = jax.device_put((h, tree), NamedSharding(mesh, P()))
        check("one device", jax.jit(step), args, True)
        print("done")
    """
    flags = "--xla_force_host_platform_device_count=8"
    assert run_python(code, XLA_FLAGS=flags).strip() == "done"
