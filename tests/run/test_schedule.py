"""The predicted time of passes on several machines."""

import pytest

from sqft_export.run.schedule import TimedPass, ideal_seconds, predict_makespan

# One shared pass, then eight equal ones.
SHARED = {"base": TimedPass(2.0, ()), **{str(n): TimedPass(3.0, ("base",)) for n in range(8)}}


@pytest.mark.parametrize(("machines", "seconds"), [(1, 26), (2, 14), (4, 8), (8, 5), (100, 5)])
def test_what_depends_on_a_pass_waits_for_it(machines, seconds):
    assert predict_makespan(SHARED, machines) == seconds
    assert ideal_seconds(SHARED, machines) <= seconds


def test_the_longest_chain_goes_first():
    """Two machines: the chain of 1 + 5 alongside two passes of 3, not after them."""
    passes = {
        "short": TimedPass(3.0, ()),
        "other": TimedPass(3.0, ()),
        "first": TimedPass(1.0, ()),
        "second": TimedPass(5.0, ("first",)),
    }
    assert predict_makespan(passes, 2) == 6.0 == ideal_seconds(passes, 2)


def test_nothing_takes_no_time():
    assert predict_makespan({}, 4) == 0.0
