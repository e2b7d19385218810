"""Cluster quality against hand-made cases and faiss's own imbalance factor."""

import faiss
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from ktransfer.cluster.quality import quality, summary


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


def test_no_valid_picture():
    found = quality(array(-1, -1), array(0, 1), 3)
    assert (found["rows"], found["empty"], found["imbalance"]) == (0, 3, 0)
