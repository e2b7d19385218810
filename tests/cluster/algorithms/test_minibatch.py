"""Mini-batch k-means against scikit-learn's and against Lloyd's; streams that are cut; resumed after any iteration."""

from itertools import islice

import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans

from ktransfer.cluster.algorithms.initialisation import random_rows
from ktransfer.cluster.algorithms.lloyd import kmeans, load_state, save_state
from ktransfer.cluster.algorithms.minibatch import minibatch, minibatch_kmeans
from ktransfer.cluster.engines import engine
from ktransfer.cluster.engines.engine import Rows
from ktransfer.errors import UsageError


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 700)


def rows_of(data):
    return Rows(len(data), data.shape[1], lambda start, stop: data[start:stop])


def blobs(n=1500, d=8, centres=30, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, d)) * 2
    return (means[rng.integers(0, centres, n)] + rng.normal(size=(n, d))).astype(np.float32)


def objective(data, centroids):
    return ((data[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2).min(axis=1).sum()


@pytest.mark.parametrize("ordered", [False, True])
def test_no_worse_than_scikit_learn(ordered):
    data = blobs()
    if ordered:  # as features of a data set whose classes are folders
        data = data[np.argsort(data[:, 0])]
    ours, theirs, lloyd = [], [], []
    for seed in range(4):
        start = random_rows(rows_of(data), 25, seed)
        ours.append(minibatch_kmeans(rows_of(data), 25, 4, seed, batch_rows=128).final_objective)
        peer = MiniBatchKMeans(25, init=start, n_init=1, batch_size=128, max_iter=4, random_state=seed).fit(data)
        theirs.append(objective(data, peer.cluster_centers_))
        lloyd.append(kmeans(rows_of(data), 25, 4, seed).final_objective)
    assert np.mean(ours) < 1.01 * np.mean(theirs)
    assert np.mean(ours) < 1.03 * np.mean(lloyd)


def test_a_batch_of_all_rows_is_lloyd():
    data = blobs(n=300)
    found = minibatch_kmeans(rows_of(data), 12, 6, seed=1, batch_rows=300)
    expected = kmeans(rows_of(data), 12, 6, seed=1)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-5)
    np.testing.assert_allclose(found.centroids, expected.centroids, atol=1e-4)
    assert found.moved == expected.moved


def test_votes_are_taken_back():
    data = blobs(n=400)
    found = minibatch_kmeans(rows_of(data), 10, 100, batch_rows=64)
    assert found.moved[-1] == 0  # an iteration that moved no row: centroids are the means of their rows
    means = [data[found.labels == cluster].mean(axis=0) for cluster in range(10)]
    np.testing.assert_allclose(found.centroids, means, atol=1e-4)
    assert found.counts.sum() == 400
    assert found.final_objective == pytest.approx(objective(data, found.centroids), rel=1e-5)


def test_resume_after_every_iteration_gives_the_same_bytes(tmp_path):
    data = blobs(n=500)
    paths = []

    def save(state):
        paths.append(tmp_path / f"{len(paths)}.npz")
        save_state(paths[-1], state)

    expected = minibatch_kmeans(rows_of(data), 20, 4, 2, save, batch_rows=64)
    assert len(paths) == 4
    for path in paths:
        found = minibatch_kmeans(rows_of(data), 20, 4, 2, state=load_state(path), batch_rows=64)
        for name in ("centroids", "counts", "labels"):
            assert getattr(found, name).tobytes() == getattr(expected, name).tobytes()
        assert (found.objective, found.moved, found.splits) == (expected.objective, expected.moved, expected.splits)
    with pytest.raises(UsageError, match="saved k-means"):
        minibatch_kmeans(rows_of(data), 21, 4, state=load_state(paths[0]))


def test_empty_clusters_are_split_off_the_heaviest():
    data = blobs(n=300)
    start = np.concatenate([data[:3], np.full((2, 8), 1e4, np.float32)])
    found = minibatch_kmeans(rows_of(data), 5, 10, start=start, batch_rows=64)
    assert (found.empties[0], found.splits[0]) == (2, 2)
    assert found.counts.min() > 0


def blocks_of(data, size):
    return (data[start : start + size] for start in range(0, len(data), size))


def test_a_stream_follows_its_rows():
    data = blobs()
    seen = list(minibatch(blocks_of(data, 100), 20, seed=4))
    assert [state.rows for state in seen] == list(range(100, 1600, 100))
    starts = [random_rows(rows_of(data[:100]), 20, 4), *(state.centroids for state in seen[:-1])]
    labels = []
    for before, block in zip(starts, blocks_of(data, 100), strict=True):
        labels.append(((block[:, None] - before[None]) ** 2).sum(axis=2).argmin(axis=1))
    labels = np.concatenate(labels)
    means = np.stack([data[labels == cluster].mean(axis=0, dtype=np.float64) for cluster in range(20)])
    np.testing.assert_allclose(seen[-1].centroids, means, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen[-1].counts, np.bincount(labels, minlength=20))
    peer = MiniBatchKMeans(20, init=random_rows(rows_of(data[:100]), 20, 4), n_init=1, reassignment_ratio=0)
    for block in blocks_of(data, 100):
        peer.partial_fit(block)
    assert objective(data, seen[-1].centroids) < 1.02 * objective(data, peer.cluster_centers_)


def test_a_stream_without_end_that_is_cut_goes_on_as_if_it_were_not():
    def endless():
        step = 0
        while True:
            yield np.random.default_rng(step).normal(size=(32, 4)).astype(np.float32) + step % 3
            step += 1

    whole = list(islice(minibatch(endless(), 40, memory=200), 30))
    first = list(islice(minibatch(endless(), 40, memory=200), 7))[-1]
    rest = list(islice(minibatch(islice(endless(), 7, None), 40, memory=200, state=first), 23))
    assert (first.batches, rest[-1].batches, rest[-1].rows) == (7, 30, 960)
    for one, other in zip(whole[7:], rest, strict=True):
        assert one.centroids.tobytes() == other.centroids.tobytes()
        assert one.sums.tobytes() == other.sums.tobytes()


def test_memory_forgets_and_idle_centroids_move():
    rng = np.random.default_rng(0)
    drift = [(rng.normal(size=(50, 2)) + (0 if step < 20 else 100)).astype(np.float32) for step in range(60)]
    *_, keeps = minibatch(iter(drift), 4)
    *_, forgets = minibatch(iter(drift), 4, memory=200)
    assert (keeps.centroids[:, 0] < 50).any()
    assert (forgets.centroids > 90).all()
    assert forgets.objective < keeps.objective


def test_misuse_is_refused():
    data = blobs(n=50)
    with pytest.raises(UsageError, match="only 1 distinct"):
        next(minibatch([np.zeros((5, 2), np.float32)], 2))
    with pytest.raises(UsageError, match="no block"):
        next(minibatch([], 2))
    with pytest.raises(UsageError, match="centroids of 8 numbers"):
        list(minibatch([data, data[:, :3]], 2))
    with pytest.raises(UsageError, match="to go on from"):
        list(minibatch([data], 3, start=data[:2]))
    for wrong in ({"k": 0}, {"k": 2, "memory": 0.0}):
        with pytest.raises(UsageError, match="at least 1"):
            next(minibatch([data], **wrong))
    with pytest.raises(UsageError, match="at least 1"):
        minibatch_kmeans(rows_of(data), 3, batch_rows=0)
    with pytest.raises(UsageError, match="no weights"):
        minibatch_kmeans(Rows(50, 8, lambda start, stop: data[start:stop], np.ones(50)), 3)
