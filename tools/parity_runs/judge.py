"""Whether an arm loses more than a margin: a paired test of non-inferiority, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, Literal

import numpy as np
from scipy import stats

Array = np.ndarray[Any, Any]
Verdict = Literal["no worse", "unclear", "worse"]

CONFIDENCE = 0.95
"""Of each one-sided limit."""

TAIL = 0.1
"""The share of the steps, at the end, whose mean loss is judged."""

POINTS = 50
"""Of a curve: means over as many equal parts of the steps."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one arm's loss is beyond another's, in nats.

    Attributes:
      mean: of the differences between trainings with one seed, its params and its batches.
      low: one-sided 95 % limit from below.
      high: and from above.
      verdict: "no worse" where ``high`` is below the margin; "worse" where ``low`` is above it,
        or a loss is not finite.
    """

    mean: float
    low: float
    high: float
    verdict: Verdict


def tail_means(losses: Array) -> Array:
    """Over the last tenth of the steps, which are the last dimension."""
    return losses[..., -max(round(TAIL * losses.shape[-1]), 1) :].mean(-1, dtype=np.float64)


def points(losses: Array) -> Array:
    """Means over 50 parts of the steps, the last dimension; of fewer steps, the steps."""
    parts = np.array_split(losses, min(POINTS, losses.shape[-1]), -1)
    return np.stack([part.mean(-1, dtype=np.float64) for part in parts], -1)


def finding(losses: Array, of_control: Array, margin: float) -> Finding:
    """Judges one cell.

    Args:
      losses: [seeds], an arm's.
      of_control: [seeds], the control's of the same seeds.
      margin: what may be lost, in nats.
    """
    if not np.isfinite(losses).all():
        return Finding(math.inf, math.inf, math.inf, "worse")
    differences = losses - of_control
    mean, error = float(differences.mean()), float(stats.sem(differences))
    reach = float(stats.t.ppf(CONFIDENCE, len(differences) - 1)) * error
    low, high = mean - reach, mean + reach
    verdict: Verdict = "no worse" if high < margin else "worse" if low > margin else "unclear"
    return Finding(mean, low, high, verdict)


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """No worse where it is so in every cell, for which the cells' confidence is enough."""
    if "worse" in verdicts:
        return "worse"
    return "no worse" if set(verdicts) == {"no worse"} else "unclear"


def equal_step(gained: float, by_longer: float, stretch: float) -> float | None:
    """The factor on float32's rate at which it would gain as much; None where none can be told.

    Args:
      gained: the mean difference of an arm.
      by_longer: that of float32 with ``stretch`` times the rate.
      stretch: which is above 1.
    """
    return 1 + (stretch - 1) * gained / by_longer if by_longer < 0 else None
