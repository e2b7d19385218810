"""The streaming PCA against scikit-learn's."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from ktransfer.artifacts.centroids import project
from ktransfer.artifacts.features import Features
from ktransfer.cluster import projection as module
from ktransfer.cluster.projection import fit_projection
from ktransfer.errors import UsageError


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 700)


def features_of(data, valid=None):
    valid = np.ones(len(data), bool) if valid is None else valid
    return Features(Path("train.h5"), data, valid, np.zeros(len(data), np.int32), {})


def sample(offset=0.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(600, 12))
    # Sorted along the first direction, so that no block has the mean of all.
    spread = spread[spread[:, 0].argsort()] * [9, 5, 3, 2, 1.5, 1, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05]
    return (spread @ np.linalg.qr(rng.normal(size=(12, 12)))[0] + offset).astype(dtype)


@pytest.mark.parametrize(("offset", "dtype"), [(0.0, np.float32), (0.0, np.float16), (1e3, np.float32)])
@pytest.mark.parametrize("dim", [1, 4, 8])
def test_same_as_scikit_learn(offset, dtype, dim):
    data = sample(offset, dtype)
    valid = np.arange(600) % 7 != 3
    data[~valid] = 99
    found = fit_projection(features_of(data, valid), dim)
    kept = data[valid].astype(np.float64)
    peer = PCA(dim, svd_solver="full").fit(kept)
    signs = np.sign((found.components * peer.components_.T).sum(axis=0))
    np.testing.assert_allclose(found.components * signs, peer.components_.T, atol=2e-3)
    np.testing.assert_allclose(found.mean, peer.mean_, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.explained, peer.explained_variance_ratio_, rtol=1e-3)
    np.testing.assert_allclose(found.components.T @ found.components, np.eye(dim), atol=1e-5)
    mapped = project(found, data[valid].astype(np.float32))
    np.testing.assert_allclose(mapped * signs, peer.transform(kept), atol=2e-2 if offset else 5e-3)
    assert (found.mean.dtype, found.components.dtype, mapped.dtype) == (np.float32,) * 3


def test_signs_and_bytes_are_fixed():
    found, again = (fit_projection(features_of(sample()), 5) for _ in range(2))
    assert (found.components[np.abs(found.components).argmax(axis=0), np.arange(5)] > 0).all()
    assert found.components.tobytes() == again.components.tobytes()
    flipped = fit_projection(features_of(-sample()), 5)
    np.testing.assert_allclose(flipped.components, found.components, atol=1e-4)


def test_constant_rows_explain_nothing():
    found = fit_projection(features_of(np.full((9, 3), 2.0, np.float32)), 2)
    assert found.explained.tolist() == [0, 0]
    assert np.isfinite(found.components).all()


@pytest.mark.parametrize(("dim", "valid"), [(0, 600), (13, 600), (5, 5), (8, 6)])
def test_impossible_dimensions_are_refused(dim, valid):
    with pytest.raises(UsageError, match=f"--pca {dim} must be"):
        fit_projection(features_of(sample(), np.arange(600) < valid), dim)


@pytest.mark.parametrize(("offset", "dtype"), [(0.0, np.float32), (0.0, np.float16), (1e3, np.float32)])
def test_whitened_columns_have_variance_1(offset, dtype):
    data = sample(offset, dtype)
    features = features_of(data)
    plain, found = fit_projection(features, 8), fit_projection(features, 8, whiten=True)
    for name in ("mean", "components", "explained"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(found, name))
    np.testing.assert_array_equal(plain.scale, np.ones(8))
    mapped = project(found, data.astype(np.float32)).astype(np.float64)
    np.testing.assert_allclose(np.cov(mapped.T, bias=True), np.eye(8), atol=2e-3)
    peer = PCA(8, svd_solver="full", whiten=True).fit(data.astype(np.float64))
    theirs = peer.transform(data.astype(np.float64)) * np.sqrt(600 / 599)
    signs = np.sign((mapped * theirs).sum(axis=0))
    np.testing.assert_allclose(mapped * signs, theirs, atol=1e-2)
    assert project(found, data.astype(np.float32)).dtype == found.scale.dtype == np.float32


def test_what_does_not_vary_is_not_whitened():
    data = sample()
    data[:, 3:] = data[:, :1]
    with pytest.raises(UsageError, match=r"--whiten: only 3 of 5 components vary; give --pca 3"):
        fit_projection(features_of(data), 5, whiten=True)
    assert np.isfinite(fit_projection(features_of(data), 3, whiten=True).scale).all()
    with pytest.raises(UsageError, match="only 0 of 2"):
        fit_projection(features_of(np.full((9, 3), 2.0, np.float32)), 2, whiten=True)
