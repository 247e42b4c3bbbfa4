"""Guards the format of words: every pattern, and every number at which rounding changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from update_contract.implementations import IMPLEMENTATIONS
import words
from words import Scale, formats
from words.formats import Format

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.float32
LARGEST = 1.75 * 2.0**27
SCALES = {"v": words.V, "u": words.U}
# All noises of v and m at their ends and in between: each bit by itself, and some at random.
SWEEP = np.unique(
    np.concatenate(
        [
            [0, 2**32 - 1],
            2 ** np.arange(32),
            2**32 - 1 - 2 ** np.arange(32),
            np.random.default_rng(0).integers(0, 2**32, 20),
        ]
    )
).astype(np.uint32)


def patterns(x: Any) -> Any:
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[np.asarray(x).dtype.itemsize])


def edges(scale: Scale) -> Any:
    """float32: what can be stored, the middles of two, and both neighbours of each."""
    values = scale.values
    values = np.concatenate([values, (values[1:] + values[:-1]) / 2, [values[-1] * 1.1]])
    values = values.astype(F32)
    x = np.concatenate([values, np.nextafter(values, F32(0)), np.nextafter(values, F32(np.inf))])
    return np.unique(x)


def expected(scale: Scale, x: Any) -> Any:
    """What x is on average over all noises: x, as far as float32 holds its sum with the least."""
    least = F32(2.0**scale.min_exponent)
    kept = np.where(x < least, (x + least).astype(np.float64) - least, x.astype(np.float64))
    return np.minimum(kept, scale.values[-1])


@pytest.fixture(params=formats.NAMES)
def by(request: pytest.FixtureRequest) -> Iterator[Format]:
    """The oracle, and those that are to do as it does."""
    if request.param in IMPLEMENTATIONS:
        with IMPLEMENTATIONS[request.param].there():
            yield formats.format_of(request.param)
    else:
        yield formats.format_of(request.param)


def rounded(by: Format, name: str, x: Any, noise: Any) -> Any:
    """``x`` as v with m = 0, or as m at a v whose unit is 1 and that no noise moves; float64."""
    noise = np.asarray(noise, np.uint32)
    if name == "v":
        return by.decode(by.encode(0, x, noise))[1].astype(np.float64)
    return by.decode(by.encode(x, 1, noise << np.uint32(12)))[0].astype(np.float64)


# ------------------------------------------------------------------------------- every pattern


def test_legal_words_are_all_normal_numbers() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    exponent = every // 2**7 % 2**8
    normal = every[(exponent > 0) & (exponent < 255)]
    np.testing.assert_array_equal(np.sort(patterns(words.legal()), axis=None), normal)


def test_no_conversion_changes_a_word() -> None:
    legal = words.legal()

    @jax.jit
    def there_and_back(x: Any) -> Any:
        return jax.lax.optimization_barrier(x.astype(jnp.float32)).astype(jnp.bfloat16)

    for back in (legal.astype(F32).astype(BFLOAT16), there_and_back(legal), jnp.array(legal)):
        np.testing.assert_array_equal(patterns(back), patterns(legal))


def test_every_word_encodes_to_itself_with_any_noise(by: Format) -> None:
    legal = words.legal()
    for r in SWEEP:
        np.testing.assert_array_equal(patterns(by.kept(legal, r)), patterns(legal))


def test_every_word_means_what_the_oracle_says(by: Format) -> None:
    for found, want in zip(by.decode(words.legal()), words.decode(words.legal()), strict=True):
        np.testing.assert_array_equal(patterns(found), patterns(want))


def test_words_mean_what_the_format_says() -> None:
    """Some of the description's numbers, by hand."""
    legal = words.legal()
    m, v = words.decode(legal)
    assert (v[0] == 0).all()
    np.testing.assert_array_equal(v[:6, 0, 0] * 2.0**100, [0, 1, 2, 3, 4, 5])
    assert v[-1, 0, 0] == LARGEST
    one = 4 + 4 * 98  # the code of v = 1, whose unit is 1; of v = 2 too, and 2 at v = 4
    assert (v[[one, one + 4, one + 8], 0, 0] == [1, 2, 4]).all()
    assert (m[[one, one + 4, one + 8, one - 1], 0, 63] == [15, 15, 30, 7.5]).all()
    np.testing.assert_array_equal(m[one, 1, :6] * 2.0**6, [0, -1, -2, -3, -4, -5])
    assert m[0, 0, 63] == m[7, 0, 63] == m[11, 0, 63] == 15 * 2.0**-49
    assert m[12, 0, 63] == 15 * 2.0**-48
    assert patterns(legal)[0, 0, 0] == 0x0080
    assert patterns(legal)[-1, 1, -1] == 0xFF7F
    np.testing.assert_array_equal(np.signbit(m[:, 1]), np.ones((508, 64), bool))


