"""Percentiles, confidence intervals and tests. Needs only numpy and the standard library."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


def percentiles(samples: list[float], *percents: float) -> list[float]:
    """Return the requested percentiles (0 to 100), interpolated linearly between samples."""
    return [float(p) for p in np.percentile(np.array(samples), percents)]


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of the share ``right / count`` (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / count / 4)
    # Rounding may move a bound past 0 or 1, or exclude the share itself.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_interval(right: Sequence[float], counts: list[int]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of several sets' shares.

    Combines the Wilson intervals of the sets by MOVER (Zou and Donner 2008). For a single set this
    is the Wilson interval.
    """
    shares = [r / n for r, n in zip(right, counts, strict=True)]
    bounds = [wilson(r, n) for r, n in zip(right, counts, strict=True)]
    mean = sum(shares) / len(shares)
    below = math.hypot(*(share - low for share, (low, _) in zip(shares, bounds, strict=True)))
    above = math.hypot(*(high - share for share, (_, high) in zip(shares, bounds, strict=True)))
    return max(0.0, mean - below / len(shares)), min(1.0, mean + above / len(shares))


def perplexity_interval(
    log_likelihoods: Sequence[float], tokens: Sequence[int]
) -> tuple[float, float] | None:
    """Return the 95 % interval of the perplexity over items; None for a single item.

    The mean log-likelihood per token is a ratio of two sums over items; its variance is that of the
    linearized ratio (Cochran 1977, 2.11). The interval is symmetric in the logarithm, but above 1.

    :param log_likelihoods: of each item, in nats, summed over its tokens.
    :param tokens: of each item.
    """
    items = len(tokens)
    if items < 2:
        return None
    loss, counts = -np.array(log_likelihoods), np.array(tokens)
    mean = loss.sum() / counts.sum()
    variance = items / (items - 1) * float(((loss - mean * counts) ** 2).sum())
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(variance) / counts.sum()
    return max(1.0, float(np.exp(mean - half))), float(np.exp(mean + half))


def mcnemar(one: list[bool], other: list[bool]) -> float:
    """Return the two-sided exact p-value that two models answer the same items equally well.

    Only items that exactly one of them answers right count (McNemar 1947, exact binomial).
    """
    better = sum(a and not b for a, b in zip(one, other, strict=True))
    worse = sum(b and not a for a, b in zip(one, other, strict=True))
    count, smaller = better + worse, min(better, worse)
    if count == 0:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(smaller + 1)) / 2**count
    return min(1.0, 2 * tail)


def bootstrap_ratio(one: list[float], other: list[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of ``median(one) / median(other)``.

    :param one, other: one measurement per round, from the same rounds. Rounds are resampled in
        pairs.
    """
    random = np.random.default_rng(seed)
    rounds = random.integers(0, len(one), (RESAMPLES, len(one)))
    medians = np.median(np.array(one)[rounds], axis=1) / np.median(np.array(other)[rounds], axis=1)
    low, high = np.percentile(medians, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    return float(low), float(high)
