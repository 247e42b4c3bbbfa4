"""Finds the compiled CPU kernel, checks that it can run here, and registers it.

The kernel is optional: a package that was built without a C++ compiler has none, and
the update is then lowered to StableHLO on the CPU as well. That takes no warning; a
kernel that is there and cannot be used does.
"""

import ctypes
import functools
from importlib import resources
from pathlib import Path
import re
import threading

import jax
from jaxlib.version import __version__ as jaxlib_version

from ..contract import CPU_TARGET_NAME, Slot, UpdateSpec
from ..errors import logger

_PACKAGE = __package__.rpartition(".")[0]
_LIBRARY = "libadamw_xla_cpu.so"
_SYMBOL = "AdamWXlaUpdate"

_REINSTALL = (
    "reinstall the package (pip install --force-reinstall --no-cache-dir --no-deps adamw-xla, "
    "or the path of its source in place of the name)"
)

_one_at_a_time = threading.Lock()


def native_available() -> bool:
    """Whether the compiled CPU kernel is there, and ready to be called.

    The first call loads and registers it. The lowering makes that call; a program that
    only runs executables which another process compiled and serialized makes it itself.
    A kernel that is there and cannot be used is logged as a warning, once in a process.
    """
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why the compiled CPU kernel cannot be used; None if it can."""
    with _one_at_a_time:  # threads may lower at once
        return _look()


@functools.cache
def _look() -> str | None:
    path = _find()
    if path is None:
        return f"this installation has no {_LIBRARY}: the build found no C++ compiler, or it failed"
    try:
        reason = _load(path)
    except Exception as error:  # whatever is wrong with the library, StableHLO still works
        reason = f"{path} cannot be loaded ({error}): {_REINSTALL}"
    if reason is not None:
        logger.warning("adamw_xla runs without its CPU kernel, as StableHLO: %s", reason)
    return reason


def attributes(spec: UpdateSpec) -> dict[str, bool]:
    """What kind of update it is, as the kernel's calls say it; csrc/slice.h repeats the order."""
    sums = {"tree_sums": spec.sums == "tree", "leaf_sums": spec.sums == "leaves"}
    return {**spec.options(), **sums, "grad_sums": spec.grad_sums}


def _load(path: Path) -> str | None:
    """Registers the library, or says why it does not fit this process."""
    library = ctypes.CDLL(str(path))
    slots, options = (_text(library, f"AdamWXla{x}").split() for x in ("Slots", "Options"))
    if slots != [slot.name for slot in Slot] or options != list(attributes(UpdateSpec(()))):
        what = f"{path} was built from another version, with {slots} and {options}"
        return f"{what}: {_REINSTALL}"
    # XLA compares too, but where the CPU's client is yet to be made it refuses only then, and
    # with the library the client: no program would run.
    built, here = _text(library, "AdamWXlaFfiVersion"), _ffi_version()
    if here is not None and not _runs_on(built, here):
        what = f"{path} was built with jaxlib {_text(library, 'AdamWXlaJaxlib')}"
        has = f"whose FFI is version {built}, and this is jaxlib {jaxlib_version}, with {here}"
        return f"{what}, {has}: upgrade jaxlib, or {_REINSTALL}"
    handler = jax.ffi.pycapsule(getattr(library, _SYMBOL))
    jax.ffi.register_ffi_target(CPU_TARGET_NAME, handler, platform="cpu")
    logger.debug("CPU kernel loaded from %s, for %s", path, _text(library, "AdamWXlaIsa"))
    return None


def _find() -> Path | None:
    # In an editable installation the library is not beside this file.
    path = resources.files(_PACKAGE).joinpath(_LIBRARY)
    return Path(str(path)) if path.is_file() else None


def _text(library: ctypes.CDLL, symbol: str) -> str:
    function = getattr(library, symbol)
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _ffi_version() -> str | None:
    """What this jaxlib speaks, ``"major.minor"``: as its own headers say. None: it has none."""
    try:
        text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^#define XLA_FFI_API_(MAJOR|MINOR) (\d+)$", text, re.MULTILINE))
    return f"{found['MAJOR']}.{found['MINOR']}" if len(found) == 2 else None


def _runs_on(built: str, here: str) -> bool:
    """XLA's own rule; an earlier minor version it supports for a year at least."""
    (major, minor), (own_major, own_minor) = (map(int, x.split(".")) for x in (built, here))
    return major == own_major and minor <= own_minor
