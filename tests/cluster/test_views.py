"""Several clusterings of the same features: what they see, that each is k-means, and that a kill loses none."""

import csv

import numpy as np
import pytest
from sklearn.cluster import KMeans

from ktransfer.artifacts.centroids import nearest, read_centroids
from ktransfer.artifacts.features import open_features
from ktransfer.artifacts.labels import read_labels
from ktransfer.cluster import assign, cluster, extract, stage, views
from ktransfer.errors import UsageError

SCENES = "scenes:images=80,size=48"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    extract(folder, data=SCENES, teacher="hog", size=48)
    cluster(folder, k=8, views=5, iterations=50)
    assign(folder)
    return folder


def rows(run):
    (path,) = (run / "features").glob("*.h5")
    return np.asarray(open_features(path).rows, np.float32)


def test_each_has_its_own_number_of_clusters_and_directions(run):
    made = [read_centroids(path) for path in views.made_views(run / "clusters")]
    assert [len(view.centroids) for view in made] == [2, 4, 8, 16]
    columns = rows(run).shape[1]
    axes = [view.projection.components for view in made]
    assert all(part.shape == (columns, columns // 8) for part in axes)
    for part in axes:
        np.testing.assert_allclose(part.T @ part, np.eye(columns // 8), atol=1e-5)
        np.testing.assert_allclose(made[0].projection.mean, rows(run).mean(axis=0), atol=1e-4)
    assert abs(axes[0].T @ axes[1]).max() < 0.9  # others
    assert not (run / "clusters" / "work").exists()


def test_each_is_a_k_means_of_what_it_sees(run):
    for path in views.made_views(run / "clusters"):
        made = read_centroids(path)
        seen = (rows(run) - made.projection.mean) @ made.projection.components
        seen /= np.linalg.norm(seen, axis=1, keepdims=True)
        theirs = KMeans(len(made.centroids), init=made.centroids, n_init=1, max_iter=1).fit(seen)
        np.testing.assert_allclose(theirs.cluster_centers_, made.centroids, atol=1e-4)  # it had ended


def test_the_first_is_what_it_is_alone(run, tmp_path):
    (path,) = (run / "features").glob("*.h5")
    alone = cluster(tmp_path, features=str(path), k=8, iterations=50)
    assert alone.read_bytes() == (run / "clusters" / "clusters.h5").read_bytes()


def test_the_same_is_not_said_for_each(run, tmp_path, capsys):
    (path,) = (run / "features").glob("*.h5")
    cluster(tmp_path, features=str(path), k=8, views=5, iterations=2)
    assign(tmp_path)
    said = capsys.readouterr().err
    assert said.count("cluster: memory: ") == said.count("assign: memory: ") == 1
    assert said.count("k-means engine: ") == 2 and said.count("clustering") >= 4


def test_labels_of_all_are_columns_of_one_file(run):
    with (run / "clusters" / "labels.csv").open(newline="") as handle:
        header = next(csv.reader(handle))
    assert header == ["key", "label", "distance", "label_2", "label_3", "label_4", "label_5"]
    found = [read_labels(run / "clusters" / f"labels.{suffix}") for suffix in ("csv", "h5")]
    assert np.array_equal(found[0].more, found[1].more) and found[0].more.shape == (80, 4)
    for place, path in enumerate(views.made_views(run / "clusters")):
        assert np.array_equal(found[0].more[:, place], nearest(read_centroids(path), rows(run)))


def test_a_kill_between_two_of_them_loses_none(run, tmp_path, monkeypatch):
    (path,) = (run / "features").glob("*.h5")
    real, made = stage._view, []

    def stopping(config, features, pca, view, *rest):
        if view.number == 4 and not made:
            made.append(view)
            raise KeyboardInterrupt
        real(config, features, pca, view, *rest)

    monkeypatch.setattr(stage, "_view", stopping)
    with pytest.raises(KeyboardInterrupt):
        cluster(tmp_path, features=str(path), k=8, views=5, iterations=50)
    kept = [file.stat().st_mtime_ns for file in views.made_views(tmp_path / "clusters")]
    assert len(kept) == 2
    cluster(tmp_path, features=str(path), k=8, views=5, iterations=50)
    found = views.made_views(tmp_path / "clusters")
    assert [file.stat().st_mtime_ns for file in found[:2]] == kept
    assert [file.read_bytes() for file in found] == [file.read_bytes() for file in views.made_views(run / "clusters")]


def test_fewer_views_leave_none_behind(run, tmp_path):
    (path,) = (run / "features").glob("*.h5")
    cluster(tmp_path, features=str(path), k=8, views=3)
    with pytest.raises(UsageError, match="views was 3, is 1"):
        cluster(tmp_path, features=str(path), k=8)
    cluster(tmp_path, features=str(path), k=8, overwrite=True)
    assert not views.made_views(tmp_path / "clusters")
    assign(tmp_path)
    assert not read_labels(tmp_path / "clusters" / "labels.h5").more.size


def test_the_largest_must_fit(tmp_path, run):
    (path,) = (run / "features").glob("*.h5")
    with pytest.raises(UsageError, match=r"--views 5: one of them has 100 clusters, more than the 80 images"):
        cluster(tmp_path, features=str(path), k=50, views=5)
