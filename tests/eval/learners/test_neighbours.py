"""The search for neighbours, and their votes, against scikit-learn and the whole matrix sorted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from ktransfer.eval.learners import neighbours
from ktransfer.eval.learners.neighbours import Neighbours, search, unit, vote


def reader(rows, blocks=None):
    def read(start, stop):
        if blocks is not None:
            blocks.append((start, stop))
        return rows[start:stop]

    return read


@pytest.mark.parametrize(("count", "k"), [(1, 1), (5, 5), (700, 20), (5000, 200), (5000, 1)])
def test_the_nearest_in_order(count, k, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERIES", 64)
    monkeypatch.setattr(neighbours, "REFERENCES", 512)
    monkeypatch.setattr(neighbours, "FIRST", 100)
    rng = np.random.default_rng(count)
    references, queries = rng.normal(size=(count, 24)), rng.normal(size=(150, 24)) * rng.lognormal(size=(150, 1))
    done, blocks = [], []
    found = search(queries, reader(references, blocks), count, k, done.append)
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        references / np.linalg.norm(references, axis=1)[:, None]
    ).T
    wanted = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.places, wanted)
    np.testing.assert_allclose(found.similarities, np.take_along_axis(cosine, wanted, 1), atol=1e-6)
    # Every reference once, in order.
    assert sum(done) == count
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])] and blocks[-1][1] == count
    assert max(stop - start for start, stop in blocks) <= 512


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 60), st.integers(1, 70), st.integers(0, 1 << 30))
def test_equal_similarities_go_by_place_whatever_the_blocks(count, k, queries_a_block, references_a_block, seed):
    rng = np.random.default_rng(seed)
    k = min(k, count)
    # Similarities of 1, 0 and -1 alone, so that nearly all are equal; rows of zeros among them.
    references = rng.integers(-1, 2, size=(count, 1)) * np.array([1.0, 0.0])
    queries = rng.integers(-1, 2, size=(33, 1)) * np.array([1.0, 0.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "QUERIES", queries_a_block)
        patch.setattr(neighbours, "REFERENCES", references_a_block)
        patch.setattr(neighbours, "FIRST", 7)
        found = search(queries, reader(references), count, k)
    wanted = np.argsort(-(queries @ references.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.places, wanted)


def test_references_that_come_ever_nearer():
    """Each block beats all before it: the worst case for the comparison with the k-th best."""
    angles = np.linspace(1.5, 0.1, 9000)
    references = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = search(np.array([[1.0, 0.0]]), reader(references), 9000, 50)
    np.testing.assert_array_equal(found.places[0], np.arange(8999, 8949, -1))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e30])
def test_rows_of_length_one(scale):
    rows = np.random.default_rng(0).normal(size=(6, 5)) * scale
    rows[3] = 0
    lengths = np.linalg.norm(unit(rows).astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, [1, 1, 1, 0, 1, 1], atol=1e-6)
    assert unit(rows.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.07), (50, 1.0), (20, 0.001)])
def test_votes_are_those_of_scikit_learn(k, temperature):
    rng = np.random.default_rng(k)
    labels = rng.integers(0, 6, 800)
    centres = rng.normal(size=(6, 16))
    references = centres[labels] + 2 * rng.normal(size=(800, 16))
    queries = centres[rng.integers(0, 6, 300)] + 2 * rng.normal(size=(300, 16))

    def weights(distances):  # sklearn's distance is 1 - cosine; relative to the nearest, as 1 / 0.001 overflows
        return np.exp((distances.min(axis=1, keepdims=True) - distances) / temperature)

    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(references, labels)
    ours = vote(search(queries, reader(references), 800, k), labels, 6, k, temperature)
    assert (ours == theirs.predict(queries)).mean() > 0.995  # rounding may turn a tie
    # Fewer neighbours of a longer search are those of a shorter one.
    assert (vote(search(queries, reader(references), 800, 300), labels, 6, k, temperature) == ours).all()


def test_votes_by_hand():
    found = Neighbours(np.array([[0.9, 0.8, 0.8], [0.5, 0.5, 0.1]], np.float32), np.array([[0, 1, 2], [1, 0, 3]]))
    labels = np.array([2, 1, 1, 0])
    # e^(0.9/T) against 2 e^(0.8/T): two win where T > 0.1 / ln 2 = 0.144; of two equal votes the lower class.
    assert vote(found, labels, 3, 3, 0.14).tolist() == [2, 1]
    assert vote(found, labels, 3, 3, 0.15).tolist() == [1, 1]
    assert vote(found, labels, 3, 1, 0.15).tolist() == [2, 1]


def test_a_query_is_not_its_own_neighbour():
    found = Neighbours(np.array([[1.0, 0.9, 0.8], [1.0, 1.0, 0.7]], np.float32), np.array([[4, 2, 0], [1, 3, 0]]))
    assert found.without(np.array([4, 3])).places.tolist() == [[2, 0], [1, 0]]
    # Behind more equals than were asked for, it is not there at all: the last one goes.
    kept = found.without(np.array([4, 9]))
    assert kept.places.tolist() == [[2, 0], [1, 3]]
    assert kept.similarities.tolist() == [[np.float32(0.9), np.float32(0.8)], [1, 1]]
