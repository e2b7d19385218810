"""`cluster --algorithm` and `assign --balanced`: from features to files, killed and resumed, misused."""

import json
import resource

import h5py
import numpy as np
import pytest

from ktransfer import cli, files
from ktransfer.artifacts.centroids import read_centroids
from ktransfer.artifacts.features import create_or_resume
from ktransfer.artifacts.labels import read_labels
from ktransfer.cluster import assign, cluster
from ktransfer.cluster.algorithms import initialisation, lloyd, minibatch, restarts, two_level
from ktransfer.cluster.engines import choose
from ktransfer.errors import UsageError


@pytest.fixture
def features(tmp_path):
    """200 rows of 6 numbers in uneven blobs, every 17th broken."""
    rng = np.random.default_rng(0)
    classes = rng.choice(4, 200, p=[0.7, 0.1, 0.1, 0.1])
    rows = (rng.normal(size=(4, 6))[classes] * 4 + rng.normal(size=(200, 6))).astype(np.float32)
    said = {"teacher": "mine", "layer": "hog", "pooling": "none", "transform": "none", "fingerprint": "f"}
    keys = [f"{row:03d}.jpg" for row in range(200)]
    writer = create_or_resume(tmp_path / "mine.h5", keys, np.full(200, -1, np.int32), 6, "float32", said)
    writer.write(0, rows, np.arange(200) % 17 != 3)
    writer.finish()
    return tmp_path / "mine.h5"


CHOICES = (
    {"algorithm": "two-level"},
    {"algorithm": "two-level", "refine": 2, "stability": True},
    {"algorithm": "minibatch", "batch_rows": 50},
    {"algorithm": "minibatch", "batch_rows": 50, "redo": 2, "start": "kmeans++"},
)


@pytest.mark.parametrize("options", CHOICES)
def test_from_features_to_labels_killed_after_every_state(tmp_path, features, monkeypatch, options):
    settings = {"features": str(features), "k": 20, "iterations": 3, "sheet": 0} | options
    expected = cluster(tmp_path / "whole", **settings)

    class Killed(BaseException):
        pass

    def cut(module):
        save = module.save_state

        def once(path, state):
            save(path, state)
            if not path.stem.endswith("best"):  # that one is made again until the next attempt has begun
                raise Killed

        monkeypatch.setattr(module, "save_state", once)

    cut(two_level)
    cut(restarts)
    killed, file = 0, None
    while file is None:
        try:
            file = cluster(tmp_path / "cut", **settings)
        except Killed:
            killed += 1
            assert killed < 40
    assert killed >= 4
    assert file.read_bytes() == expected.read_bytes()
    assert not (tmp_path / "cut" / "clusters" / "work").exists()
    made = read_centroids(file)
    assert made.centroids.shape == (20, 6)
    labels = read_labels(assign(tmp_path / "cut")).labels
    with h5py.File(file) as stored:
        np.testing.assert_array_equal(stored["counts"], np.bincount(labels[labels >= 0], minlength=20))
        assert stored["counts"][:].min() > 0


@pytest.mark.parametrize("algorithm", ["lloyd", "two-level", "minibatch"])
def test_a_full_disk_keeps_the_last_state_and_room_is_all_that_it_takes(tmp_path, features, capsys, algorithm):
    """No file but small ones can be written from the second state on."""
    words = ["cluster", "--features", str(features), "--k", "20", "--algorithm", algorithm, "--sheet", "0"]
    assert cli.main(["--run", str(tmp_path / "whole"), *words]) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = []

    def filling(path, write):
        saved.append(path)
        if len(saved) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        files.write_whole(path, write)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lloyd, "write_whole", filling)
        try:
            assert cli.main(["--run", str(tmp_path / "full"), *words]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("ktransfer: ")]
    assert len(said) == 1 and "File too large" in said[0] and "give the same command again" in said[0]
    lloyd.load_state(saved[0])
    assert (
        not list((tmp_path / "full").rglob("*.part")) and not (tmp_path / "full" / "clusters" / "clusters.h5").exists()
    )
    assert cli.main(["--run", str(tmp_path / "full"), *words]) == 0
    assert "goes on where it stopped" in capsys.readouterr().err
    made = [(tmp_path / name / "clusters" / "clusters.h5").read_bytes() for name in ("whole", "full")]
    assert made[0] == made[1]


