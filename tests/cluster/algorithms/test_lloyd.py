"""k-means against scikit-learn and float64 brute force; resumed at every iteration; on degenerate rows."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from ktransfer.artifacts.features import Features
from ktransfer.cluster.algorithms.initialisation import random_rows
from ktransfer.cluster.algorithms.lloyd import assign_rows, first_state, kmeans, load_state, save_state
from ktransfer.cluster.engines import engine
from ktransfer.cluster.engines.engine import Rows
from ktransfer.cluster.feature_check import check_features
from ktransfer.errors import StageError, UsageError


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 700)


def rows_of(data):
    return Rows(len(data), data.shape[1], lambda start, stop: data[start:stop].astype(np.float32))


def blobs(n=400, d=7, centres=12, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, d)) * 3
    return (means[rng.integers(0, centres, n)] + rng.normal(size=(n, d)) + offset).astype(np.float32)


def brute(data, centroids):
    """Lowest index of the nearest centroid and the squared distance, in float64."""
    gaps = data[:, None].astype(np.float64) - centroids[None].astype(np.float64)
    squares = (gaps**2).sum(axis=2)
    return squares.argmin(axis=1), squares.min(axis=1)


def same(first, second):
    for field in fields(first):
        if field.name != "seconds":
            left, right = getattr(first, field.name), getattr(second, field.name)
            assert left.tobytes() == right.tobytes() if isinstance(left, np.ndarray) else left == right, field.name


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("k", [2, 9, 40])
def test_same_as_scikit_learn(k, offset):
    data = blobs(offset=offset)
    found = kmeans(rows_of(data), k, iterations=100, seed=3)
    peer = KMeans(k, init=random_rows(rows_of(data), k, 3), n_init=1, algorithm="lloyd", max_iter=100, tol=0).fit(data)
    np.testing.assert_array_equal(found.labels, peer.labels_)
    np.testing.assert_allclose(found.centroids, peer.cluster_centers_, rtol=1e-5, atol=1e-5)
    assert found.final_objective == pytest.approx(peer.inertia_, rel=1e-5)
    assert found.moved[-1] == 0
    assert len(found.moved) < 100


def test_curves_and_counts_mean_what_is_written():
    data = blobs()
    states = []
    found = kmeans(rows_of(data), 15, iterations=4, seed=1, on_iteration=states.append)
    centroids = random_rows(rows_of(data), 15, 1)
    previous = np.full(len(data), -1)
    for i, state in enumerate(states):
        labels, squares = brute(data, centroids)
        np.testing.assert_array_equal(state.labels, labels)
        assert found.objective[i] == pytest.approx(squares.sum(), rel=1e-6)
        assert found.moved[i] == (labels != previous).sum()
        assert found.empties[i] == 15 - len(np.unique(labels))
        means = np.stack([data[labels == c].mean(axis=0, dtype=np.float64) for c in range(15)])
        np.testing.assert_allclose(state.centroids, means, rtol=1e-6, atol=1e-6)
        centroids, previous = state.centroids, labels
    labels, squares = brute(data, found.centroids)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.counts, np.bincount(labels, minlength=15))
    assert found.final_objective == pytest.approx(squares.sum(), rel=1e-6)
    assert found.final_objective <= found.objective[-1]
    assert found.objective == sorted(found.objective, reverse=True)
    assert (found.points_used, found.points_total, len(found.seconds), found.seed) == (400, 400, 4, 1)
    assert "faiss" in found.engine
    assert found.version
    assert kmeans(rows_of(data), 2, 1, points_total=900).points_total == 900


def test_resume_after_every_iteration_gives_the_same_bytes(tmp_path):
    data = blobs()
    paths = []

    def save(state):
        paths.append(tmp_path / f"{len(paths)}.npz")
        save_state(paths[-1], state)

    expected = kmeans(rows_of(data), 25, iterations=8, seed=5, on_iteration=save)
    assert len(paths) == 8
    for path in paths:
        same(expected, kmeans(rows_of(data), 25, iterations=8, seed=5, state=load_state(path)))
    assert list(tmp_path.glob("*.part")) == []


def test_seed_matters_and_block_size_does_not(monkeypatch):
    data = blobs()
    first = kmeans(rows_of(data), 10, 3, seed=0)
    assert not np.array_equal(first.centroids, kmeans(rows_of(data), 10, 3, seed=1).centroids)
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 10**6)
    again = kmeans(rows_of(data), 10, 3, seed=0)
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_allclose(first.centroids, again.centroids, rtol=1e-6, atol=1e-6)


def test_state_of_another_job_or_file_is_refused(tmp_path):
    data = blobs()
    states = []
    kmeans(rows_of(data), 5, 1, on_iteration=states.append)
    for other, k in ((data, 6), (data[:-1], 5), (data[:, :-1], 5)):
        with pytest.raises(UsageError, match="saved k-means"):
            kmeans(rows_of(other), k, 1, state=states[0])
    path = tmp_path / "state.npz"
    save_state(path, states[0])
    data_bytes = path.read_bytes()
    for damage in (b"", b"text", data_bytes[: len(data_bytes) // 2], b"PK\x03\x04" + bytes(50)):
        path.write_bytes(damage)
        with pytest.raises(StageError, match="not a saved k-means"):
            load_state(path)
    np.savez(path.open("wb"), centroids=np.array([{}], dtype=object))
    with pytest.raises(StageError, match="not a saved k-means"):
        load_state(path)


@pytest.mark.parametrize("k", [1, 60])
def test_one_cluster_and_one_per_row(k):
    data = blobs(n=60)
    found = kmeans(rows_of(data), k, 5)
    assert found.counts.tolist() == ([60] if k == 1 else [1] * 60)
    if k == 1:
        np.testing.assert_allclose(found.centroids[0], data.mean(axis=0), rtol=1e-5)
    else:
        assert found.final_objective == 0


@pytest.mark.parametrize(("k", "iterations"), [(0, 1), (1, 0)])
def test_nothing_to_do_is_refused(k, iterations):
    with pytest.raises(UsageError, match="at least 1"):
        kmeans(rows_of(blobs()), k, iterations)


def test_duplicates_and_constant_columns():
    data = np.repeat(blobs(n=30, d=6), 10, axis=0)
    data[:, 2] = 7.5
    found = kmeans(rows_of(data), 12, 30)
    assert (found.counts > 0).all()
    np.testing.assert_array_equal(found.labels, brute(data, found.centroids)[0])
    np.testing.assert_array_equal(found.centroids[:, 2], 7.5)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_empty_clusters_are_split_off_the_heaviest(offset):
    rng = np.random.default_rng(0)
    # 300 rows on a thin diagonal line (even/odd steps of faiss run along its normal), 20 rows far away.
    along = rng.normal(size=(300, 1)) * [4, 4] + rng.normal(size=(300, 2)) * 0.01
    data = (np.concatenate([along, rng.normal(size=(20, 2)) + 60]) + offset).astype(np.float32)
    start = np.array([[0, 0], [60, 60], [9e3, 0], [0, 9e3], [9e3, 9e3]]) + offset
    found = kmeans(rows_of(data), 5, 20, start=start.astype(np.float32))
    assert (found.empties[0], found.splits[0]) == (3, 3)
    assert found.empties[1:] == [0] * (len(found.empties) - 1)
    # All three halves come from the cluster of 300, so the line has four pieces and the far rows stay together.
    assert sorted(found.counts.tolist())[0] == 20
    assert found.counts.sum() == 320
    assert found.final_objective < 0.2 * found.objective[0]


def test_a_cluster_that_was_split_weighs_less():
    sizes = {0: 50, 4: 50, 100: 30, 104: 30}
    data = np.concatenate([np.full((count, 1), at, np.float32) for at, count in sizes.items()])
    data += np.random.default_rng(0).normal(size=data.shape).astype(np.float32) * np.float32(0.1)
    start = np.array([[2], [102], [9e3], [9e4]], np.float32)
    states = []
    found = kmeans(rows_of(data), 4, 10, on_iteration=states.append, start=start)
    assert found.splits[0] == 2
    assert (states[0].centroids < 50).sum() == 2
    assert sorted(found.counts.tolist()) == [30, 30, 50, 50]


def test_what_cannot_be_split_stays_empty():
    data = np.repeat(np.array([[0, 0], [5, 5]], np.float32), 8, axis=0)
    found = kmeans(rows_of(data), 3, 5, start=np.array([[0, 0], [5, 5], [90, 90]], np.float32))
    assert found.counts.tolist() == [8, 8, 0]
    assert (found.empties, found.splits) == ([1, 1], [0, 0])
    np.testing.assert_array_equal(found.centroids, [[0, 0], [5, 5], [90, 90]])


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_assign_is_exact_far_from_the_origin(offset):
    rng = np.random.default_rng(1)
    data = (rng.normal(size=(500, 24)) * 3 + offset).astype(np.float32)
    centroids = data[rng.permutation(500)[:40]] + np.float32(0.25)
    labels, distances = assign_rows(rows_of(data), centroids)
    expected, squares = brute(data, centroids)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_allclose(distances, squares, rtol=1e-5)
    assert (labels.dtype, distances.dtype) == (np.int32, np.float32)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 30), dim=st.integers(1, 5), scale=st.sampled_from([1.0, 0.5, 1e4]))
def test_ties_go_to_the_lowest_index(seed, k, dim, scale):
    rng = np.random.default_rng(seed)
    # Points of a coarse grid: most rows are equally near to several centroids, many centroids are equal.
    data = (rng.integers(-2, 3, (60, dim)) * scale).astype(np.float32)
    centroids = (rng.integers(-2, 3, (k, dim)) * scale).astype(np.float32)
    labels, distances = assign_rows(rows_of(data), centroids)
    expected, squares = brute(data, centroids)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_allclose(distances, squares, rtol=1e-6)


def test_assign_refuses_other_lengths():
    with pytest.raises(UsageError, match=r"7 numbers.*of 6"):
        assign_rows(rows_of(blobs()), np.zeros((3, 6), np.float32))


def features_of(data, valid=None):
    count = len(data)
    valid = np.ones(count, bool) if valid is None else valid
    found = Features(Path("train.h5"), data, valid, np.full(count, -1, np.int32), {})
    found.__dict__["keys"] = [f"p{i}.jpg" for i in range(count)]
    return found


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_check_counts_distinct_rows_and_constant_columns(dtype, monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 40)
    data = np.repeat(blobs(n=15), 4, axis=0).astype(dtype)
    data[:, 3], data[:, 5] = 1.5, 0.0
    data[7, 5] = -0.0
    valid = np.ones(60, bool)
    valid[50] = False
    data[50] = 9
    found = check_features(features_of(data, valid), 15)
    assert found == (59, 15, 7, 2)
    with pytest.raises(UsageError, match="k = 16, but only 15 of the 59"):
        check_features(features_of(data, valid), 16)


def test_check_names_rows_that_are_not_finite():
    data = blobs(n=40)
    data[3, 2], data[9, 0], data[20, 1] = np.nan, np.inf, np.nan
    valid = np.ones(40, bool)
    valid[20] = False
    with pytest.raises(UsageError, match=r"2 rows hold NaN, infinity or numbers beyond 1e18, first 'p3.jpg', 'p9.jpg'"):
        check_features(features_of(data, valid), 2)
    with pytest.raises(UsageError, match="no image is valid"):
        check_features(features_of(data, np.zeros(40, bool)), 2)


def test_float16_rows_are_clustered_as_their_float32_values():
    data = blobs().astype(np.float16)
    same(kmeans(rows_of(data), 8, 5), kmeans(rows_of(data.astype(np.float32)), 8, 5))


def test_weights_count_as_repetitions_do():
    data = blobs(n=200)
    times = np.random.default_rng(2).integers(1, 5, 200)
    start = random_rows(rows_of(data), 9, 0)
    weighed = Rows(200, 7, rows_of(data).read, times.astype(np.float64))
    found, peer = (
        kmeans(weighed, 9, 30, start=start),
        kmeans(rows_of(np.repeat(data, times, axis=0)), 9, 30, start=start),
    )
    np.testing.assert_allclose(found.centroids, peer.centroids, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.repeat(found.labels, times), peer.labels)
    assert found.final_objective == pytest.approx(peer.final_objective, rel=1e-6)


def outliers(seed=0, far=300):
    """300 rows around three centres, and six rows far from all and from one another."""
    rng = np.random.default_rng(seed)
    crowd = rng.normal(size=(300, 3)) + rng.integers(0, 3, (300, 1)) * 12
    return np.concatenate([crowd, rng.normal(size=(6, 3)) * far]).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [1, 2, 10, 25])
def test_no_cluster_stays_below_the_least_size(seed, least):
    data = outliers(seed)
    found = kmeans(rows_of(data), 12, 15, seed, min_size=least, start=data[-12:])
    labels, squares = brute(data, found.centroids)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.counts, np.bincount(labels, minlength=len(found.centroids)))
    assert found.counts.min() >= least
    assert len(found.centroids) == 12 - found.dissolved
    assert found.final_objective == pytest.approx(squares.sum(), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_that_are_too_small_get_half_of_a_large_one(seed):
    data = outliers(seed, far=30)
    plain = kmeans(rows_of(data), 12, 30, seed)
    found = kmeans(rows_of(data), 12, 30, seed, min_size=10)
    assert plain.counts.min() < 10
    assert found.splits[0] > 0
    assert found.dissolved == 0
    assert found.counts.min() >= 10


def test_a_cluster_that_cannot_be_halved_does_not_keep_others_from_it():
    """Of 11 rows no two clusters of 6 can be made, of 20 three: also where, divided once, they weigh less than 11."""
    data = np.concatenate([np.linspace(0, 1, 11), np.linspace(50, 60, 20)])[:, None].astype(np.float32)
    start = np.array([[0.5], [55], [900], [900]], np.float32)
    found = kmeans(rows_of(data), 4, 1, start=start, min_size=6)
    assert found.splits == [2]


def test_copies_in_the_heaviest_cluster_do_not_keep_others_from_being_split():
    data = np.concatenate([np.zeros(50), np.linspace(50, 60, 20)])[:, None].astype(np.float32)
    found = kmeans(rows_of(data), 3, 1, start=np.array([[0], [55], [900]], np.float32))
    assert found.splits == [1] and found.counts.min() > 0


def test_only_dissolving_helps_against_copies():
    # 40 copies of one point, and two rows: no three clusters of ten can be had.
    data = np.concatenate([np.zeros((40, 2)), [[5, 0], [9, 0]]]).astype(np.float32)
    found = kmeans(rows_of(data), 3, 10, min_size=10, start=data[-3:])
    assert found.counts.tolist() == [42]
    assert found.dissolved == 2
    assert found.passes == len(found.objective) + 2
    assert found.bytes_read == found.passes * 42 * 2 * 4
    # Without it, the two stay where they are.
    assert sorted(kmeans(rows_of(data), 3, 10, start=data[-3:]).counts.tolist()) == [1, 1, 40]


def test_a_chain_of_small_clusters_is_dissolved_from_the_smallest():
    # 6 rows at 0, 1 at 10, 2 at 11, 3 at 100: the row at 10 goes to 11, which is then large enough.
    data = np.repeat(np.array([[0], [10], [11], [100]], np.float32), [6, 1, 2, 3], axis=0)
    start = np.array([[0], [10], [11], [100]], np.float32)
    found = kmeans(rows_of(data), 4, 1, start=start, min_size=3)
    np.testing.assert_array_equal(found.centroids, [[0], [11], [100]])
    assert found.counts.tolist() == [6, 3, 3]


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match=r"--min-size 7: 60 clusters .* 420 rows, there are 400"):
        kmeans(rows_of(blobs()), 60, 1, min_size=7)


def test_centroids_begin_as_they_are_given_and_on_the_sphere_at_length_1():
    data = blobs(n=30, d=6)
    np.testing.assert_array_equal(first_state(rows_of(data), data[:4]).centroids, data[:4])
    state = first_state(rows_of(data), data[:4], spherical=True)
    np.testing.assert_allclose(state.centroids, unit(data[:4].astype(np.float64)), rtol=1e-6)
    assert not state.converged and (state.labels == -1).all()  # of no cluster


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [2, 9, 30])
def test_spherical_as_in_numpy(k):
    data = unit(blobs(n=300, d=6)).astype(np.float32)
    start = random_rows(rows_of(data), k, 4)
    found = kmeans(rows_of(data), k, 60, 4, spherical=True)
    centres, wide = unit(start.astype(np.float64)), data.astype(np.float64)
    for _ in range(60):
        labels = (wide @ centres.T).argmax(axis=1)
        centres = unit(np.stack([wide[labels == c].sum(axis=0) for c in range(k)]))
    labels = (wide @ centres.T).argmax(axis=1)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.centroids, centres, atol=1e-6)
    assert found.final_objective == pytest.approx(2 * (1 - (wide @ centres.T).max(axis=1)).sum(), rel=1e-5)
    assert found.objective == sorted(found.objective, reverse=True)
    assert found.moved[-1] == 0
    assert found.spherical


def test_spherical_keeps_a_centroid_whose_mean_is_zero():
    data = np.array([[1, 0], [-1, 0], [0, 1], [0, 1]], np.float32)
    start = np.array([[0, -5], [0, 2]], np.float32)
    # Both of the first two are as far from either centroid: the lower one takes them, and their mean is zero.
    found = kmeans(rows_of(data), 2, 3, start=start, spherical=True)
    np.testing.assert_array_equal(found.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(found.centroids, [[0, -1], [0, 1]])


def test_spherical_splits_stay_on_the_sphere():
    data = unit(blobs(n=300, d=6)).astype(np.float32)
    start = np.repeat(data[:1], 8, axis=0)
    states = []
    found = kmeans(rows_of(data), 8, 20, start=start, spherical=True, on_iteration=states.append)
    assert found.splits[0] == 7
    assert found.counts.min() > 0
    for state in states:
        np.testing.assert_allclose(np.linalg.norm(state.centroids, axis=1), 1, atol=1e-6)


def test_resume_with_least_size_on_the_sphere(tmp_path):
    data = unit(outliers()).astype(np.float32)
    options = {"seed": 5, "min_size": 9, "spherical": True}
    paths = []

    def save(state):
        paths.append(tmp_path / f"{len(paths)}.npz")
        save_state(paths[-1], state)

    expected = kmeans(rows_of(data), 20, 6, on_iteration=save, **options)
    for path in paths:
        same(expected, kmeans(rows_of(data), 20, 6, state=load_state(path), **options))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 50),
    dim=st.integers(1, 5),
    share=st.floats(0, 1),
    copies=st.integers(1, 3),
    kind=st.sampled_from(["normal", "far", "half", "constant"]),
    least=st.integers(0, 4),
)
def test_what_holds_for_any_rows(seed, n, dim, share, copies, kind, least):
    data = np.random.default_rng(seed).normal(size=(n, dim))
    if kind == "far":
        data += 1e6
    elif kind == "half":
        data = np.clip(data * 3e4, -65504, 65504).astype(np.float16)
    elif kind == "constant":
        data[:, 0] = -3
    data = np.repeat(data, copies, axis=0).astype(np.float32)
    k = 1 + round(share * (len(np.unique(data, axis=0)) - 1))
    least = min(least, len(data) // k)
    found = kmeans(rows_of(data), k, 12, seed, min_size=least)
    squares = brute(data, found.centroids)[1]
    # Not the labels: two centroids may be equally near up to 1e-12.
    own = ((data.astype(np.float64) - found.centroids[found.labels].astype(np.float64)) ** 2).sum(axis=1)
    np.testing.assert_allclose(own, squares, rtol=1e-9, atol=1e-9)
    assert found.counts.sum() == len(data)
    assert found.counts.min() >= least
    assert len(found.centroids) == k - found.dissolved
    assert found.final_objective == pytest.approx(squares.sum(), rel=1e-5, abs=1e-6)
    if found.moved[-1] == 0 and not found.dissolved and found.counts.min() > 0:
        means = np.stack([data[found.labels == c].mean(axis=0, dtype=np.float64) for c in range(k)])
        np.testing.assert_allclose(found.centroids, means, rtol=1e-6, atol=1e-5)
