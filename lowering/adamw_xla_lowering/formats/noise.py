"""What rounding at random does to m and v in words, and to the step that they make.

Bound of m. With m = (1-b1) sum b1^k g_k and v = (1-b2) sum b2^k g_k^2, Cauchy and Schwarz say

    |m| <= B sqrt(v),  B = (1-b1) / sqrt((1-b2) (1 - b1^2/b2)):

7.3 at the default betas, which only gradients that grow by b2/b1 at each step reach; one gradient
after zeros makes 3.2. The unit s is a power of two with sqrt(v) < 2 s, *whichever* neighbour v
was rounded to: rounding down keeps the exponent, rounding up makes s no smaller. So |u| < 2 B, and
no code saturates while 2 B is at most 15, but for what earlier roundings have taken from v: in that
worst of sequences, 3/4 of it. b2 is that of words here (see below: memory of v), whose B is 7.6 at
the default betas. Betas of 0.9 and 0.9999 have B = 24, and one gradient after zeros
makes 10 sqrt(v), which saturates where the unit is small. A saturated m is 15 s, above 7.5 sqrt(v):
the next steps are shorter than they were to be, and of the right sign. v saturates at 2.3e8, for
gradients that stay above 15,000: steps are then too long, at most 9 times. Of gradients below 1e-15
v is mostly 0 while m is not: what bounds the step there is epsilon, from 1e-14 on.

Noise of v. In one step v is to move by d = (1-b2) (g^2 - v), far less than the width h between its
codes, and moves by h with probability |d|/h. This adds a variance of h |d| - d^2, and
a step takes 2 (1-b2) of the variance away. In the balance 1-b2 falls out:

    variance(v) / v^2 = h/v * E|g^2 - v|/v / 2 = 0.18 * 0.97 / 2 = 0.09

for Gaussian gradients; h/v is 1/4 to 1/8. So the relative deviation of v is 0.30 *for every* beta
near 1: the more slowly v moves, the more rarely it is rounded, and the longer it remembers that.
(Of this, 1 - b2 is the sampling of v itself, which float32 has too.) Gradients that are mostly 0
have up to twice the variance, those that are all alike less. It grows with v from the first step.

Noise of m. Its steps are wider than its codes, so each rounding adds h^2/6, and 1/(1-b1^2) of
them are remembered. With the linear range, which a small m is in, it is a deviation of 0.09 of
m's at b1 = 0.9, 0.13 at 0.95 and 0.5 at 0.99. It is as if gradients were noisier: its mean is 0,
and no step is longer for it.

Length of the step. v is right on average, and 1/sqrt(v) then is not: it is too large by about
3/8 of the variance. ``stationary`` has the exact distribution on codes, and says 3.3 %:

    beta_2                         0.9     0.95    0.98    0.99    0.999   0.9999
    deviation of v / v             0.38    0.32    0.30    0.30    0.30    0.30
      of it, not in float32        0.19    0.23    0.26    0.28    0.30    0.30
    a step is too long by          1.2 %   1.8 %   2.5 %   2.9 %   3.3 %   3.3 %
      after step 8, 32, 128        -       0.4, 1.3, 1.8   -       0.4, 1.4, 2.5 %

``step_factor`` takes that back, to 0.3 % in the first hundred steps and to 0.1 % afterwards.
Other gradients are corrected by the same number. What is left, in simulations at betas of 0.9 and
0.999: -1.5 % with three times more signal than noise, +0.4 to 1 % with heavy tails (Laplace,
Student with 3 degrees, log-normal scales), +2 % where nine gradients in ten are 0. Noise of m adds
0.1 to 0.3 % to the mean of a step's size.

Memory of v. Where gradients stay away, v is right on average and ever more uneven: each step adds
(1-b2) (0.18 - (1-b2)) to the variance of its logarithm. So log(v) falls faster than float32's, and
1/sqrt(v) grows faster still, as with a beta_2 whose distance from 1 is larger by

    beta_2                         0.8     0.9     0.95    0.98    0.99    0.999
    by log(v)                      1 %     4 %     6 %     8 %     9 %     9 %
    by E[1/sqrt(v)]                2 %     5 %     10 %    13 %    14 %    14 %

and that, not the noise itself, is what rows of embeddings that are seen now and then would lose by:
at 0.95 float32 with 10 % more loses 0.0043 nats of 1.55, where words lost 0.0034; steps that are
off by 10 % at random lose nothing. ``complement_in_words`` takes back the first line, to 1 %, and
they lose 0.0001. What it costs: v itself follows a change of scale as that of the smaller 1-b2
does, and m may reach 15.2 units at the default betas, in the worst of sequences alone, of which
1.5 % are cut. Noise that is spread evenly over the steps of an element, by multiples of the golden
ratio, was tried too. It has half to two thirds of the variance and is worse: what is stored
depends on the noise that comes next, and v is 3 % too small, where one gradient in 50 is not 0 by
9 %.
"""

