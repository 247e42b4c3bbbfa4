"""What the command lines share: mistakes that end in one line, and before the work begins."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import os
from pathlib import Path
import sys
import tempfile


@contextlib.contextmanager
def extra(tool: str, name: str) -> Iterator[None]:
    """Has an import of what is not installed name the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).partition(".")[0]
        print(f"{tool}: needs {missing}: pip install -e '.[{name}]'", file=sys.stderr)
        raise SystemExit(2) from None


def file_problem(path: Path) -> str | None:
    """Why a file cannot be written; None if it can. Leaves nothing behind."""
    try:
        if path.is_dir():
            return os.strerror(errno.EISDIR)
        if not path.exists():
            path = path.parent
            if not path.is_dir():
                return os.strerror(errno.ENOTDIR if path.exists() else errno.ENOENT)
        return None if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        return error.strerror


def folder_problem(path: Path) -> str | None:
    """Why no files can be written into a folder; None if they can. Makes the folder."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return None
    except OSError as error:
        return error.strerror
