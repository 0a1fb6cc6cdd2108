"""Percentiles, intervals and tests for what is measured; numpy and the standard library alone."""

import math
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


def percentiles(samples: list[float], *wanted: float) -> list[float]:
    """The wanted percentiles, linear between samples."""
    return [float(p) for p in np.percentile(np.array(samples), wanted)]


def wilson(right: int, count: int) -> tuple[float, float]:
    """Interval of a share, ``right`` of ``count`` (Wilson 1927), at 95 %."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / count / 4)
    # Rounding may cross an end, or leave the share itself out of its interval there.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_interval(right: list[int], counts: list[int]) -> tuple[float, float]:
    """Interval of the mean of several sets' shares, at 95 %: Wilson's of each, put together as
    MOVER does (Zou and Donner 2008). Of one set it is Wilson's."""
    shares = [r / n for r, n in zip(right, counts, strict=True)]
    bounds = [wilson(r, n) for r, n in zip(right, counts, strict=True)]
    mean = sum(shares) / len(shares)
    below = math.hypot(*(share - low for share, (low, _) in zip(shares, bounds, strict=True)))
    above = math.hypot(*(high - share for share, (_, high) in zip(shares, bounds, strict=True)))
    return max(0.0, mean - below / len(shares)), min(1.0, mean + above / len(shares))


def mcnemar(one: list[bool], other: list[bool]) -> float:
    """Two-sided exact p-value that two models answer the same items equally well.

    Only items that one gets right and the other wrong count (McNemar 1947, exact binomial).
    """
    better = sum(a and not b for a, b in zip(one, other, strict=True))
    worse = sum(b and not a for a, b in zip(one, other, strict=True))
    count, smaller = better + worse, min(better, worse)
    if count == 0:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(smaller + 1)) / 2**count
    return min(1.0, 2 * tail)


def bootstrap_ratio(one: list[float], other: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of ``median(one) / median(other)``, rounds drawn in pairs.

    :param one, other: a measurement a round each, in the same rounds.
    """
    random = np.random.default_rng(seed)
    rounds = random.integers(0, len(one), (RESAMPLES, len(one)))
    medians = np.median(np.array(one)[rounds], axis=1) / np.median(np.array(other)[rounds], axis=1)
    low, high = np.percentile(medians, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    return float(low), float(high)
