"""Intervals by formula, against scipy's."""

import numpy as np
import pytest
from scipy import stats

from ktransfer.eval.intervals import Z95, mean_of, share_of, wilson


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 7), (250, 1000), (9, 9)])
def test_wilson(right, count):
    theirs = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson(right / count, count) == pytest.approx([theirs.low, theirs.high], abs=1e-6)
    hit = np.arange(count) < right
    found = share_of("top1", hit)
    assert found == {"top1": right / count, "top1_interval": wilson(right / count, count)}
    assert share_of("top1", hit.astype(np.int64)) == found


def test_a_mean_and_its_ends():
    each = np.random.default_rng(0).uniform(0.2, 0.6, 50)
    found = mean_of("at5", each)
    assert found["at5"] == each.mean()
    wanted = stats.norm.interval(0.95, each.mean(), stats.sem(each))
    assert found["at5_interval"] == pytest.approx(wanted, abs=1e-6)
    assert mean_of("at5", np.array([0.0, 1.0]))["at5_interval"] == [0.0, 1.0]
    assert pytest.approx(stats.norm.ppf(0.975), abs=1e-6) == Z95
