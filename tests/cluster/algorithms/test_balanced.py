"""Balanced assignment: sizes exactly, the cost against scipy's optimum, the bound that comes with it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from ktransfer.cluster.algorithms import balanced
from ktransfer.cluster.algorithms.balanced import assign_balanced
from ktransfer.cluster.engines.engine import Rows
from ktransfer.errors import UsageError


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(balanced, "SCORES", 3000)


def rows_of(data):
    return Rows(len(data), data.shape[1], lambda start, stop: data[start:stop])


def uneven(n, d, k, seed=0, spread=3.0):
    """Rows in five blobs of very different sizes, and k of the rows as centroids."""
    rng = np.random.default_rng(seed)
    means, shares = rng.normal(size=(5, d)) * spread, rng.dirichlet(np.ones(5))
    data = (means[rng.choice(5, n, p=shares)] + rng.normal(size=(n, d))).astype(np.float32)
    return data, data[rng.permutation(n)[:k]] + np.float32(0.01)


def optimum(data, centroids):
    """The least cost with sizes n // k and n // k + 1: k columns are for one row more, k - n % k dummies fill them."""
    n, k = len(data), len(centroids)
    least, more = divmod(n, k)
    costs = ((data[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)
    table = np.repeat(costs, least, axis=1)
    if more:
        dummies = np.hstack([np.full((k - more, least * k), 1e12), np.zeros((k - more, k))])
        table = np.vstack([np.hstack([table, costs]), dummies])
    return table[linear_sum_assignment(table)].sum()


def check(found, data, centroids):
    """Sizes, distances and cost are what they are said to be; the bound is below every such cost."""
    n, k = len(data), len(centroids)
    sizes = np.bincount(found.labels, minlength=k)
    assert sorted(sizes) == [n // k] * (k - n % k) + [n // k + 1] * (n % k)
    squares = ((data - centroids[found.labels]).astype(np.float64) ** 2).sum(axis=1)
    np.testing.assert_allclose(found.distances, squares, rtol=1e-5)
    assert found.cost == pytest.approx(squares.sum(), rel=1e-6)
    assert (found.labels.dtype, found.distances.dtype) == (np.int32, np.float32)
    assert found.bound <= found.cost


@pytest.mark.parametrize("spread", [0.0, 3.0, 40.0])
@pytest.mark.parametrize(("n", "k"), [(240, 8), (251, 12), (300, 40), (307, 60), (150, 150), (20, 33)])
def test_the_cost_is_the_least_possible(n, k, spread):
    data, centroids = uneven(max(n, k), 6, k, seed=n, spread=spread)
    data = data[:n]
    found = assign_balanced(rows_of(data), centroids)
    check(found, data, centroids)
    best = optimum(data, centroids)
    rounding = 1e-6 * ((data - centroids.mean(axis=0)) ** 2).sum()
    assert found.bound <= best + rounding
    assert found.cost <= best * (1 + (0 if k <= balanced.WIDTH else balanced.ENOUGH)) + rounding
    assert found.bound >= found.cost * (1 - balanced.ENOUGH) - rounding


def test_rounding_alone_is_exact_with_full_lists_and_far_origins():
    data, centroids = uneven(203, 4, 9)
    for offset in (0, 300):
        moved, around = data + np.float32(offset), centroids + np.float32(offset)
        found = assign_balanced(rows_of(moved), around, passes=0)
        check(found, moved, around)
        assert found.cost == pytest.approx(optimum(moved, around), rel=1e-5)


def test_short_lists_that_lead_nowhere_are_widened(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(balanced, "WIDTH", 2)
    widened = []
    plain = balanced._widen
    monkeypatch.setattr(balanced, "_widen", lambda *given: (widened.append(1), plain(*given)))
    # 90 rows and three centroids here, 30 rows and three centroids far away: 30 rows must cross.
    data = np.concatenate([rng.normal(size=(90, 3)), rng.normal(size=(30, 3)) + 100]).astype(np.float32)
    centroids = np.concatenate([data[:3], data[90:93]])
    found = assign_balanced(rows_of(data), centroids)
    check(found, data, centroids)
    assert widened
    assert found.cost <= optimum(data, centroids) * 1.01


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 50), k=st.integers(1, 20), dim=st.integers(1, 3))
def test_ties_duplicates_and_fewer_rows_than_clusters(seed, n, k, dim):
    rng = np.random.default_rng(seed)
    data = rng.integers(-1, 2, (n, dim)).astype(np.float32)
    centroids = rng.integers(-1, 2, (k, dim)).astype(np.float32)
    found = assign_balanced(rows_of(data), centroids, passes=5)
    check(found, data, centroids)
    assert found.cost <= optimum(data, centroids) * (1 + 2 * balanced.ENOUGH) + 1e-4


def test_ties_go_to_the_lowest():
    data, centroids = np.zeros((6, 2), np.float32), np.zeros((3, 2), np.float32)
    first = assign_balanced(rows_of(data), centroids)
    assert np.bincount(first.labels).tolist() == [2, 2, 2]
    assert first.labels[-2:].tolist() == [0, 0]  # the lowest rows leave the lowest cluster


def test_the_same_bytes_again():
    data, centroids = uneven(400, 5, 30)
    first, second = (assign_balanced(rows_of(data), centroids) for _ in range(2))
    assert first.labels.tobytes() == second.labels.tobytes()
    assert first.distances.tobytes() == second.distances.tobytes()
    assert (first.cost, first.bound) == (second.cost, second.bound)


def test_other_lengths_are_refused():
    with pytest.raises(UsageError, match=r"5 numbers.*of 4"):
        assign_balanced(rows_of(np.zeros((9, 5), np.float32)), np.zeros((3, 4), np.float32))