# ------------------------------------------------------------------------------- every boundary


@pytest.mark.parametrize("name", SCALES)
def test_rounding_is_right_on_average_at_every_boundary(by: Format, name: str) -> None:
    """Exactly: below one noise it is the lower neighbour, from that on the upper."""
    scale = SCALES[name]
    x = edges(scale)
    lower, ups = scale.place(x)
    below = scale.values[lower]
    above = np.where(ups > 0, scale.values[np.minimum(lower + 1, scale.num_codes - 1)], below)
    count = scale.num_noises
    first = np.minimum(count - ups, count - 1)
    for noise, want in (
        (np.zeros(x.shape), below),
        (count - 1 - ups, below),
        (first, above),
        (np.full(x.shape, count - 1), above),
    ):
        np.testing.assert_array_equal(rounded(by, name, x, noise), want)
    mean = below + ups / count * (above - below)
    np.testing.assert_array_equal(mean, expected(scale, x))


@pytest.mark.parametrize("name", SCALES)
def test_rounding_is_right_on_average_by_counting(name: str) -> None:
    """Every noise, for some numbers: so the noise at which rounding changes is the only one."""
    scale = SCALES[name]
    noise = np.arange(scale.num_noises)
    values = scale.values
    step = scale.num_codes // 3
    points = np.concatenate([values[:6], values[6::step], values[6::step] * 1.07]).astype(F32)
    points = np.append(points, np.nextafter(points[1:4], F32(0)))
    for x in points:
        codes = scale.code(np.full(1, x), noise)
        mean = (
            values[codes[0]] * noise.size + (values[codes] - values[codes[0]]).sum()
        ) / noise.size
        np.testing.assert_array_equal(mean, expected(scale, x))
        assert np.diff(codes).min() >= 0


def test_what_a_word_cannot_hold_becomes_its_largest(by: Format) -> None:
    x = np.array([LARGEST, 2.0**28, 1e30, np.finfo(F32).max, np.inf, np.nan], F32)[:, None]
    m, v = by.decode(by.encode(0, x, SWEEP))
    assert (v == LARGEST).all()
    for sign in (1, -1):
        m, v = by.decode(by.encode(np.copysign(x, sign), 1, SWEEP))
        assert (m == sign * 15).all()
        assert (v == 1).all()


def test_zero_stays_zero_of_its_sign(by: Format) -> None:
    m = F32([0, -0.0])[:, None, None]
    v = F32([0, 1, 2.0**-100])[:, None]
    found_m, found_v = by.decode(by.encode(m, v, SWEEP))
    np.testing.assert_array_equal(found_v, np.broadcast_to(v, found_v.shape))
    assert (found_m == 0).all()
    np.testing.assert_array_equal(
        np.signbit(found_m), np.broadcast_to(np.signbit(m), found_m.shape)
    )


def test_zeros_stand_for_no_moments(by: Format) -> None:
    """As an array of words may begin with; they are words from the first update on."""
    zeros = np.array([0, -0.0], BFLOAT16)
    for x in by.decode(zeros):
        np.testing.assert_array_equal(x, [0, 0])
    np.testing.assert_array_equal(patterns(by.kept(zeros, 0)), [0x0080, 0x8080])


def test_whatever_is_finite_stays_so(by: Format) -> None:
    """Any patterns of float32 for m and v, and any noise: what the oracle says, to the bit."""
    rng = np.random.default_rng(1)
    m, v, r = rng.integers(0, 2**32, (3, 5 * formats.AT_ONCE), dtype=np.uint32)
    m, v = m.view(F32), (v & np.uint32(0x7FFFFFFF)).view(F32)
    there = np.isfinite(m) & np.isfinite(v)
    m, v, r = m[there], v[there], r[there]
    near = rng.random(m.size) < 0.8  # else hardly an m is within its unit's range
    wide = np.exp2(rng.uniform(-14, 6, m.size)) * np.sqrt(v.astype(np.float64))
    m = np.where(near, np.copysign(np.minimum(wide, 3e38).astype(F32), m), m)
    found = by.encode(m, v, r)
    assert np.isin(patterns(found), patterns(words.legal())).all()
    assert all(np.isfinite(x).all() for x in by.decode(found))
    np.testing.assert_array_equal(patterns(found), patterns(words.encode(m, v, r)))


def test_m_is_in_units_that_bound_it() -> None:
    """The unit is a power of two in (sqrt(v)/2, sqrt(v)], of v as it is stored."""
    code = np.arange(4, words.V.num_codes)
    ratio = np.sqrt(words.V.values[code]) / words.unit(code)
    assert ratio.min() == 1
    assert ratio.max() < 2
    assert (np.frexp(words.unit(code))[0] == 0.5).all()
    np.testing.assert_array_equal(words.unit(np.arange(4)), 2.0**-49)
