"""Starts: chances against brute force, distinct rows of the data whatever its shape, quality against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import kmeans_plusplus

from ktransfer.cluster.algorithms import initialisation as module
from ktransfer.cluster.algorithms.initialisation import (
    STARTS,
    kmeans_parallel,
    kmeans_plus_plus,
    random_rows,
    start_of,
    take,
)
from ktransfer.cluster.engines import engine as engine_module
from ktransfer.cluster.engines.engine import Rows, faiss_engine
from ktransfer.errors import UsageError


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(engine_module, "BLOCK_NUMBERS", 700)
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 50)


def rows_of(data, weights=None):
    return Rows(len(data), data.shape[1], lambda start, stop: data[start:stop].astype(np.float32), weights)


def blobs(n=600, d=5, centres=20, seed=0, spread=0.1):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, d)) * 3
    return (means[rng.integers(0, centres, n)] + rng.normal(size=(n, d)) * spread).astype(np.float32)


def squares(data, centres):
    gaps = data[:, None].astype(np.float64) - np.asarray(centres, np.float64)[None]
    return (gaps**2).sum(axis=2)


def start(name, rows, k, seed):
    return start_of(name, rows, k, seed, 0, faiss_engine())


def test_rows_are_taken_from_wherever_they_are():
    data = blobs(500)
    data[3, 0] = -0.0
    for places in ([], [3], [0, 1, 2, 3, 250, 499], list(range(500)), list(range(100, 240)), [499]):
        taken = take(rows_of(data), np.array(places, np.int64))
        np.testing.assert_array_equal(taken, data[places])
        assert not np.signbit(taken[taken == 0]).any()


def test_random_rows_are_distinct_rows_of_the_data():
    data = np.repeat(blobs(n=20), 30, axis=0)
    data[0, 0], data[1, 0] = 0.0, -0.0
    data[1, 1:] = data[0, 1:]
    count = len(np.unique(data, axis=0))
    for name in STARTS:
        found = start(name, rows_of(data), count, 0)
        np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(data, axis=0))
        with pytest.raises(UsageError, match=f"only {count} distinct"):
            start(name, rows_of(data), count + 1, 0)


def test_random_rows_are_spread_evenly():
    data = np.arange(100, dtype=np.float32)[:, None]
    hits = np.bincount(np.concatenate([random_rows(rows_of(data), 10, seed)[:, 0] for seed in range(200)]).astype(int))
    # 2000 draws over 100 rows: mean 20, standard deviation about 4.2.
    assert hits.min() > 3
    assert hits.max() < 40


def test_unknown_start():
    with pytest.raises(UsageError, match=r"start 'kmeans': give random, kmeans\+\+"):
        start("kmeans", rows_of(blobs()), 3, 0)


def pair_chances(data, weights, candidates):
    """(n, n): the chance that k-means++ with k = 2 takes i, then j, by enumeration in float64."""
    gaps = squares(data, data)
    chances = np.zeros(gaps.shape)
    for i, near in enumerate(gaps):
        each = weights * near / (weights @ near)
        left = weights @ np.minimum(near[:, None], gaps)
        # j is taken if it was drawn and nothing with less left was; of several with the same, the one drawn first.
        for j in np.flatnonzero(each):
            better, equal = each[left < left[j] - 1e-9].sum(), each[abs(left - left[j]) <= 1e-9].sum()
            share = (1 - better) ** candidates - (1 - better - equal) ** candidates
            chances[i, j] = share * each[j] / equal
        chances[i] *= weights[i] / weights.sum()
    return chances


@pytest.mark.parametrize("offset", [0, 1e6])
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("weighed", [False, True])
def test_chances_of_pairs(candidates, weighed, offset):
    data = np.array([[0, 0], [4, 1], [6, 12], [32, 4], [37, -9]]) + offset
    weights = np.array([4, 1, 2, 0.5, 1]) if weighed else np.ones(5)
    rows = rows_of(data.astype(np.float32), weights if weighed else None)
    expected = pair_chances(data.astype(np.float32), weights, candidates)
    assert expected.sum() == pytest.approx(1)
    draws = 500
    seen = np.zeros((5, 5))
    for seed in range(draws):
        found = kmeans_plus_plus(rows, 2, seed, candidates=candidates)
        i, j = sorted(int((data.astype(np.float32) == row).all(axis=1).argmax()) for row in found)
        seen[i, j] += 1
    both = np.triu(expected + expected.T, 1)
    assert (seen[both == 0] == 0).all()
    possible = both > 0
    chi = ((seen - draws * both)[possible] ** 2 / (draws * both[possible])).sum()
    # 9 degrees of freedom: 33.7 is passed once in 10,000 times, rare pairs aside.
    assert chi < 33.7


@pytest.mark.parametrize("candidates", [1, None])
def test_each_choice_follows_what_is_left(candidates):
    # Three groups of copies, far apart: with k = 3 each group gives one, although one has 98 of 100 rows.
    data = np.repeat(np.array([[0, 0], [50, 0], [0, 900]], np.float32), [98, 1, 1], axis=0)
    for seed in range(30):
        found = kmeans_plus_plus(rows_of(data), 3, seed, 2000, candidates)
        assert sorted(found.tolist()) == [[0, 0], [0, 900], [50, 0]]


@pytest.mark.parametrize("candidates", [1, None])
def test_rounding_draws_no_copies(candidates):
    # 500 copies far from the mean of all: what a product in float32 leaves of their distance outweighs the other two.
    spot = np.random.default_rng(0).normal(size=8) * 1000
    data = np.concatenate([np.tile(spot, (500, 1)), np.tile(-spot, (500, 1)), [spot + 0.3, spot + 0.002]])
    data = data.astype(np.float32)
    for seed in range(10):
        found = kmeans_plus_plus(rows_of(data), 3, seed, 2000, candidates)
        gaps = squares(data[[500, 1000]], found).min(axis=1)
        assert gaps.max() < 1e-3


@pytest.mark.parametrize("name", ["kmeans++", "kmeans-parallel"])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_every_blob_gets_its_centroid(name, offset):
    data = blobs(spread=0.02) + np.float32(offset)
    hit = np.mean([squares(data, start(name, rows_of(data), 20, seed)).min(axis=1).max() < 1 for seed in range(10)])
    assert hit >= 0.8
    missed = [squares(data, start("random", rows_of(data), 20, seed)).min(axis=1).max() < 1 for seed in range(10)]
    assert np.mean(missed) < 0.2


@pytest.mark.parametrize("name", ["kmeans++", "kmeans-parallel"])
def test_as_good_as_scikit_learn(name):
    data = blobs(n=1000, spread=1.0)
    ours = [squares(data, start(name, rows_of(data), 40, seed)).min(axis=1).sum() for seed in range(12)]
    theirs = [squares(data, kmeans_plusplus(data, 40, random_state=seed)[0]).min(axis=1).sum() for seed in range(12)]
    assert np.mean(ours) < 1.05 * np.mean(theirs)


def test_weights_draw_in_parallel_too():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(400, 2)).astype(np.float32)
    weights = np.where(data[:, 0] > 0, 1000.0, 1.0)
    for find in (kmeans_plus_plus, kmeans_parallel):
        light = [(find(rows_of(data, weights), 10, seed)[:, 0] <= 0).mean() for seed in range(10)]
        even = [(find(rows_of(data), 10, seed)[:, 0] <= 0).mean() for seed in range(10)]
        assert np.mean(light) < 0.15
        assert 0.35 < np.mean(even) < 0.65


@pytest.mark.parametrize("name", STARTS)
def test_seed_decides_and_block_size_does_not(name, monkeypatch):
    data = blobs(spread=1.0)
    first = start(name, rows_of(data), 12, 3)
    assert first.tobytes() == start(name, rows_of(data), 12, 3).tobytes()
    assert first.tobytes() != start(name, rows_of(data), 12, 4).tobytes()
    monkeypatch.setattr(engine_module, "BLOCK_NUMBERS", 10**6)
    monkeypatch.setattr(module, "_DRAWS", 7)
    assert first.tobytes() == start(name, rows_of(data), 12, 3).tobytes()


def test_sample_is_random_and_said(capsys):
    data = np.arange(3000, dtype=np.float32)[:, None]
    found = kmeans_plus_plus(rows_of(data), 30, 0, sample=60)
    assert "k-means++: on 60 random rows of 3000" in capsys.readouterr().err
    assert len(np.unique(found)) == 30
    sampled = np.unique(np.concatenate([kmeans_plus_plus(rows_of(data), 60, 0, sample=60) for _ in range(2)]))
    assert len(sampled) == 60
    assert set(found[:, 0]) <= set(sampled)
    assert np.histogram(sampled, bins=5, range=(0, 3000))[0].min() > 3
    kmeans_plus_plus(rows_of(data), 10, 0)
    assert "on 640 random rows" in capsys.readouterr().err
    kmeans_plus_plus(rows_of(data), 10, 0, sample=9999)
    assert capsys.readouterr().err == ""


def test_default_sample_is_bounded_by_memory(monkeypatch, capsys):
    monkeypatch.setattr(module, "SAMPLE_NUMBERS", 500)
    kmeans_plus_plus(rows_of(blobs()), 20, 0)
    assert "on 100 random rows of 600" in capsys.readouterr().err
    kmeans_plus_plus(rows_of(blobs(n=600)), 150, 0)
    assert "on 150 random rows of 600" in capsys.readouterr().err


def test_a_sample_of_copies_is_completed_from_all_rows():
    data = np.zeros((500, 2), np.float32)
    data[::100, 0] = np.arange(1, 6)
    found = kmeans_plus_plus(rows_of(data), 6, 1, sample=6)
    assert sorted(found[:, 0].tolist()) == [0, 1, 2, 3, 4, 5]


def test_candidates_are_about_half_of_k_a_round():
    data = np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)
    inner, sizes = faiss_engine(), []

    def scan(rows, centroids, tick):
        sizes.append(len(centroids))
        return inner.scan(rows, centroids, tick)

    kmeans_parallel(rows_of(data), 100, 0, inner._replace(scan=scan))
    assert sizes[0] == 1
    assert len(sizes) == 6
    assert all(25 < size < 75 for size in sizes[1:])


SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "n": st.integers(1, 60),
        "d": st.integers(1, 6),
        "copies": st.integers(1, 4),
        "constant": st.booleans(),
        "kind": st.sampled_from(["normal", "grid", "far", "tight", "half", "tiny", "one"]),
        "share": st.floats(0, 1),
    }
)


@pytest.mark.parametrize("name", STARTS)
@settings(max_examples=30, deadline=None)
@given(shape=SHAPES)
def test_starts_are_distinct_rows_whatever_the_data(name, shape):
    rng = np.random.default_rng(shape["seed"])
    data = rng.normal(size=(shape["n"], shape["d"]))
    kind = shape["kind"]
    if kind == "grid":
        data = np.round(data)
    elif kind == "far":
        data = data + 1e6
    elif kind == "tight":  # two spots whose insides vanish beside their distance
        data = data * 1e-6 + rng.integers(0, 2, (shape["n"], 1)) * 1e4
    elif kind == "half":
        data = np.clip(data * 3e4, -65504, 65504).astype(np.float16)
    elif kind == "tiny":
        data = data * 1e-30
    elif kind == "one":
        data[:] = data[0]
    if shape["constant"]:
        data[:, 0] = 7.5
    data = np.repeat(data, shape["copies"], axis=0).astype(np.float32)
    distinct = np.unique(data, axis=0)
    k = 1 + round(shape["share"] * (len(distinct) - 1))
    found = start(name, rows_of(data), k, shape["seed"])
    assert (found.shape, found.dtype) == ((k, shape["d"]), np.float32)
    assert len(np.unique(found, axis=0)) == k
    assert len(np.unique(np.concatenate([distinct, found]), axis=0)) == len(distinct)
