import math

import numpy as np
import pytest
from scipy import stats

from sqft_export.measure.statistics import (
    bootstrap_ratio,
    mcnemar,
    mean_interval,
    perplexity_interval,
    wilson,
)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (7, 10), (240, 300), (300, 300), (512, 512)])
def test_wilson_is_scipys(right, count):
    theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
    low, high = wilson(right, count)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert low <= right / count <= high


def test_the_interval_of_one_set_is_wilsons():
    assert mean_interval([7], [10]) == pytest.approx(wilson(7, 10))


def test_the_interval_of_a_mean_over_sets_covers_it():
    """Sets of unlike size and difficulty: the mean of shares is no share of all items."""
    random = np.random.default_rng(3)
    counts, shares = np.array([20, 100, 1000]), np.array([0.9, 0.5, 0.2])
    drawn = random.binomial(counts, shares, (2000, 3))
    intervals = [mean_interval(right.tolist(), counts.tolist()) for right in drawn]
    covered = np.mean([low <= shares.mean() <= high for low, high in intervals])
    assert 0.93 < covered < 0.98
    pooled = [wilson(int(right.sum()), int(counts.sum())) for right in drawn]
    assert not any(low <= shares.mean() <= high for low, high in pooled)  # what it is not


def test_the_interval_of_a_perplexity_covers_it():
    """Items of unlike lengths, whose mean loss per token differs between items."""
    random = np.random.default_rng(5)
    tokens = random.integers(5, 60, (1000, 80))
    losses = tokens * random.gamma(4, 0.25, tokens.shape)  # one nat per token on average
    pairs = zip(losses, tokens, strict=True)
    intervals = [perplexity_interval((-one).tolist(), two.tolist()) for one, two in pairs]
    covered = np.mean([low <= math.e <= high for low, high in intervals])
    assert 0.92 < covered < 0.97
    assert perplexity_interval([-1.0], [3]) is None


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 5), (9, 1), (40, 20)])
def test_mcnemar_is_the_exact_binomial_test(better, worse):
    one = [True] * better + [False] * worse + [True, False]
    other = [False] * better + [True] * worse + [True, False]
    count = better + worse
    expected = stats.binomtest(better, count).pvalue if count else 1.0
    assert mcnemar(one, other) == pytest.approx(min(1.0, expected))


def test_the_interval_of_a_ratio_covers_it():
    random = np.random.default_rng(1)
    slow = random.normal(20, 1, 40).tolist()
    low, high = bootstrap_ratio(slow, [x / 2 for x in slow])
    assert low == pytest.approx(2) and high == pytest.approx(2)  # paired: noise cancels
    low, high = bootstrap_ratio(slow, random.normal(10, 1, 40).tolist())
    assert low < 2 < high and math.isclose((low + high) / 2, 2, rel_tol=0.1)
