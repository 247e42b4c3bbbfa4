"""Guards the hash that rounding takes its noise from, on the gradients and params of a training.

Each bound is passed by chance once in a million runs of ideal noise (and these runs are always the
same). With N numbers a statistic of mean 0 and standard deviation 1/sqrt(N) that is really ``d``
is found with probability .99 where d >= (bound + 2.33) / sqrt(N): ``SEEN`` below is that d, and
``test_what_is_said_to_be_seen_is_seen`` puts such deviations in.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import words
from words.training import train

STEPS = 600
CHANCE = 1e-6
NUM_BITS = 32
ROW = 256  # products so small that BLAS starts no threads


def bound(tests: int = 1) -> float:
    """What the largest of so many standard normal numbers passes once in a million."""
    return -NormalDist().inv_cdf(CHANCE / 2 / tests)


def seen(numbers: int, tests: int = 1) -> float:
    """The correlation, or shift in units of the standard deviation, that is found with .99."""
    return (bound(tests) + NormalDist().inv_cdf(0.99)) / numbers**0.5


def of_training() -> Any:
    """uint32[steps, elements]: the random words of the digits' training."""
    trained = train(STEPS)
    return words.random_bits(trained.grads, trained.params, numbers())


def numbers() -> Any:
    return np.arange(1, STEPS + 1, dtype=np.float32)[:, None]


def of_what_stands_still() -> Any:
    """Those of elements without any gradient or decay: only the update's number differs."""
    return words.random_bits(np.float32(0), train(STEPS).params[:1], numbers())


SOURCES = {"training": of_training, "standing still": of_what_stands_still}


@pytest.fixture(scope="module", params=SOURCES)
def r(request: pytest.FixtureRequest) -> Any:
    return SOURCES[request.param]()


def signs(r: Any) -> Any:
    """float32[..., 32]: the bits, as 1 and -1."""
    bits = np.unpackbits(np.ascontiguousarray(r)[..., None].view(np.uint8), axis=-1)
    return np.float32([1, -1])[bits]


def correlations(a: Any, b: Any) -> Any:
    """[32, 32] of standard normal numbers, for ideal noise: each bit of a with each of b."""
    total, rows = np.zeros((NUM_BITS, NUM_BITS)), a.size // ROW
    a, b = (x.reshape(-1)[: rows * ROW].reshape(rows, ROW) for x in (a, b))
    for i in range(0, rows, ROW):
        total += (signs(a[i : i + ROW]).mT @ signs(b[i : i + ROW])).sum(0)
    return total / a.size**0.5


def uniform(noise: Any, values: int) -> Any:
    """Mean 0 and variance 1."""
    return ((noise + 0.5) / values - 0.5) * 12**0.5


def of_codes(r: Any) -> tuple[Any, Any]:
    of_v, of_m = words.noises(r)
    return uniform(of_v, words.V.num_noises), uniform(of_m, words.U.num_noises)


def assert_small(z: Any, tests: int | None = None) -> None:
    z = np.atleast_1d(z)
    assert np.abs(z).max() < bound(tests or z.size)


# ---------------------------------------------------------------------------------- one step


def test_the_noise_is_right_on_average(r: Any) -> None:
    """SEEN: .6 % of the noise's standard deviation, .0017 of the width between two codes."""
    for noise in of_codes(r):
        assert_small(noise.mean() * noise.size**0.5, 2)
    assert seen(r.size, 2) < 0.0063


def test_the_noise_of_each_element_is_right_on_average(r: Any) -> None:
    """SEEN: means that are off by .02 of the noise's standard deviation, as a mean of all."""
    for noise in of_codes(r):
        elements = noise.shape[1]
        scatter = (noise.mean(0) ** 2).sum() * len(noise)
        assert_small((scatter - elements) / (2 * elements) ** 0.5, 2)


