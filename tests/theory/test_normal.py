"""The simulator's noise: the integers are xoshiro128++, the transform is Box-Muller, and the numbers pass for independent standard normals.

Bounds on statistics are stated as a number of standard deviations or a p-value; the seeds are fixed, so nothing here is flaky.
"""

from math import erfc, sqrt

import numpy as np
import pytest
from scipy.stats import chi2, kstest

pytest.importorskip("numba")

from stepwell.theory.normal import BLOCK, LANES, aligned, box_muller, fill_bits, fill_normal, new_stream

MANY = 2**22
BUFFER = 4096


def normals(count: int, *, entropy: int = 0, run: int = 0) -> np.ndarray:
    """Return `count` numbers of a stream, in the order in which they are generated, in float64."""
    stream = new_stream(np.random.SeedSequence(entropy, spawn_key=(run,)))
    bits, block = aligned(BUFFER, np.uint32), aligned(BUFFER, np.float32)
    out = np.empty((count // BUFFER, BUFFER))
    for row in out:
        fill_normal(stream, bits, block)
        row[:] = block
    return out.ravel()


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return normals(MANY)


def xoshiro128pp(state: list[int]) -> int:
    """One step of the generator as its authors define it, on Python integers."""
    mask = 0xFFFFFFFF

    def rotl(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    result = (rotl((state[0] + state[3]) & mask, 7) + state[0]) & mask
    t = (state[1] << 9) & mask
    state[2] ^= state[0]
    state[3] ^= state[1]
    state[1] ^= state[2]
    state[0] ^= state[3]
    state[2] ^= t
    state[3] = rotl(state[3], 11)
    return result


def test_every_lane_is_a_xoshiro_generator():
    stream = new_stream(np.random.SeedSequence(3))
    states = [[int(word) for word in stream[:, lane]] for lane in range(LANES)]
    bits = aligned(40 * LANES, np.uint32)
    fill_bits(stream, bits)
    expected = [[xoshiro128pp(state) for state in states] for _ in range(40)]
    assert np.array_equal(bits.reshape(40, LANES), expected)


def test_transform_is_box_muller_in_float64():
    stream = new_stream(np.random.SeedSequence(4))
    bits, normal = aligned(2**18, np.uint32), aligned(2**18, np.float32)
    fill_normal(stream, bits, normal)
    first, second = bits.reshape(2, -1)
    radius = np.sqrt(-2 * np.log(((first >> 1) + 0.5) / 2**31))
    angle = np.pi * (second.view(np.int32) / 2.0**32)
    half_plane = 1 - 2.0 * (second & 1)
    expected = np.concatenate([radius * np.sin(angle), radius * np.cos(angle)]) * np.tile(half_plane, 2)
    # The uniform is rounded to 2^-25 near one, which moves the radius by 2^-25 / radius; the rest is some ten roundings of 6e-8 of
    # numbers below 6.7, mostly far below.
    bound = np.tile(2.0**-25 / radius, 2) + 2e-6
    assert np.all(np.abs(normal - expected) < bound)
    assert np.median(np.abs(normal - expected)) < 2e-7


def test_extreme_integers_give_finite_numbers():
    bits = aligned(2 * BLOCK, np.uint32)
    normal = aligned(2 * BLOCK, np.float32)
    bits[:6] = [0, 1, 2, 2**32 - 1, 2**32 - 2, 2**31]
    bits[BLOCK : BLOCK + 6] = [2**31, 2**31 - 1, 2**32 - 1, 0, 1, 2**31 + 1]
    box_muller(bits, normal)
    assert np.all(np.isfinite(normal))
    # bits 0 and 1 give the smallest uniform, 2^-32, and angle -pi/2 (all of it on the sine)
    assert abs(abs(normal[0]) - sqrt(2 * 32 * np.log(2))) < 1e-5


@pytest.mark.parametrize("k", range(1, 7))
def test_moments(sample, k):
    def moment(n: int) -> float:
        return float(np.prod(np.arange(n - 1, 0, -2))) if n % 2 == 0 else 0.0  # (n - 1)!!

    z = (np.mean(sample**k) - moment(k)) / sqrt((moment(2 * k) - moment(k) ** 2) / len(sample))
    assert abs(z) < 4


def test_kolmogorov_smirnov(sample):
    assert kstest(sample, "norm").pvalue > 1e-3
    # and of block minima, which look at the tail only: P(min > m) = (1 - Phi(m))^64
    minima = sample.reshape(-1, 64).min(axis=1)
    assert kstest(minima, lambda m: 1 - (0.5 * np.vectorize(erfc)(m / sqrt(2))) ** 64).pvalue > 1e-3


def test_every_bit_is_fair():
    bits = aligned(2**20, np.uint32)
    fill_bits(new_stream(np.random.SeedSequence(5)), bits)
    ones = np.array([np.count_nonzero(bits & np.uint32(1 << k)) for k in range(32)])
    assert np.max(np.abs(ones - 2**19)) / sqrt(2**18) < 4.5  # 32 z-scores


@pytest.mark.parametrize("power", [1, 2])
def test_no_serial_correlation_at_any_lag(sample, power):
    # The autocorrelation at each of n/2 lags is N(0, 1/n) to a good approximation; the largest of 5e5 exceeds 6.5 with p = 4e-5.
    x = sample[: 2**20] ** power
    x = (x - x.mean()) / x.std()
    n = len(x)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(x)) ** 2)[1 : n // 2] / n
    assert np.max(np.abs(correlation)) * sqrt(n) < 6.5


def test_lanes_and_streams_are_uncorrelated(sample):
    lanes = sample[: 2**22].reshape(-1, LANES)
    streams = np.stack([normals(2**16, entropy=seed, run=run) for seed in range(4) for run in range(16)], axis=1)
    for columns in (lanes, streams):
        for power in (1, 2, 3):
            correlation = np.corrcoef(columns**power, rowvar=False)
            z = correlation[np.triu_indices(LANES, 1)] * sqrt(len(columns))
            assert np.max(np.abs(z)) < 5.5  # of 2,016 pairs; p = 8e-5 if normal
            assert abs(np.mean(z**2) - 1) < 5 * sqrt(2 / len(z))  # Var(z^2) = 2


@pytest.mark.parametrize("lag", [1, 2, LANES, BLOCK, BUFFER // 2, BUFFER])
def test_pairs_fill_the_plane_evenly(sample, lag):
    # Half a buffer is the distance of the two numbers of one Box-Muller pair.
    cells = 16
    edges = np.quantile(sample, np.linspace(0, 1, cells + 1)[1:-1])
    index = np.searchsorted(edges, sample)
    counts = np.bincount(index[:-lag] * cells + index[lag:], minlength=cells * cells)
    expected = np.outer(np.bincount(index[:-lag]), np.bincount(index[lag:])).ravel() / (len(sample) - lag)
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert 1e-3 < chi2.sf(statistic, (cells - 1) ** 2) < 1 - 1e-4


def test_tails_have_the_right_weight():
    # 2^26 numbers: 4,251 beyond 4, 456 beyond 4.5, 38 beyond 5 and 2.5 beyond 5.5 are expected.
    counts, draws = np.zeros(4), 0
    for run in range(16):
        x = np.abs(normals(MANY, entropy=9, run=run))
        counts += [np.count_nonzero(x > limit) for limit in (4, 4.5, 5, 5.5)]
        draws += len(x)
    expected = draws * np.array([erfc(limit / sqrt(2)) for limit in (4, 4.5, 5, 5.5)])
    assert np.all(np.abs(counts - expected) < 4 * np.sqrt(expected) + 1)
    assert counts[2] > 0