def forbidden(*given, **named):
    raise AssertionError("an engine that was not asked for")


@pytest.mark.parametrize("options", [CHOICES[1], CHOICES[3]], ids=["two-level", "minibatch"])
def test_the_engine_that_is_named_does_all_of_the_work(tmp_path, features, monkeypatch, capsys, options):
    settings = {"features": str(features), "k": 20, "iterations": 3, "sheet": 0} | options
    made = {}
    for name, others in (("faiss", ("exact_engine",)), ("exact", ("faiss_engine",)), ("auto", ())):
        with monkeypatch.context() as patch:
            for module in (choose, two_level, minibatch, lloyd, initialisation):
                for other in others:
                    if hasattr(module, other):
                        patch.setattr(module, other, forbidden)
            file = cluster(tmp_path / name, engine=name, **settings)
        with h5py.File(file) as stored:
            made[name] = stored["centroids"][:], stored["counts"][:], stored.attrs["engine"]
        step = json.loads((tmp_path / name / "clusters" / "stage.json").read_text())["cluster"]
        assert step["result"]["engine"].startswith(made[name][2])
        parts = made[name][2].split(" by ")[1]
        assert parts.startswith("exact" if name == "exact" else "faiss") and parts.endswith(")")
        assert f"by {parts.partition(' (')[0]}, passes over all rows by" in capsys.readouterr().err
        np.testing.assert_allclose(made[name][0], made["faiss"][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(made[name][1], made["faiss"][1])


def test_balanced_labels(tmp_path, features, capsys):
    run = tmp_path / "run"
    cluster(run, features=str(features), k=7, iterations=3, sheet=0)
    plain = read_labels(assign(run)).labels
    step = json.loads((run / "clusters" / "stage.json").read_text())
    assert step["assign"]["result"]["engine"].startswith(step["cluster"]["result"]["engine"].partition(", ")[0])
    with pytest.raises(UsageError, match="balanced was False, is True"):
        assign(run, balanced=True)
    with pytest.raises(UsageError, match=r"--balanced: .* without an engine; leave --engine exact out"):
        assign(run, balanced=True, engine="exact", overwrite=True)
    capsys.readouterr()
    labels = read_labels(assign(run, balanced=True, overwrite=True)).labels
    said = capsys.readouterr().err
    assert "assign: memory" in said and "engine" not in said
    np.testing.assert_array_equal(labels == -1, np.arange(200) % 17 == 3)
    rows = int((labels >= 0).sum())
    assert set(np.bincount(labels[labels >= 0], minlength=7)) == {rows // 7, rows // 7 + 1}
    assert np.bincount(plain[plain >= 0], minlength=7).max() > rows // 7 + 1
    result = json.loads((run / "clusters" / "stage.json").read_text())["assign"]["result"]
    assert (result["min"], result["max"]) == (rows // 7, rows // 7 + 1)
    assert result["engine"] == f"balanced, products by numpy {np.__version__}"
    assert 0 < result["least cost possible"] <= result["cost"] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"refine": 3}, "lloyd: has no --refine"),
        ({"batch_rows": 9}, "lloyd: has no --batch-rows"),
        ({"algorithm": "two-level", "redo": 2}, "two-level: has no --redo"),
        ({"algorithm": "two-level", "start": "kmeans++"}, "two-level: has no --start"),
        ({"algorithm": "minibatch", "min_size": 2}, "minibatch: has no --min-size"),
        ({"algorithm": "minibatch", "refine": 1}, "minibatch: has no --refine"),
        ({"algorithm": "mini"}, "must be one of lloyd, two-level, minibatch"),
    ],
)
def test_settings_that_an_algorithm_does_not_have(tmp_path, features, options, words):
    with pytest.raises(UsageError, match=words):
        cluster(tmp_path / "run", features=str(features), k=7, **options)
    assert not (tmp_path / "run").exists()
