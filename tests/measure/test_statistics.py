import math

import numpy as np
import pytest
from scipy import stats

from sqft_export.measure.statistics import bootstrap_ratio, mcnemar, wilson


@pytest.mark.parametrize(("right", "count"), [(0, 10), (7, 10), (240, 300), (300, 300)])
def test_wilson_is_scipys(right, count):
    theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


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
