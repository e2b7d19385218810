"""Every engine beside scikit-learn, iteration by iteration, on rows of any shape and range."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin_min

from ktransfer.cluster.algorithms.initialisation import random_rows
from ktransfer.cluster.algorithms.lloyd import kmeans
from ktransfer.cluster.engines import engine
from ktransfer.cluster.engines.device import device_engine
from ktransfer.cluster.engines.engine import Rows, faiss_engine
from ktransfer.cluster.engines.exact import exact_engine

ENGINES = {
    "faiss": faiss_engine,
    "faiss-float16": lambda: faiss_engine(float16=True),
    "exact": exact_engine,
    "exact without the extension": lambda: exact_engine(compiled=False),
    "exact as on a GPU": lambda: device_engine("cpu"),
}
KINDS = ("normal", "constant", "far", "half", "grid", "tiny")


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 200)


def made(seed, n, dim, copies, kind):
    data = np.random.default_rng(seed).normal(size=(n, dim))
    if kind == "constant":
        data[:, ::2] = -7.5
    elif kind == "far":
        data += 1e6
    elif kind == "half":
        data = np.clip(data * 4e4, -65504, 65504).astype(np.float16)
    elif kind == "grid":
        data = np.rint(data)
    elif kind == "tiny":  # down to the subnormal numbers of float16
        data = (data * 1e-6).astype(np.float16)
    return np.repeat(data, copies, axis=0).astype(np.float32)


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    dim=st.integers(1, 12),
    share=st.floats(0, 1),
    copies=st.integers(1, 3),
    kind=st.sampled_from(KINDS),
)
@example(seed=0, n=40, dim=5, share=1.0, copies=1, kind="normal")  # k = n
@example(seed=1, n=60, dim=8, share=0.2, copies=1, kind="far")
@example(seed=2, n=60, dim=8, share=0.2, copies=2, kind="half")
def test_every_iteration_is_that_of_scikit_learn(name, seed, n, dim, share, copies, kind):
    data = made(seed, n, dim, copies, kind)
    rows = Rows(len(data), dim, lambda start, stop: data[start:stop])
    k = 1 + round(share * (len(np.unique(data, axis=0)) - 1))
    start = random_rows(rows, k, seed)
    states = []
    found = kmeans(rows, k, 5, engine=ENGINES[name](), start=start, on_iteration=states.append)
    # Both are given the same points: moved in float64, where that is exact, as scikit-learn's products are not centred.
    middle = np.rint(data.mean(axis=0, dtype=np.float64))
    points = data - middle
    rounding = 2 * np.spacing(np.abs(data).max())
    compared = 0
    afterwards = [state.centroids for state in states]
    seen = [*((state.labels, state.objective[-1]) for state in states), (found.labels, found.final_objective)]
    for step, (centroids, (labels, objective)) in enumerate(zip([start, *afterwards], seen, strict=True)):
        centres = centroids - middle
        expected, squares = pairwise_distances_argmin_min(points, centres, metric="sqeuclidean")
        scale = np.square(points).sum(axis=1).max()
        own = np.square(points - centres[labels]).sum(axis=1)
        np.testing.assert_allclose(own, squares, rtol=1e-6, atol=1e-12 * scale)
        assert objective == pytest.approx(squares.sum(), rel=1e-6, abs=1e-12 * scale * len(data))
        near = np.sort(np.square(points[:, None] - centres).sum(axis=2), axis=1)
        if k > 1 and (near[:, 1] - near[:, 0]).min() <= 1e-9 * scale:
            continue  # a row is torn between two centroids
        np.testing.assert_array_equal(labels, expected)
        if step < len(states) and not found.empties[step]:
            peer = KMeans(k, init=centres, n_init=1, max_iter=1, tol=0).fit(points)
            np.testing.assert_allclose(afterwards[step] - middle, peer.cluster_centers_, atol=rounding)
            compared += 1
    assert compared or kind in ("grid", "far", "tiny") or dim < 3
    np.testing.assert_array_equal(found.counts, np.bincount(found.labels, minlength=k))
