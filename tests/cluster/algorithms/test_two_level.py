"""Two-level k-means: against flat k-means, with few distinct rows, killed between any two files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransfer.cluster.algorithms import two_level as module
from ktransfer.cluster.algorithms.lloyd import kmeans
from ktransfer.cluster.algorithms.two_level import distinct_rows, share_out, two_level
from ktransfer.cluster.engines import engine
from ktransfer.cluster.engines.engine import Rows
from ktransfer.errors import UsageError


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 700)
    monkeypatch.setattr(module, "GATHERED", 2500)


def rows_of(data):
    return Rows(len(data), data.shape[1], lambda start, stop: data[start:stop])


def blobs(n=900, d=8, centres=60, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, d)) * 2
    return (means[rng.integers(0, centres, n)] + rng.normal(size=(n, d))).astype(np.float32)


@pytest.mark.parametrize("refine", [0, 3])
def test_near_flat_k_means(refine):
    shares = []
    for seed in range(4):
        data = blobs(seed=seed)
        found = two_level(rows_of(data), 64, 20, refine=refine, points_total=1000)
        shares.append(found.final_objective / kmeans(rows_of(data), 64, 20).final_objective)
    # Measured on 12 seeds: 1.065 of the flat objective on average, 1.00 with three iterations more.
    assert np.mean(shares) < (1.1 if refine == 0 else 1.03)
    assert found.centroids.shape == (64, 8)
    gaps = ((data[:, None].astype(np.float64) - found.centroids[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found.labels, gaps.argmin(axis=1))
    np.testing.assert_array_equal(found.counts, np.bincount(found.labels, minlength=64))
    assert found.final_objective == pytest.approx(gaps.min(axis=1).sum(), rel=1e-6)
    steps = {len(getattr(found, name)) for name in module.CURVES}
    assert steps == {len(found.objective)}
    assert (found.points_used, found.points_total, found.seed) == (900, 1000, 0)
    assert "in 8 groups" in found.engine


def test_a_group_is_clustered_as_if_it_were_alone():
    data = blobs()
    coarse = kmeans(rows_of(data), 5, 10, seed=3)
    found = two_level(rows_of(data), 23, 10, seed=3)
    distinct = [int((coarse.labels == group).sum()) for group in range(5)]
    shares = share_out(23, coarse.counts.tolist(), distinct)
    alone = [kmeans(rows_of(data[coarse.labels == group]), shares[group], 10, seed=3) for group in range(5)]
    np.testing.assert_array_equal(found.centroids, np.concatenate([one.centroids for one in alone]))
    assert found.objective[: len(coarse.objective)] == coarse.objective
    assert found.objective[len(coarse.objective)] == pytest.approx(sum(one.objective[0] for one in alone))


@pytest.mark.parametrize("gathered", [1, 2500, 10**9])
def test_how_much_is_in_memory_does_not_matter(monkeypatch, gathered):
    data = blobs(n=300)
    expected = two_level(rows_of(data), 30, 5)
    monkeypatch.setattr(module, "GATHERED", gathered)
    np.testing.assert_array_equal(two_level(rows_of(data), 30, 5).centroids, expected.centroids)


def test_groups_with_fewer_distinct_rows_than_their_share():
    rng = np.random.default_rng(1)
    data = np.concatenate([np.repeat(rng.normal(size=(3, 4)), 200, axis=0), rng.normal(size=(60, 4)) + 30])
    data = rng.permutation(data).astype(np.float32)
    for k in (1, 2, 40, 63):
        found = two_level(rows_of(data), k, 10)
        assert found.centroids.shape == (k, 4)
        assert found.counts.min() > 0
    assert found.final_objective == 0
    with pytest.raises(UsageError, match="only 63 distinct"):
        two_level(rows_of(data), 64, 10)


@settings(max_examples=30)
@given(st.data())
def test_shares_sum_to_k_within_their_limits(data):
    sizes = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=8))
    limits = [data.draw(st.integers(min(size, 1), size)) for size in sizes]
    low = sum(limit > 0 for limit in limits)
    k = data.draw(st.integers(low, sum(limits)))
    shares = share_out(k, sizes, limits)
    assert sum(shares) == k
    assert all(min(1, limit) <= share <= limit for share, limit in zip(shares, limits, strict=True))
    with pytest.raises(UsageError, match="distinct"):
        share_out(sum(limits) + 1, sizes, limits)


def test_shares_follow_sizes():
    assert share_out(10, [600, 300, 100], [600, 300, 100]) == [6, 3, 1]
    assert share_out(10, [600, 300, 100], [2, 300, 100]) == [2, 6, 2]
    assert share_out(4, [900, 1, 0], [900, 1, 0]) == [3, 1, 0]


def test_distinct_rows_of_each_group():
    data = np.repeat(blobs(n=40), 3, axis=0)
    data[0, 0], data[1, 0] = 0.0, -0.0
    data[2, 0] = 0.0
    labels = np.arange(120, dtype=np.int32) // 60
    assert distinct_rows(rows_of(data), labels, 3).tolist() == [20, 20, 0]


def test_killed_after_any_file_and_resumed_gives_the_same_bytes(tmp_path, monkeypatch):
    data = blobs(n=300)
    expected = two_level(rows_of(data), 20, 4, refine=2, work=tmp_path / "whole")
    save, saved = module.save_state, []

    class Killed(BaseException):
        pass

    def once(path, state):
        save(path, state)
        saved.append(path)
        raise Killed

    monkeypatch.setattr(module, "save_state", once)
    found = None
    while found is None:
        try:
            found = two_level(rows_of(data), 20, 4, refine=2, work=tmp_path / "cut")
        except Killed:
            assert len(saved) < 20
    assert len(saved) == 4 + 4 + 2  # coarse iterations, groups, refining iterations: nothing was done twice
    for name in ("centroids", "counts", "labels"):
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes()
    for name in ("objective", "final_objective", "empties", "splits", "moved", "passes"):
        assert getattr(found, name) == getattr(expected, name)


def test_numbers_out_of_range_are_refused():
    for k, iterations in ((0, 1), (1, 0)):
        with pytest.raises(UsageError, match="at least 1"):
            two_level(rows_of(blobs(n=20)), k, iterations)
