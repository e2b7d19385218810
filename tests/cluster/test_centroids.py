"""`clusters.h5`: what is written comes back, the same bytes each time, and other files are refused."""

import h5py
import numpy as np
import pytest

from ktransfer.artifacts.centroids import project, read_centroids
from ktransfer.artifacts.features import Features
from ktransfer.cluster.algorithms.lloyd import kmeans
from ktransfer.cluster.centroids import write_centroids
from ktransfer.cluster.engines.engine import Rows
from ktransfer.cluster.projection import fit_projection
from ktransfer.errors import UsageError

SOURCE = {"teacher": "ab" * 32, "layer": "conv4_3", "pooling": "max 4x4", "transform": "ü"}
DATA = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)


def made(tmp_path):
    attributes = SOURCE | {"fingerprint": "not kept", "schema": 1}
    return Features(tmp_path / "f.h5", DATA, np.ones(60, bool), np.zeros(60, np.int32), attributes)


def clustering(data, total=None):
    rows = Rows(len(data), data.shape[1], lambda start, stop: data[start:stop])
    return kmeans(rows, 5, 10, seed=7, points_total=total)


@pytest.mark.parametrize("pca", [0, 3])
@pytest.mark.parametrize("normalise", [True, False])
def test_what_is_written_is_read(tmp_path, pca, normalise):
    features = made(tmp_path)
    projection = fit_projection(features, pca) if pca else None
    data = project(projection, DATA) if projection else DATA
    found = clustering(data, total=63)
    path = tmp_path / "clusters.h5"
    write_centroids(path, found, projection, normalise, features)
    read = read_centroids(path)
    np.testing.assert_array_equal(read.centroids, found.centroids)
    assert read.normalise is normalise
    assert read.source == SOURCE
    if projection is None:
        assert read.projection is None
    else:
        for mine, theirs in zip(read.projection, projection, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["counts"], found.counts)
        assert file["counts"][:].sum() == 60
        for name in ("objective", "empties", "splits", "moved"):
            assert file[name][:].tolist() == getattr(found, name)
        assert file.attrs["points"] == "trained on 60 of 63"
        assert file.attrs["seed"] == 7
        assert file.attrs["final_objective"] == found.final_objective
        assert file.attrs["engine"].startswith("faiss")
        assert file.attrs["version"]
    first = path.read_bytes()
    write_centroids(path, clustering(data, total=63), projection, normalise, features)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["clusters.h5"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "clusters.h5"
    write_centroids(path, clustering(DATA), None, True, made(tmp_path))
    whole = path.read_bytes()

    def refused(words):
        with pytest.raises(UsageError, match=words) as caught:
            read_centroids(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = 2
    refused("schema 2")
    for name in ("centroids",):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            del file[name]
        refused("ktransfer cluster")
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        del file.attrs["layer"]
    refused("ktransfer cluster")
    for content in (b"", b"text", whole[:1000]):
        path.write_bytes(content)
        refused("not a clustering")
    path.unlink()
    refused("not a clustering")
