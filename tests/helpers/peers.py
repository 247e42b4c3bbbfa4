"""100 steps of one problem: what the tests beside other libraries share.

Agreement: for each leaf max|ours - theirs| <= 1e-6 max|theirs|.
The problem is chosen so that the peers' own roundings stay below that (where ours do
anyhow: ``test_oracle``):
- rates and betas are exact in float32: torch multiplies by the float32 factor 1 - lr*wd,
  and Keras computes 1 - beta_2**t from the rounded beta_2, 1e-5 off with 0.999;
- params start small and gradients keep their sign: a param of size 1 that moves 0.1 in
  100 steps loses 1e-6 to rounding in torch, since it is rounded twice a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STEPS = 100
SHAPES = [(), (5,), (4, 3), (2, 3, 2, 2)]
LR, WD = 2.0**-10, 2.0**-3
BETAS = B1, B2 = (0.875, 1 - 2.0**-10)
CLOSE = 1e-6

Arrays = list[np.ndarray[Any, Any]]


def problem(steps: int = STEPS) -> tuple[Arrays, list[Arrays]]:
    rng = np.random.default_rng(7)
    signs = [rng.choice([-1.0, 1.0], shape) for shape in SHAPES]
    params = [(-0.01 * sign).astype(np.float32) for sign in signs]
    grads = [
        [(sign * rng.uniform(0.1, 2.0, sign.shape)).astype(np.float32) for sign in signs]
        for _ in range(steps)
    ]
    return params, grads


def close(ours: Any, theirs: Any, bound: float = CLOSE) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = np.ravel(np.asarray(a, np.float64)), np.ravel(np.asarray(b, np.float64))
        off, size = np.max(np.abs(a - b)), np.max(np.abs(b))
        assert off <= bound * size, f"leaf {i}: {off / size:.2e} off, relative"
