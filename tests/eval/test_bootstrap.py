"""Bootstrap intervals against the formula for a mean."""

import numpy as np
import pytest

from ktransfer.eval.bootstrap import resamples, with_intervals


def test_resamples_are_functions_of_the_seed():
    first, again, other = (list(resamples(50, seed, 4)) for seed in (0, 0, 1))
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    assert not (first[0] == other[0]).all()
    assert not (first[0] == first[1]).all()
    assert min(one.min() for one in first) >= 0
    assert max(one.max() for one in first) == 49


def test_the_interval_of_a_mean():
    values = np.random.default_rng(0).random(800)
    found = with_intervals(lambda places: {"mean": float(values[places].mean())}, 800, 0)
    low, high = found["mean_interval"]
    error = 1.959964 * values.std(ddof=1) / 800**0.5
    assert found["mean"] == pytest.approx(values.mean())
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(error, rel=0.25)


def test_ends_stay_in_range_and_hold_the_value():
    values = np.array([-1.0] * 9 + [1.0])
    found = with_intervals(lambda places: {"mean": float(values[places].mean())}, 10, 0)
    assert found["mean_interval"][0] == found["mean"] == pytest.approx(-0.8)
