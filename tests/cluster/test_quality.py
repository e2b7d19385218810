"""Cluster quality against hand-made cases and faiss's own imbalance factor."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from ktransfer.cluster.quality import agreement, histogram, quality, size_facts, sparkline, summary


def array(*values):
    return np.array(values, np.int32)


def test_by_hand():
    labels = array(0, 0, 0, 1, 1, -1, 2, 2)
    targets = array(5, 5, 6, 6, 6, 6, -1, 5)
    found = quality(labels, targets, 4)
    assert (found["rows"], found["k"], found["empty"]) == (7, 4, 1)
    assert (found["min"], found["median"], found["max"]) == (0, 2.0, 3)
    assert found["imbalance"] == pytest.approx(4 * (9 + 4 + 4) / 49)
    # Known: clusters {5, 5, 6}, {6, 6}, {5}: 2 + 2 + 1 of 6.
    assert (found["compared"], found["classes"], found["purity"]) == (6, 2, pytest.approx(5 / 6))
    line = summary(found)
    assert "\n" not in line
    assert "7 rows in 4 clusters of 0 / 2 / 3 rows" in line
    assert "purity 0.833" in line


def test_against_peers():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 6, 300).astype(np.int32)
    labels = ((targets + (rng.random(300) < 0.4) * rng.integers(0, 6, 300)) % 9).astype(np.int32)
    found = quality(labels, targets, 9)
    table = contingency_matrix(targets, labels)
    assert found["purity"] == pytest.approx(table.max(axis=0).sum() / 300)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(targets, labels))
    assert found["ari"] == pytest.approx(adjusted_rand_score(targets, labels))
    wide = labels.astype(np.int64)
    assert found["imbalance"] == pytest.approx(faiss.imbalance_factor(300, 9, faiss.swig_ptr(wide)))


def test_perfect_clusters():
    found = quality(array(2, 2, 0, 0, 1, 1), array(0, 0, 1, 1, 2, 2), 3)
    assert [found[name] for name in ("purity", "nmi", "ari", "imbalance")] == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize("targets", [array(-1, -1, -1), array(-1, -1, 4)])
def test_without_classes(targets):
    found = quality(array(0, 1, -1), targets, 2)
    assert (found["purity"], found["nmi"], found["ari"], found["compared"]) == (None, None, None, 0)
    assert "purity" not in summary(found)


def test_no_valid_image():
    found = quality(array(-1, -1), array(0, 1), 3)
    assert (found["rows"], found["empty"], found["imbalance"]) == (0, 3, 0)


def test_size_facts_and_their_histogram():
    sizes = np.array([0, 0, 1, 2, 3, 4, 7, 8, 31, 0])
    facts = size_facts(sizes)
    assert (facts["min"], facts["median"], facts["max"], facts["empty"]) == (0, 2.5, 31, 3)
    bins = {"0": 3, "1": 1, "2-3": 2, "4-7": 2, "8-15": 1, "16-31": 1}
    assert histogram(sizes) == bins
    assert sparkline(bins) == "0 |█▃▆▆▃▃| 31"
    assert histogram(np.array([64, 5000])) == {"64-127": 1} | dict.fromkeys(
        ("128-255", "256-511", "512-1023", "1024-2047", "2048-4095"), 0
    ) | {"4096-8191": 1}
    assert sparkline(histogram(np.array([64, 5000]))) == "64 |█     █| 8191"
    assert histogram(np.array([1])) == {"1": 1} and sparkline({"1": 1}) == "1 |█| 1"
    assert histogram(np.array([2**40])) == {f"{2**40}-{2**41 - 1}": 1}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_every_cluster_is_in_its_bin(sizes):
    bins = histogram(np.array(sizes))
    for name, count in bins.items():
        low, _, high = name.partition("-")
        assert count == sum(int(low) <= size <= int(high or low) for size in sizes)
    assert sum(bins.values()) == len(sizes)


def test_agreement_by_hand():
    first, second = array(0, 0, 0, 1, 1, 1), array(4, 4, 2, 2, 2, 2)
    # Cluster 0: 2 of 3 shared with the second's 4; cluster 1: 3 of 4 with its 2.
    assert agreement(first, second)["best_match"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert agreement(first, second)["nmi"] == pytest.approx(normalized_mutual_info_score(first, second))
    assert agreement(first, second)["ari"] == pytest.approx(adjusted_rand_score(first, second))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30), st.permutations(range(5)))
def test_agreement_as_sets(rows, names):
    first, second = np.array(rows, np.int32).T
    members = [{row for row, label in enumerate(labels) if label == c} for labels in (first, second) for c in range(5)]
    best = [max(len(a & b) / len(a | b) for b in members[5:] if b) for a in members[:5] if a]
    assert agreement(first, second)["best_match"] == pytest.approx(np.mean(best))
    renamed = np.array(names, np.int32)[first]
    assert list(agreement(first, renamed).values()) == pytest.approx([1, 1, 1])
