"""Writes a checkpoint of this version for later ones to restore: ``python make_checkpoint.py``.

Run it once for each release, and never again for that one: what it wrote is what users have.
"""

from __future__ import annotations

from pathlib import Path
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import adamw_xla as ax

FOLDER = Path(__file__).parent
# Every field of the state is there, and an accumulation is not complete.
OPTIONS: dict[str, Any] = {
    "learning_rate": 0.125,
    "weight_decay": 0.25,
    "beta_2": 0.75,
    "amsgrad": True,
    "use_ema": True,
    "ema_momentum": 0.5,
    "gradient_accumulation_steps": 2,
    "skip_nonfinite": True,
}
CALLS = 8


def config() -> ax.AdamW:
    return ax.AdamW(**OPTIONS)


def leaves(seed: int) -> list[np.ndarray[Any, Any]]:
    """Multiples of an eighth, as float32; that of seed 4 has a NaN."""
    rng = np.random.default_rng(seed)
    found = [np.float32(rng.integers(-16, 16, s) / 8) for s in ((4, 3), (3,), ())]
    if seed == 4:
        found[1][0] = np.nan
    return found


def tree(seed: int) -> dict[str, Any]:
    """Params for seed 0, the gradients of a call for its number; bfloat16 where it is a bias."""
    w, b, scale = map(jnp.asarray, leaves(seed))
    return {"layers": (w, b.astype(jnp.bfloat16)), "scale": scale}


def trained() -> Any:
    params, state = tree(0), ax.adamw_init(tree(0), config())
    step = jax.jit(ax.adamw_step)
    for call in range(1, CALLS + 1):
        params, state = step(params, tree(call), state, config())
    return params, state


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/saved", trained())
        checkpointer.wait_until_finished()
        shutil.copytree(f"{folder}/saved", FOLDER / f"v{ax.__version__}")  # once: it must be new
