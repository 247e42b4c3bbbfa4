"""Takes a step with the package that is installed, and compares its CPU kernel with what is wanted.

As argument ``kernel`` (it runs), ``none`` (there is none, which is no warning) or ``refused``
(there is one, and a warning says why it does not run). Also what mypy reads of a user's code.
"""

import importlib.metadata
import importlib.util
import logging
import sys
from typing import assert_type

import jax
import jax.numpy as jnp

import adamw_xla as ax


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps it."""
        self.messages.append(f"{record.levelname}: {record.getMessage()}")


def main(wanted: str) -> None:
    """Fails if the package does not do what is wanted of it."""
    records = Records()
    logging.getLogger("adamw_xla").addHandler(records)
    # Before the CPU's client is there: a refused kernel must not come in its way.
    available = ax.native_available()
    assert_type(available, bool)
    assert available == (wanted == "kernel"), records.messages

    params = {"w": jnp.linspace(-1.0, 1.0, 100_000), "b": jnp.ones(3)}
    config = ax.AdamW(learning_rate=1e-3)
    state = ax.adamw_init(params, config)
    assert_type(state, ax.AdamWState)
    step = jax.jit(lambda p, s: ax.adamw_step(p, p, s, config))
    got, _ = step(params, state)
    want, _ = ax.reference.adamw_step(params, params, state, config)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.abs(x - y).max() <= 2**-23, "two roundings of numbers below 2"
    assert ("adamw_xla_update_cpu" in step.lower(params, state).as_text()) == available

    if not available:
        said = ""
        try:
            ax.adamw_step(params, params, state, config, implementation="native")
        except NotImplementedError as error:
            said = str(error)
        print(said)
        assert said, "a kernel that is not there was used"
        assert ("no C++ compiler" in said) == (wanted == "none")

    print(*records.messages, sep="\n", end="\n" * bool(records.messages))
    assert len(records.messages) == (wanted == "refused"), "one warning, where one is due"
    jaxlib = importlib.metadata.version("jaxlib")
    for message in records.messages:
        for part in ("WARNING", "libadamw_xla_cpu.so", f"this is jaxlib {jaxlib}", "pip install"):
            assert part in message, part
    spec = importlib.util.find_spec("adamw_xla")
    assert spec is not None
    print(f"{spec.origin} on jaxlib {jaxlib}: {wanted}, as it must be")


if __name__ == "__main__":
    main(sys.argv[1])
