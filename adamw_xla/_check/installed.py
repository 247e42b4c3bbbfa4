"""Whether a package that a drop-in is for can be imported, and what to install where it cannot."""

import importlib.util


def require(package: str, requirement: str, drop_in: str) -> None:
    """Refuses to import ``drop_in`` where ``package`` is not installed.

    Args:
      package: what it imports.
      requirement: what pip installs it from.
      drop_in: the module that was asked for.

    Raises:
      ModuleNotFoundError: it is not there.
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{drop_in} needs {package}, which is not installed here: pip install '{requirement}'.",
            name=package,
        )
