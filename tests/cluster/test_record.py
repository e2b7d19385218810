"""The quality record against scikit-learn and brute force; on degenerate shapes; the same bytes again."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import silhouette_samples

from ktransfer.cluster.algorithms.lloyd import kmeans
from ktransfer.cluster.algorithms.sampling import random_order, random_sample
from ktransfer.cluster.engines import engine
from ktransfer.cluster.engines.engine import Rows
from ktransfer.cluster.record import (
    QUANTILES,
    derived_seed,
    make_record,
    margins,
    record_summary,
    silhouettes,
    survey,
    write_record,
)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 600)


def rows_of(data):
    return Rows(len(data), data.shape[1], lambda start, stop: data[start:stop].astype(np.float32))


def blobs(n=300, d=6, centres=8, noise=1.0, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, d)) * 3
    return (means[rng.integers(0, centres, n)] + rng.normal(size=(n, d)) * noise + offset).astype(np.float32)


def clustering(data, labels, centroids):
    """A clustering as given, of whatever quality."""
    counts = np.bincount(labels, minlength=len(centroids))
    return replace(kmeans(rows_of(data), 1, 1), centroids=centroids, counts=counts, labels=labels)


def brute_margins(sample, centroids):
    gaps = sample[:, None].astype(np.float64) - centroids[None].astype(np.float64)
    near = np.sort(np.sqrt((gaps**2).sum(axis=2)), axis=1)
    return (near[:, 1] - near[:, 0]) / np.maximum(near[:, 1], 1e-300)


@pytest.mark.parametrize("offset", [0.0, 3000.0])
@pytest.mark.parametrize("k", [2, 8, 40, 150])
def test_silhouettes_as_scikit_learn_on_all_rows(k, offset):
    """Not at a fixed point, so that centroids are not means; some clusters hold one row, with k = 150 many do."""
    data = blobs(offset=offset)
    found = kmeans(rows_of(data), k, iterations=2, seed=1)
    expected = silhouette_samples(data.astype(np.float64), found.labels, metric="sqeuclidean")
    whole = survey(rows_of(data), found, len(data))
    np.testing.assert_allclose(silhouettes(whole, found.labels), expected, atol=1e-3 if offset else 1e-5)
    part = survey(rows_of(data), found, 50)
    assert len(part.chosen) == 50
    np.testing.assert_allclose(silhouettes(part, found.labels), silhouettes(whole, found.labels)[part.chosen])


def test_silhouettes_of_unit_rows_are_those_of_cosine_distances():
    data = blobs()
    data /= np.linalg.norm(data, axis=1, keepdims=True)
    found = kmeans(rows_of(data), 9, iterations=3)
    expected = silhouette_samples(data.astype(np.float64), found.labels, metric="cosine")
    np.testing.assert_allclose(silhouettes(survey(rows_of(data), found, 300), found.labels), expected, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 3000.0])
@pytest.mark.parametrize("k", [2, 3, 40, 150])
def test_margins_as_brute_force(k, offset):
    data = blobs(offset=offset)
    found = kmeans(rows_of(data), k, iterations=4)
    seen = survey(rows_of(data), found, 120)
    np.testing.assert_array_equal(seen.sample, data[seen.chosen])
    np.testing.assert_allclose(margins(seen.sample, found.centroids), brute_margins(seen.sample, found.centroids))


def test_survey_measures_every_row_and_cluster():
    data = blobs(offset=100.0)
    found = kmeans(rows_of(data), 12, iterations=2)
    seen = survey(rows_of(data), found, 10)
    for c in range(12):
        mine = data[found.labels == c].astype(np.float64)
        np.testing.assert_allclose(seen.means[c], mine.mean(axis=0), rtol=1e-6)
        assert seen.spreads[c] == pytest.approx(mine.var(axis=0).sum(), rel=1e-4, abs=1e-9)
    gaps = data.astype(np.float64) - found.centroids[found.labels]
    np.testing.assert_allclose(seen.distances, (gaps**2).sum(axis=1), rtol=1e-5)


def test_the_sample_is_drawn_without_repetition_and_by_the_seed():
    np.testing.assert_array_equal(np.sort(random_order(1000, 4, "x")[:100]), random_sample(1000, 100, 4, "x"))
    drawn = random_sample(1000, 100, 4, "x")
    assert len(np.unique(drawn)) == 100 and (np.diff(drawn) > 0).all()
    assert drawn.max() > 900 and drawn.min() < 100
    np.testing.assert_array_equal(drawn, random_sample(1000, 100, 4, "x"))
    assert (drawn != random_sample(1000, 100, 5, "x")).any()
    np.testing.assert_array_equal(random_sample(7, 100, 4, "x"), np.arange(7))


def test_what_the_record_says():
    data = blobs(n=200, noise=0.5)
    found = kmeans(rows_of(data), 8, iterations=5, seed=2)
    seen = survey(rows_of(data), found, 90)
    record = make_record(found, seen)
    assert (record["schema"], record["rows"], record["k"], record["seed"], record["sampled"]) == (1, 200, 8, 2, 90)
    assert record["objective"] == found.objective and record["final_objective"] == found.final_objective
    assert sum(record["sizes"]["histogram"].values()) == 8
    assert record["sizes"]["max"] == found.counts.max()
    assert record["stability"] is None
    for name, values in (
        ("silhouette", silhouettes(seen, found.labels)),
        ("margin", brute_margins(seen.sample, found.centroids)),
    ):
        assert record[name]["mean"] == pytest.approx(values.mean(), abs=1e-6)
        for share in QUANTILES:
            assert record[name][f"{share:g}"] == pytest.approx(np.quantile(values, share), abs=1e-6)
    line = record_summary(record)
    assert "\n" not in line
    assert f"silhouette {record['silhouette']['mean']:.2f}; margin median {record['margin']['0.5']:.2f}; imb" in line


@pytest.mark.parametrize(("noise", "low", "high"), [(0.01, 1.0, 1.0), (None, 0.0, 0.6)])
def test_stability_of_far_blobs_and_of_noise(noise, low, high):
    if noise is None:
        data, k = np.random.default_rng(0).random((400, 20)).astype(np.float32), 8
    else:
        data, k = blobs(n=400, d=20, centres=2, noise=noise), 2  # with two, Lloyd finds them from any start
    first, second = (kmeans(rows_of(data), k, iterations=30, seed=seed) for seed in (5, derived_seed(5)))
    record = make_record(first, survey(rows_of(data), first, 50), second)
    facts = record["stability"]
    assert facts["seed"] == second.seed != 5
    assert facts["final_objective"] == second.final_objective
    for name in ("nmi", "ari", "best_match"):
        assert low - 1e-9 <= facts[name] <= high + 1e-9, name
    assert "NMI" in record_summary(record)


def test_the_same_bytes_again_whatever_the_blocks(tmp_path, monkeypatch):
    data = blobs()
    for place, numbers in enumerate((600, 600, 2**22)):
        monkeypatch.setattr(engine, "BLOCK_NUMBERS", numbers)
        found = kmeans(rows_of(data), 10, iterations=3)
        write_record(tmp_path / f"{place}", make_record(found, survey(rows_of(data), found, 100)))
    texts = [(tmp_path / f"{place}").read_bytes() for place in range(3)]
    assert texts[0] == texts[1]
    few, whole = json.loads(texts[0]), json.loads(texts[2])
    assert few["silhouette"] == pytest.approx(whole["silhouette"], abs=2e-6)
    assert few["margin"] == pytest.approx(whole["margin"], abs=2e-6)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    """One row, one cluster, as many clusters as rows, equal rows, empty clusters, far offsets: finite, and as brute."""
    n, d = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    k = data.draw(st.sampled_from([1, n]) | st.integers(1, 14))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = (rng.integers(0, 3, (n, d)) + data.draw(st.sampled_from([0.0, -7.5, 1e4]))).astype(np.float32)
    if data.draw(st.booleans()):
        rows[:] = rows[0]
    labels = np.append(rng.integers(0, k, n - 1), k - 1).astype(np.int32)
    centroids = rows[rng.integers(0, n, k)] + rng.integers(0, 2, (k, 1)).astype(np.float32)
    found = clustering(rows, labels, centroids)
    seen = survey(rows_of(rows), found, data.draw(st.integers(1, 15)))
    record = json.loads(json.dumps(make_record(found, seen, found), allow_nan=False))
    assert sum(record["sizes"]["histogram"].values()) == k
    assert record["stability"]["ari"] == record["stability"]["best_match"] == 1
    clusters = len(np.unique(labels))
    assert (record["silhouette"] is None) == (clusters < 2)
    assert (record["margin"] is None) == (k < 2)
    assert "imbalance" in record_summary(record)
    if k > 1:
        np.testing.assert_allclose(margins(seen.sample, centroids), brute_margins(seen.sample, centroids), atol=1e-12)
    if 1 < clusters < n:
        gaps = rows[:, None].astype(np.float64) - rows[None]
        expected = silhouette_samples((gaps**2).sum(axis=2), labels, metric="precomputed")
        np.testing.assert_allclose(silhouettes(seen, labels), expected[seen.chosen], atol=1e-6)
    elif clusters > 1:
        assert not silhouettes(seen, labels).any()
