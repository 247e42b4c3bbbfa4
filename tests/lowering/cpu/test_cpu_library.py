"""Which compiled CPU kernels are used, and what is said of one that cannot be."""

from collections.abc import Callable
import concurrent.futures
import enum
import functools
import logging
from pathlib import Path
import re
import time
from typing import Any

from cpu_oracle import hyper, leaves, require_native
import jax
import pytest

from adamw_xla_lowering import NativeUnavailableError, adamw_update
from adamw_xla_lowering.contract import CPU_TARGET_NAME
from adamw_xla_lowering.cpu import library as native


def lowered(implementation: Any = None) -> str:
    step = jax.jit(lambda h, tree: adamw_update(h, **tree, implementation=implementation))
    return step.lower(hyper(), leaves([(3,)])).as_text()


def warnings_of(records: list[logging.LogRecord]) -> list[str]:
    return [x.getMessage() for x in records if x.levelno >= logging.WARNING]


def swap_slots(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    names = [slot.name for slot in native.Slot]
    monkeypatch.setattr(native, "Slot", enum.IntEnum("Slot", [*names[1:], names[0]], start=0))


def drop_options(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr(native.UpdateSpec, "options", lambda self: {"amsgrad": False})


def put_junk_in_its_place(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    junk = folder / "junk.so"
    junk.write_text("no library")
    monkeypatch.setattr(native, "_find", lambda: junk)


def run_an_older_jaxlib(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr(native, "_ffi_version", lambda: "0.2")
    monkeypatch.setattr(native, "jaxlib_version", "0.9.2")


def have_xla_refuse_it(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("INVALID_ARGUMENT: this is a test")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (put_junk_in_its_place, r"junk\.so cannot be loaded \(.+\): "),
        (swap_slots, r"\.so was built from another version, with \['GRAD_SCALE'.*\]"),
        (drop_options, r"\.so was built from another version, with .*\['amsgrad', 'ema'.*\]"),
        (
            run_an_older_jaxlib,
            r"\.so was built with jaxlib 0\.1\d\.[\d.]+, whose FFI is version 0\.[3-9], "
            r"and this is jaxlib 0\.9\.2, with 0\.2: upgrade jaxlib, or",
        ),
        (have_xla_refuse_it, r"\.so cannot be loaded \(INVALID_ARGUMENT: this is a test\)"),
    ],
    ids=["junk", "slots", "options", "older jaxlib", "XLA refuses"],
)
def test_a_kernel_that_cannot_be_used_is_one_warning(
    spoil: Callable[[pytest.MonkeyPatch, Path], None],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    require_native()
    look = native._look.__wrapped__

    def look_slowly() -> str | None:
        time.sleep(0.05)  # all threads are in it, if they can be
        return look()

    monkeypatch.setattr(native, "_look", functools.cache(look_slowly))
    spoil(monkeypatch, tmp_path)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: native.native_available(), range(4)))
    for _ in range(2):
        assert CPU_TARGET_NAME not in lowered()
    (warning,) = warnings_of(caplog.records)
    assert re.search(reason, warning)
    assert "as StableHLO" in warning
    assert "reinstall the package (pip install --force-reinstall" in warning
    with pytest.raises(NativeUnavailableError, match=reason):
        lowered("native")


def test_a_kernel_that_was_not_built_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_look", functools.cache(native._look.__wrapped__))
    monkeypatch.setattr(native, "_find", lambda: None)
    with caplog.at_level(logging.DEBUG, "adamw_xla"):
        assert CPU_TARGET_NAME not in lowered()
    assert "no C++ compiler" in caplog.text
    assert not warnings_of(caplog.records)


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [("0.3", "0.3", True), ("0.3", "0.12", True), ("0.12", "0.3", False), ("1.0", "0.3", False),
     ("0.3", "1.0", False)],
)  # fmt: skip
def test_a_kernel_runs_on_the_ffi_that_it_was_built_for_and_later(
    built: str, here: str, runs: bool
) -> None:
    assert native._runs_on(built, here) == runs


def test_the_ffi_header_of_jaxlib_says_its_version() -> None:
    """``library._ffi_version`` reads it there: XLA has no call that tells it."""
    found = native._ffi_version()
    assert found is not None, "jaxlib's c_api.h no longer defines XLA_FFI_API_MAJOR and _MINOR"
    assert native._runs_on("0.3", found), "of jaxlib 0.10.0, the oldest that is supported"
