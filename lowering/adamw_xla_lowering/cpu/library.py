"""Finds the compiled CPU kernel, checks that it is of this version, and registers it.

The kernel is optional: a package that was built without a C++ compiler has none, and
the update is then lowered to StableHLO on the CPU as well.
"""

import ctypes
import functools
from importlib import resources
from pathlib import Path

import jax

from ..contract import CPU_TARGET_NAME, Slot, UpdateSpec
from ..errors import logger

_PACKAGE = __package__.rpartition(".")[0]
_LIBRARY = "libadamw_xla_cpu.so"
_SYMBOL = "AdamWXlaUpdate"


def native_available() -> bool:
    """Whether the compiled CPU kernel is there, and ready to be called.

    The first call loads and registers it. The lowering makes that call; a program that
    only runs executables which another process compiled and serialized makes it itself.
    """
    return unavailable_reason() is None


@functools.cache
def unavailable_reason() -> str | None:
    """Why the compiled CPU kernel cannot be used; None if it can."""
    path = _find()
    if path is None:
        return f"this installation has no {_LIBRARY}: the build found no C++ compiler, or it failed"
    try:
        library = ctypes.CDLL(str(path))
        slots, options = (_text(library, f"AdamWXla{x}").split() for x in ("Slots", "Options"))
        if slots != [slot.name for slot in Slot] or options != list(UpdateSpec(()).options()):
            return f"{path} was built from another version: it has {slots} and {options}"
        handler = jax.ffi.pycapsule(getattr(library, _SYMBOL))
        jax.ffi.register_ffi_target(CPU_TARGET_NAME, handler, platform="cpu")
    except Exception as error:  # whatever is wrong with the library, StableHLO still works
        return f"{path} cannot be loaded: {error}"
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