import math
from typing import Any, NamedTuple

import numpy as np

LARGEST_M = 15.0
"""The largest multiple of v's unit that m can be."""

_REST, _BY_COMPLEMENT, _BY_STEP = 31.3, 495.0, 1400.0
"""Of ``step_factor``, fitted to ``stationary`` and to the chain's first steps."""

_FORGOTTEN = 0.09
"""What rounding adds to the rate at which log(v) falls, for beta_2 near 1."""


def bound(beta_1: float, beta_2: float) -> float:
    """The largest |m| / sqrt(v) that any gradients make; infinite where beta_1^2 >= beta_2.

    Words saturate only where twice of it is above ``LARGEST_M``, with the beta_2 that they have.
    """
    if beta_1 == 0:
        return 1 / math.sqrt(1 - beta_2)
    if beta_1 * beta_1 >= beta_2:
        return math.inf
    return (1 - beta_1) / math.sqrt((1 - beta_2) * (1 - beta_1 * beta_1 / beta_2))


def complement_in_words(complement_2: Any) -> Any:
    """1 - beta_2 of a v in words whose logarithm falls as float32's does with ``complement_2``.

    Fitted to the table above: the power lets it fade as a step comes to be as wide as v's codes.

    Args:
      complement_2: 1 - beta_2; a number, or a scalar array that may be traced.
    """
    return complement_2 * (1 - _FORGOTTEN * (1 - complement_2) ** 7)


def step_factor(complement_2: Any, t: Any) -> Any:
    """What to multiply a step with, so that it is as long as with a float32 v.

    Args:
      complement_2: 1 - beta_2; a number, or a scalar array that may be traced.
      t: the update's number, from 1; likewise, and floating.
    """
    return 1 - 1 / (_REST + _BY_COMPLEMENT * complement_2 + _BY_STEP / t)


def deviation_of_m(beta_1: float) -> float:
    """What rounding adds to m's standard deviation where gradients are noise, in units of it.

    The first term is of 3 bits of mantissa, the second of the linear range.
    """
    each = 0.0014 + 1.2e-5 * (1 + beta_1) / (1 - beta_1)
    return math.sqrt(each / (1 - beta_1 * beta_1))


class Stationary(NamedTuple):
    """What v tends to. ``deviation`` is its standard deviation, ``inverse_root`` E[1/sqrt(v)].

    Both are in units of v's mean: stored v's, and that of v before it is rounded, by which the step
    is divided.
    """

    deviation: float
    inverse_root: float


def stationary(beta_2: float, mantissa: int = 2, phases: int = 4) -> Stationary:
    """Of v in words, for Gaussian gradients of constant scale: a Markov chain on v's codes.

    Args:
      beta_2: from 0.8 on, below 1.
      mantissa: bits of it that v has; with 5 it is nearly float32.
      phases: variances between two powers of two over which it is averaged.
    """
    return Stationary(*np.mean([_chain(beta_2, mantissa, i / phases) for i in range(phases)], 0))


def _chain(beta_2: float, mantissa: int, phase: float) -> tuple[float, float]:
    k = np.arange(-10 << mantissa, 5 << mantissa)
    values = (1 + (k % (1 << mantissa)) / (1 << mantissa)) * np.exp2(k >> mantissa)
    n, mean = len(values), 2.0**phase
    z = (np.arange(4000) + 0.5) / 4000 * 8
    weights = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
    new = beta_2 * values[:, None] + (1 - beta_2) * mean * z * z
    below = np.clip(np.searchsorted(values, new, side="right") - 1, 0, n - 2)
    share = np.clip((new - values[below]) / (values[below + 1] - values[below]), 0, 1)
    moves = np.zeros((n, n))
    rows = np.broadcast_to(np.arange(n)[:, None], below.shape)
    np.add.at(moves, (rows, below), weights * (1 - share))
    np.add.at(moves, (rows, below + 1), weights * share)
    balance = moves.T - np.eye(n)
    balance[-1] = 1
    often = np.linalg.solve(balance, np.eye(n)[-1])
    deviation = math.sqrt(often @ (values / mean - 1) ** 2)
    return deviation, float(often @ (np.sqrt(mean / new) @ weights))
