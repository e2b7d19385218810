"""The cluster and assign stages against scikit-learn on the same rows, and their refusals."""

import csv
import json
import shutil

import h5py
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from ktransfer.artifacts.centroids import read_centroids
from ktransfer.artifacts.features import create_or_resume, open_features
from ktransfer.artifacts.labels import read_labels
from ktransfer.cluster import assign, cluster, extract
from ktransfer.cluster.algorithms import restarts
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError

OTHER = "scenes:images=24,size=48,seed=5"


def records(run, stage="clusters"):
    return json.loads((run / stage / "stage.json").read_text())


def feature_file(path, rows, valid, targets=None, **attributes):
    """A feature file of the user's own making."""
    count = len(rows)
    targets = np.full(count, -1, np.int32) if targets is None else targets
    said = {"teacher": "mine", "layer": "hog", "pooling": "none", "transform": "none", "fingerprint": "f"} | attributes
    keys = [f"{row:03d}.jpg" for row in range(count)]
    writer = create_or_resume(path, keys, targets, rows.shape[1], "float32", said)
    writer.write(0, rows, valid)
    writer.finish()
    return path


@pytest.fixture
def planted(tmp_path):
    """200 rows around 6 far centres, every 17th broken: path, rows, valid, class."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 6, 200).astype(np.int32)
    rows = (rng.normal(size=(6, 8))[classes] * 4 + rng.normal(size=(200, 8)) * 0.3 + 1).astype(np.float32)
    valid = np.arange(200) % 17 != 3
    return feature_file(tmp_path / "mine.h5", rows, valid, classes), rows, valid, classes


def table(run):
    with (run / "clusters" / "labels.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def prepared(rows, pca, normalise):
    """The rows as k-means should see them, by scikit-learn and float64."""
    rows = rows.astype(np.float64)
    if pca:
        rows = PCA(pca, svd_solver="full").fit_transform(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalise else rows


@pytest.mark.parametrize(("pca", "normalise"), [(0, True), (0, False), (3, True), (3, False)])
def test_clusters_and_labels_as_scikit_learn(tmp_path, planted, pca, normalise):
    path, rows, valid, classes = planted
    run = tmp_path / "run"
    file = cluster(run, features=str(path), k=10, pca=pca, normalise=normalise, iterations=60)
    labels_file = assign(run)
    seen = prepared(rows[valid], pca, normalise)
    made = read_centroids(file)
    dim = pca or 8
    assert made.centroids.shape == (10, dim)
    if pca:
        # The sign of a principal component is free: ours is turned to scikit-learn's.
        ours = (rows[valid] - made.projection.mean) @ made.projection.components
        theirs = PCA(pca, svd_solver="full").fit_transform(rows[valid].astype(np.float64))
        signs = np.sign((ours * theirs).sum(axis=0))
        np.testing.assert_allclose(ours * signs, theirs, atol=1e-3)
        centres = made.centroids * signs
    else:
        centres = made.centroids
    # Converged: a fixed point of scikit-learn's Lloyd, with the same labels and objective.
    peer = KMeans(10, init=centres.astype(np.float64), n_init=1, max_iter=50, tol=0).fit(seen)
    np.testing.assert_allclose(peer.cluster_centers_, centres, atol=1e-4)
    labels = read_labels(labels_file).labels
    np.testing.assert_array_equal(labels[valid], peer.labels_)
    assert (labels[~valid] == -1).all()
    with h5py.File(file) as stored:
        assert stored.attrs["final_objective"] == pytest.approx(peer.inertia_, rel=1e-3)
        np.testing.assert_array_equal(stored["counts"], np.bincount(peer.labels_, minlength=10))
    found = records(run)["cluster"]["result"]
    assert found["points"] == f"trained on {valid.sum()} of 200"
    sizes = np.bincount(peer.labels_, minlength=10)
    assert found["sizes"] == {"min": sizes.min(), "median": np.median(sizes), "max": sizes.max()}
    assert len(found["objective"]) == len(found["empties"]) == len(found["splits"]) <= 60
    assert found["objective"][-1] <= found["objective"][0]
    quality = records(run)["assign"]["result"]
    assert quality["rows"] == valid.sum()
    assert quality["compared"] == valid.sum()
    # Far blobs: every cluster lies within one class.
    assert quality["purity"] == pytest.approx(
        sum(np.bincount(classes[valid][peer.labels_ == c]).max() for c in range(10) if sizes[c]) / valid.sum()
    )
    assert not (run / "clusters" / "work").exists()


def test_label_files_agree_with_each_other(tmp_path, planted):
    path, rows, valid, _ = planted
    run = tmp_path / "run"
    file = cluster(run, features=str(path), k=6)
    assign(run)
    lines = table(run)
    assert [line["key"] for line in lines] == [f"{row:03d}.jpg" for row in range(200)]
    labels = np.array([int(line["label"]) for line in lines])
    np.testing.assert_array_equal(labels == -1, ~valid)
    centroids = read_centroids(file).centroids.astype(np.float64)
    unit = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    for row, line in enumerate(lines):
        if valid[row]:
            gaps = ((unit[row] - centroids) ** 2).sum(axis=1)
            assert int(line["label"]) == gaps.argmin()
            assert float(line["distance"]) == pytest.approx(gaps.min(), rel=1e-3, abs=1e-6)
        else:
            assert line["distance"] == ""
    words = np.fromfile(run / "clusters" / "labels.bin", "<i4")
    assert words[0] == 200
    np.testing.assert_array_equal(words[1:], labels)
    stored = read_labels(run / "clusters" / "labels.h5")
    np.testing.assert_array_equal(stored.labels, labels)
    assert stored.k == 6
    assert set(records(run)["assign"]["outputs"]) == {"labels.csv", "labels.h5", "labels.bin"}


def test_cluster_extracts_what_is_missing(run):
    cluster(run, k=5)
    made = open_features(run / "features" / "scenes.h5")
    assert made.attributes["layer"] == "conv4_1"
    assign(run)
    assert [line["key"] for line in table(run)] == list(open_dataset("scenes:images=40,size=48").keys)
    assert records(run)["assign"]["config"]["data"] == "scenes:images=40,size=48"
    assert {int(line["label"]) for line in table(run)} == set(range(5))


def test_broken_images_have_no_label_and_shift_no_row(run, folder):
    extract(run, data=str(folder), max_broken=0.1)
    cluster(run, data=str(folder), k=3)
    assign(run)
    lines = table(run)
    assert [line["key"] for line in lines] == list(open_dataset(str(folder)).keys)
    assert [place for place, line in enumerate(lines) if line["label"] == "-1"] == [5]
    assert records(run)["cluster"]["result"]["points"] == "trained on 23 of 24"


def test_too_many_clusters_are_refused_before_anything_is_made(run, planted, tmp_path):
    with pytest.raises(UsageError, match=r"--k 41: more clusters than the 40 images"):
        cluster(run, k=41)
    assert not (run / "features").exists()
    with pytest.raises(UsageError, match=f"--k 200: more clusters than the {planted[2].sum()} images"):
        cluster(tmp_path / "new", features=str(planted[0]), k=200)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pca": 9}, "--pca 9: the features have 8 numbers"),
        ({"k": 0}, "k"),
        ({"whiten": True}, "--whiten: needs the principal components"),
        ({"spherical": True, "normalise": False}, "--spherical: needs rows of length 1"),
        ({"start": "kmeans+"}, r"--start kmeans\+: no such file; did you mean 'kmeans\+\+'"),
        ({"start": "kmeans++", "start_sample": 3}, "--start-sample 3: fewer rows than the 4 clusters"),
        ({"start": "x.npy", "redo": 2}, "--redo, --stability and --views need different starts"),
    ],
)
def test_other_misuse(tmp_path, planted, options, words):
    with pytest.raises(UsageError, match=words):
        cluster(tmp_path / "new", features=str(planted[0]), **({"k": 4} | options))
    assert not (tmp_path / "new").exists()


def test_nan_and_duplicates_are_found_before(tmp_path):
    rows = np.ones((20, 4), np.float32)
    rows[:3] = np.arange(12).reshape(3, 4)
    path = feature_file(tmp_path / "twins.h5", rows, np.ones(20, bool))
    with pytest.raises(UsageError, match=r"k = 5.*4 of the 20 rows are distinct"):
        cluster(tmp_path / "run", features=str(path), k=5)
    with h5py.File(path, "r+") as file:
        file["features"][7, 2] = np.nan
    with pytest.raises(UsageError, match=r"NaN.*007\.jpg"):
        cluster(tmp_path / "run2", features=str(path), k=2)


def test_without_a_clustering(run):
    with pytest.raises(UsageError, match=r"cluster is missing; make it first.*cluster"):
        assign(run)
    assert not (run / "clusters").exists()


def test_another_data_set_of_the_same_name(run):
    cluster(run, k=5)
    before = (run / "features" / "scenes.h5").read_bytes()
    assign(run, data=OTHER)
    data = open_dataset(OTHER)
    assert [line["key"] for line in table(run)] == list(data.keys)
    assert (run / "features" / "scenes.h5").read_bytes() == before
    name = f"scenes-{data.fingerprint[:8]}"
    assert set(records(run, "features")) == {"scenes", name}
    assert records(run)["assign"]["config"]["features"] == str(run / "features" / f"{name}.h5")
    assign(run, data=OTHER)  # done before


def test_features_from_elsewhere_do_not_say_how_others_are_made(run, planted):
    cluster(run, features=str(planted[0]), k=5)
    with pytest.raises(UsageError, match=r"not extracted in this run.*--features"):
        assign(run, data=OTHER)
    assert not (run / "features").exists()


def test_another_data_set_is_extracted_alike_and_labelled(run, folder):
    extract(run, layer="conv3_1", pool=2, size=40, l2=True, dtype="float32")
    file = cluster(run, k=5)
    (folder / "a" / "05.jpg").unlink()
    assign(run, data=str(folder))
    first, second = records(run, "features")["scenes"]["config"], records(run, "features")["pics"]["config"]
    for name in ("layer", "pool", "size", "l2", "dtype", "teacher", "precision"):
        assert first[name] == second[name], name
    features = open_features(run / "features" / "pics.h5")
    centroids = read_centroids(file).centroids
    rows = features.rows / np.linalg.norm(features.rows, axis=1, keepdims=True)
    gaps = ((rows[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)
    lines = table(run)
    assert [line["key"] for line in lines] == list(open_dataset(str(folder)).keys)
    assert [int(line["label"]) for line in lines] == gaps.argmin(axis=1).tolist()
    made = records(run)["assign"]
    assert made["config"]["data"] == str(folder)
    assert made["inputs"]["features"] == records(run, "features")["pics"]["outputs"]["pics.h5"]["sha256"]
    # And back: it is another step now.
    with pytest.raises(UsageError, match=r"features changed.*assign --overwrite"):
        assign(run)
    assign(run, overwrite=True)
    assert len(table(run)) == 40


def test_another_data_set_with_a_teacher_of_its_own(run, folder, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    shutil.copy(run / "pretext" / "model.safetensors", weights)
    new = tmp_path / "new"
    extract(new, data="scenes:images=24,size=48", teacher=str(weights))
    cluster(new, k=4)
    (folder / "a" / "05.jpg").unlink()
    assign(new, data=str(folder))
    assert len(table(new)) == 23


@pytest.mark.parametrize("change", [{"teacher": "another"}, {"layer": "fc7"}, {"pooling": "mean"}, {"transform": "x"}])
def test_features_of_another_make_are_refused(tmp_path, planted, change):
    path, rows, valid, _ = planted
    run = tmp_path / "run"
    cluster(run, features=str(path), k=4)
    other = feature_file(tmp_path / "other.h5", rows, valid, **change)
    [(name, value)] = change.items()
    with pytest.raises(UsageError, match=f"{name} is '{value}', not") as caught:
        assign(run, features=str(other))
    assert "\n" not in str(caught.value)
    assert not (run / "clusters" / "labels.csv").exists()
    same = feature_file(tmp_path / "same.h5", rows[:50], valid[:50], fingerprint="another data set")
    assign(run, features=str(same))
    assert len(table(run)) == 50


def test_features_and_data_at_once(run):
    with pytest.raises(UsageError, match="both --features and --data"):
        assign(run, features="a.h5", data=OTHER)


def test_done_is_skipped_and_reclustering_makes_assign_ask(tmp_path, planted):
    path = planted[0]
    run = tmp_path / "run"
    file = cluster(run, features=str(path), k=6)
    labels = assign(run)
    before = file.read_bytes(), labels.read_bytes(), file.stat().st_mtime_ns, labels.stat().st_mtime_ns
    cluster(run, features=str(path), k=6)
    assign(run)
    assert before == (file.read_bytes(), labels.read_bytes(), file.stat().st_mtime_ns, labels.stat().st_mtime_ns)
    with pytest.raises(UsageError, match=r"k was 6, is 7.*cluster --overwrite"):
        cluster(run, features=str(path), k=7)
    cluster(run, features=str(path), k=7, overwrite=True)
    with pytest.raises(UsageError, match=r"centroids changed.*assign --overwrite"):
        assign(run)
    assert labels.read_bytes() == before[1]
    assign(run, overwrite=True)
    assert records(run)["assign"]["result"]["k"] == 7


def test_features_of_an_older_teacher_are_refused(run):
    from ktransfer.pretext import pretext

    cluster(run, k=4)
    options = {"arch": "vgg16_bn", "width": 0.05, "epochs": 1, "batch": 8, "permutations": 10}
    pretext(run, data="scenes:images=40,size=48", seed=1, overwrite=True, **options)
    with pytest.raises(UsageError, match=r"older teacher.*extract --overwrite"):
        cluster(run, k=4, overwrite=True)
    extract(run, overwrite=True)
    cluster(run, k=4, overwrite=True)


def test_several_feature_files(run, folder):
    extract(run, data=str(folder), max_broken=0.1)
    extract(run)
    cluster(run, k=3)
    assert records(run)["cluster"]["result"]["points"].endswith("of 40")
    extract(run, name="again", pool=2)
    with pytest.raises(UsageError, match=r"several feature files.*--features.*again\.h5.*scenes\.h5"):
        cluster(run, k=3)


def test_a_moved_run_still_labels(run, tmp_path):
    cluster(run, k=3)
    moved = tmp_path / "moved"
    run.rename(moved)
    assign(moved)
    assert len(table(moved)) == 40


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"redo": 3, "start": "kmeans++", "iterations": 3},
        {"redo": 3, "start": "kmeans-parallel", "min_size": 12, "spherical": True, "seed": 2, "iterations": 2},
    ],
)
def test_interrupted_clustering_gives_the_same_bytes(tmp_path, planted, monkeypatch, more):
    options = {"features": str(planted[0]), "k": 12, "pca": 4, "iterations": 5} | more
    save, stop, count = restarts.save_state, 0, 0

    def killed(path, state):
        nonlocal count
        save(path, state)
        count += 1
        if count == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(restarts, "save_state", killed)
    expected = cluster(tmp_path / "whole", **options).read_bytes()
    result = records(tmp_path / "whole")["cluster"]["result"]
    for stop in range(1, count + 1):
        count = 0
        run = tmp_path / f"killed{stop}"
        with pytest.raises(KeyboardInterrupt):
            cluster(run, **options)
        assert not (run / "clusters" / "clusters.h5").exists()
        assert cluster(run, **options).read_bytes() == expected
        assert not (run / "clusters" / "work").exists()
        again = records(run)["cluster"]["result"]
        assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_killed_again_and_again(tmp_path, planted, monkeypatch):
    options = {"features": str(planted[0]), "k": 12, "iterations": 3, "redo": 3}
    expected = cluster(tmp_path / "whole", **options).read_bytes()
    save, count = restarts.save_state, 0

    def killed(path, state):
        nonlocal count
        save(path, state)
        count += 1
        if count % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(restarts, "save_state", killed)
    for _ in range(40):
        try:
            file = cluster(tmp_path / "run", **options)
            break
        except KeyboardInterrupt:
            continue
    assert file.read_bytes() == expected


def test_redo_keeps_the_best(tmp_path, planted):
    options = {"features": str(planted[0]), "k": 9, "iterations": 4}
    alone = []
    for attempt in range(4):
        file = cluster(tmp_path / f"run{attempt}", seed=restarts.attempt_seed(3, attempt), **options)
        with h5py.File(file) as stored:
            alone.append((stored.attrs["final_objective"], stored["centroids"][:].tobytes()))
    assert len({objective for objective, _ in alone}) > 1
    best = min(range(4), key=lambda attempt: alone[attempt][0])
    file = cluster(tmp_path / "all", seed=3, redo=4, **options)
    with h5py.File(file) as stored:
        assert stored["attempts"][:].tolist() == [objective for objective, _ in alone]
        assert stored.attrs["attempt"] == best
        assert stored.attrs["final_objective"] == alone[best][0]
        assert stored["centroids"][:].tobytes() == alone[best][1]
        assert stored.attrs["seed"] == 3
    result = records(tmp_path / "all")["cluster"]["result"]
    assert result["attempts"] == [objective for objective, _ in alone]
    assert (result["attempt"], result["start"], len(result["seconds"])) == (best, "random", len(result["objective"]))
    counted = [records(tmp_path / f"run{attempt}")["cluster"]["result"]["bytes_read"] for attempt in range(4)]
    assert result["bytes_read"] == sum(counted)
    assert counted[0] == 4 * 8 * planted[2].sum() * 5


def test_spherical_clusters_are_labelled_by_cosine(tmp_path, planted):
    path, rows, valid, _ = planted
    file = cluster(tmp_path, features=str(path), k=7, spherical=True, iterations=40)
    assign(tmp_path)
    centroids = read_centroids(file).centroids.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    cosines = prepared(rows[valid], 0, True) @ centroids.T
    np.testing.assert_array_equal(
        read_labels(tmp_path / "clusters" / "labels.csv").labels[valid], cosines.argmax(axis=1)
    )
    for label, centroid in enumerate(centroids):
        mean = prepared(rows[valid], 0, True)[cosines.argmax(axis=1) == label].sum(axis=0)
        np.testing.assert_allclose(centroid, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_whitened_clusters_are_labelled_alike(tmp_path, planted, normalise):
    path, rows, valid, _ = planted
    file = cluster(tmp_path, features=str(path), k=7, pca=5, whiten=True, normalise=normalise, iterations=60)
    assign(tmp_path)
    made = read_centroids(file)
    seen = PCA(5, svd_solver="full", whiten=True).fit_transform(rows[valid].astype(np.float64))
    seen *= np.sqrt(valid.sum() / (valid.sum() - 1))
    ours = (rows[valid] - made.projection.mean) @ made.projection.components * made.projection.scale
    seen *= np.sign((ours * seen).sum(axis=0))
    np.testing.assert_allclose(ours, seen, atol=1e-3)
    if normalise:
        seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    gaps = ((seen[:, None] - made.centroids[None].astype(np.float64)) ** 2).sum(axis=2)
    np.testing.assert_array_equal(read_labels(tmp_path / "clusters" / "labels.csv").labels[valid], gaps.argmin(axis=1))


def test_a_pca_from_before_there_was_whitening_is_read(tmp_path, planted):
    file = cluster(tmp_path, features=str(planted[0]), k=7, pca=5)
    before = read_centroids(file)
    with h5py.File(file, "r+") as stored:
        del stored["pca/scale"]
    again = read_centroids(file)
    for mine, theirs in zip(again.projection, before.projection, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_no_cluster_is_smaller_than_asked(tmp_path, planted):
    cluster(tmp_path, features=str(planted[0]), k=12, min_size=12)
    assign(tmp_path)
    labels = read_labels(tmp_path / "clusters" / "labels.h5")
    result = records(tmp_path)["cluster"]["result"]
    sizes = np.bincount(labels.labels[planted[2]], minlength=labels.k)
    assert labels.k == 12 - result["dissolved"]
    assert sizes.min() >= 12
    assert result["sizes"]["min"] == sizes.min()
    with pytest.raises(UsageError, match=r"--min-size 40: 12 clusters .* 480 rows, there are 188"):
        cluster(tmp_path / "new", features=str(planted[0]), k=12, min_size=40)
    assert not (tmp_path / "new").exists()


def test_start_from_a_file(tmp_path, planted):
    path, rows, valid, _ = planted
    centres = np.random.default_rng(0).normal(size=(6, 8))
    np.save(tmp_path / "centres.npy", centres)
    options = {"features": str(path), "k": 6, "iterations": 30}
    file = cluster(tmp_path / "run", start=str(tmp_path / "centres.npy"), **options)
    seen = prepared(rows[valid], 0, True)
    peer = KMeans(6, init=centres, n_init=1, max_iter=1, tol=0).fit(seen)
    result = records(tmp_path / "run")["cluster"]
    gaps = ((seen[:, None] - centres[None]) ** 2).sum(axis=2)
    assert result["result"]["objective"][0] == pytest.approx(gaps.min(axis=1).sum(), rel=1e-5)
    assert peer.inertia_ >= result["result"]["objective"][-1] * (1 - 1e-6)
    assert result["result"]["start"].startswith("file of SHA-256 ")
    with h5py.File(file) as stored:
        assert stored.attrs["start"] == f"file of SHA-256 {result['inputs']['start']}"
    # A clustering of ours goes on where it ended.
    more = cluster(tmp_path / "more", start=str(file), **options)
    np.testing.assert_allclose(read_centroids(more).centroids, read_centroids(file).centroids, atol=1e-6)
    np.save(tmp_path / "centres.npy", centres + 1)
    with pytest.raises(UsageError, match="start changed"):
        cluster(tmp_path / "run", start=str(tmp_path / "centres.npy"), **options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.zeros((5, 8)), r"float64 of shape \(5, 8\), must be floats of shape \(6, 8\)"),
        (np.zeros((6, 7)), r"shape \(6, 7\)"),
        (np.zeros(48), r"shape \(48,\)"),
        (np.zeros((6, 8), int), "int64 of shape"),
        (np.full((6, 8), np.nan), "NaN"),
        (np.full((6, 8), 1e300), "beyond float32"),
        (np.array([{}], object), "not a .npy file"),
        (b"text", "not a .npy file"),
        (b"", "not a .npy file"),
        (None, "no such file; valid: kmeans"),
    ],
)
def test_a_start_that_does_not_fit(tmp_path, planted, content, words):
    file = tmp_path / "start.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content)
    with pytest.raises(UsageError, match=words) as caught:
        cluster(tmp_path / "new", features=str(planted[0]), k=6, start=str(file))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_clustering_of_other_preparation_is_no_start(tmp_path, planted):
    options = {"features": str(planted[0]), "k": 6}
    turned = cluster(tmp_path / "pca", pca=8, **options)
    with pytest.raises(UsageError, match="its own PCA"):
        cluster(tmp_path / "new", start=str(turned), **options)
    long = cluster(tmp_path / "long", normalise=False, **options)
    with pytest.raises(UsageError, match="made without --normalise"):
        cluster(tmp_path / "new", start=str(long), **options)