def test_bits_are_even_and_independent_of_each_other(r: Any) -> None:
    """So are then the noises of v and m, but for the bits that they share. SEEN: .0071."""
    tests = NUM_BITS * (NUM_BITS + 1) // 2
    assert_small(correlations(r, r)[~np.eye(NUM_BITS, dtype=bool)], tests)
    ones = np.stack([signs(x).mean(0) for x in r]).mean(0)
    assert_small(ones * r.size**0.5, tests)
    assert seen(r.size, tests) < 0.0072


def test_the_noises_of_v_and_m_are_as_good_as_independent(r: Any) -> None:
    """v's upper 10 bits are m's lower ones: a correlation of 3/2^13 * 4/3 = .0005. SEEN: .006."""
    v, m = of_codes(r)
    assert_small(((v * m).mean() - 4 / 2**13) * r.size**0.5)
    counts = np.histogram2d(v.ravel(), m.ravel(), bins=16)[0]
    chi_squared = ((counts - r.size / 256) ** 2).sum() / (r.size / 256)
    assert_small((chi_squared - 255) / (2 * 255) ** 0.5, 4)  # its tail is heavier than normal


# ---------------------------------------------------------------------------------- and the next


@pytest.mark.parametrize("lag", [1, 2, 16])
def test_steps_of_one_element_are_independent(r: Any, lag: int) -> None:
    """Bit by bit with .0072 SEEN; the noise itself with .006."""
    now, later = r[lag:], r[:-lag]
    assert_small(correlations(now, later))
    for a in of_codes(now):
        for b in of_codes(later):
            assert_small((a * b).mean() * now.size**0.5, 4)


def test_steps_without_gradient_are_independent() -> None:
    """A quarter of the training's: what decays where nothing else happens. SEEN: .013."""
    r, zero = of_training(), train(STEPS).grads == 0
    zero = zero[1:] & zero[:-1]
    assert zero.mean() > 0.25
    assert_small(correlations(r[1:][zero], r[:-1][zero]))
    assert seen(int(zero.sum()), NUM_BITS**2) < 0.014


# ---------------------------------------------------------------------------------- and a neighbour


def next_number(x: Any) -> Any:
    return np.nextafter(x, np.float32(np.inf))


NEIGHBOURS = {
    "param": lambda g, p, t: (g, next_number(p), t),
    "gradient": lambda g, p, t: (np.where(g == 0, g, next_number(g)), p, t),
    "sign of the param": lambda g, p, t: (g, -p, t),
    "sign of the gradient": lambda g, p, t: (-g, p, t),
    "twice the gradient": lambda g, p, t: (np.where(g == 0, np.float32(1), 2 * g), p, t),
}


@pytest.mark.parametrize("change", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_elements_that_are_nearly_equal_are_independent(change: Any) -> None:
    """Those that differ in one number by its last bit, sign or exponent. SEEN: .0072."""
    trained = train(STEPS)
    g, p, t = change(trained.grads, trained.params, numbers())
    r, other = of_training(), words.random_bits(g, p, t)
    differs = r != other
    assert differs.mean() > 0.6
    assert_small(correlations(r[differs], other[differs]))


def test_elements_next_to_each_other_are_independent(r: Any) -> None:
    """In memory, and in the order of their params, the closest of which are a few bits apart."""
    assert_small(correlations(r[:, 1:], r[:, :-1]))
    order = np.argsort(train(STEPS).params, axis=1)
    ranked = np.take_along_axis(r, order, 1)
    assert_small(correlations(ranked[:, 1:], ranked[:, :-1]))


# ---------------------------------------------------------------------------------- power


def test_what_is_said_to_be_seen_is_seen() -> None:
    """Ideal noise passes; with a deviation of the size that is stated it does not."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 600 * 2368), dtype=np.uint32)
    assert_small(correlations(a, b))
    copied = rng.random(a.size) < seen(a.size, NUM_BITS**2)
    mixed = np.where(copied, a & np.uint32(1 << 9) | b & ~np.uint32(1 << 9), b)
    with pytest.raises(AssertionError):
        assert_small(correlations(a, mixed))
    noise = of_codes(a)[0]
    assert_small(noise.mean() * noise.size**0.5)
    with pytest.raises(AssertionError):
        assert_small((noise + seen(noise.size)).mean() * noise.size**0.5)
