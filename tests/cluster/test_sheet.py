"""The sheet shows the images that it should, in their order, as they are; and the stage writes it and the record."""

import json

import h5py
import numpy as np
import pytest
from PIL import Image

from ktransfer.artifacts.features import create_or_resume, open_features
from ktransfer.cluster import assign, cluster, extract
from ktransfer.cluster.algorithms import restarts as module
from ktransfer.cluster.sheet import NEAREST, nearest_members, save_sheet, spread_of_sizes
from ktransfer.data.opening import open_dataset
from ktransfer.data.sheets import BLANK as _BLANK
from ktransfer.data.sheets import GAP, MARGIN, SIDE, TEXT
from ktransfer.data.sheets import PAPER as _PAPER
from ktransfer.images.decoding import square

SCENES = "scenes:images=40,size=48"
STEP = TEXT + SIDE + MARGIN


def cell(sheet, row, column):
    top, left = MARGIN + row * STEP + TEXT, MARGIN + column * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


def shown(data, place):
    return square(data.read(place, SIDE), SIDE)


def test_clusters_from_the_largest_to_the_smallest():
    sizes = np.array([5, 0, 9, 5, 1, 7])
    assert spread_of_sizes(sizes, 12) == [2, 5, 0, 3, 4]
    assert spread_of_sizes(sizes, 3) == [2, 0, 4]
    assert spread_of_sizes(sizes, 2) == [2, 4]
    assert spread_of_sizes(sizes, 1) == [2]
    assert spread_of_sizes(np.array([3]), 4) == [0]


def test_nearest_members_in_order():
    labels = np.array([1, 0, 1, 1, 0, 1], np.int32)
    far = np.array([0.5, 0.0, 0.2, 0.5, 0.1, 0.0], np.float32)
    assert nearest_members(labels, far, 1).tolist() == [5, 2, 0, 3]
    assert nearest_members(labels, far, 1, 2).tolist() == [5, 2]


def test_a_sheet_holds_the_nearest_images(tmp_path):
    """30 images in one cluster, 3 in another, none in a third; every seventh image was not clustered."""
    data = open_dataset(SCENES)
    places = np.array([place for place in range(40) if place % 7][:33])
    labels = np.array([2] * 30 + [0] * 3, np.int32)
    distances = np.random.default_rng(0).random(33).astype(np.float32)
    for name in ("one.png", "two.png"):
        save_sheet(tmp_path / name, data, places, labels, distances, 3, 5)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "one.png"))
    assert sheet.shape == (2 * STEP + MARGIN, 2 * MARGIN + NEAREST * (SIDE + GAP) - GAP, 3)
    for row, label, most in ((0, 2, 16), (1, 0, 3)):
        ranked = sorted(np.flatnonzero(labels == label).tolist(), key=lambda member: distances[member])[:most]
        for column, member in enumerate(ranked):
            np.testing.assert_array_equal(cell(sheet, row, column), shown(data, places[member]))
        for column in range(most, NEAREST):
            assert (cell(sheet, row, column) == _PAPER).all()
        caption = sheet[MARGIN + row * STEP : MARGIN + row * STEP + TEXT]
        assert (caption != 255).any()


def test_an_unreadable_image_is_grey(tmp_path, folder):
    data = open_dataset(str(folder))
    labels, distances = np.zeros(24, np.int32), np.arange(24, dtype=np.float32)
    save_sheet(tmp_path / "sheet.png", data, np.arange(24), labels, distances, 1, 4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (cell(sheet, 0, 5) == _BLANK).all()
    np.testing.assert_array_equal(cell(sheet, 0, 6), shown(data, 6))


def made(run):
    return {path.name: path.read_bytes() for path in (run / "clusters").iterdir() if path.name != "stage.json"}


def outputs(run):
    return set(json.loads((run / "clusters" / "stage.json").read_text())["cluster"]["outputs"])


def test_the_stage_draws_the_rows_that_are_nearest(run, folder):
    """Through broken images, the whole way: features, labels and distances as `assign` writes them."""
    extract(run, data=str(folder), max_broken=0.1)
    file = cluster(run, data=str(folder), k=3, normalise=False, sheet=3)
    assert outputs(run) == {"clusters.h5", "quality.json", "clusters.png"}
    features, data = open_features(run / "features" / "pics.h5"), open_dataset(str(folder))
    with h5py.File(file) as stored:
        centroids = stored["centroids"][:].astype(np.float64)
    gaps = ((features.rows[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)
    nearest, far = gaps.argmin(axis=1), gaps.min(axis=1)
    nearest[5] = -1
    sheet = np.asarray(Image.open(run / "clusters" / "clusters.png"))
    sizes = np.bincount(nearest[nearest >= 0], minlength=3)
    for row, label in enumerate(np.argsort(-sizes, kind="stable")):
        members = np.flatnonzero(nearest == label)
        for column, place in enumerate(members[np.argsort(far[members])][:NEAREST]):
            np.testing.assert_array_equal(cell(sheet, row, column), shown(data, place))
    record = json.loads((run / "clusters" / "quality.json").read_text())
    assert (record["rows"], record["k"], record["stability"]) == (23, 3, None)
    assert sum(record["sizes"]["histogram"].values()) == 3


def test_clusters_do_not_depend_on_how_they_are_evaluated(run, tmp_path, capsys):
    file = cluster(run, k=5)
    first = made(run)
    said = capsys.readouterr().err
    assert "cluster: silhouette" in said and "no image sheet" not in said
    cluster(run, k=5, overwrite=True)
    assert made(run) == first
    cluster(run, k=5, overwrite=True, stability=True, quality_rows=7, sheet=0)
    assert file.read_bytes() == first["clusters.h5"]
    assert outputs(run) == {"clusters.h5", "quality.json"}
    assert not (run / "clusters" / "clusters.png").exists()
    record = json.loads((run / "clusters" / "quality.json").read_text())
    assert record["sampled"] == 7
    assert -0.5 <= record["stability"]["ari"] <= 1
    assert "agreement with seed" in capsys.readouterr().err
    assign(run)


@pytest.mark.parametrize("kind", ["unknown", "gone", "others"])
def test_without_the_images_there_is_a_line_and_no_sheet(tmp_path, kind, capsys):
    path = tmp_path / "mine.h5"
    said = {"teacher": "mine", "layer": "hog", "pooling": "none", "transform": "none", "fingerprint": "f"}
    writer = create_or_resume(path, [f"{row}.jpg" for row in range(20)], np.full(20, -1, np.int32), 4, "float32", said)
    writer.write(0, np.random.default_rng(0).random((20, 4)).astype(np.float32), np.ones(20, bool))
    writer.finish()
    options = {"unknown": {}, "gone": {"data": str(tmp_path / "gone")}, "others": {"data": SCENES}}[kind]
    words = {"unknown": "name them with --data", "gone": "does not exist", "others": "was not made of the images"}[kind]
    cluster(tmp_path / "run", features=str(path), k=3, **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if "no image sheet" in line]
    assert len(lines) == 1 and words in lines[0]
    assert outputs(tmp_path / "run") == {"clusters.h5", "quality.json"}
    assert "clusters.png" not in made(tmp_path / "run")


def test_killed_in_the_second_clustering_gives_the_same_bytes(run, tmp_path, monkeypatch):
    options = {"k": 6, "iterations": 6, "stability": True, "sheet": 2, "data": SCENES, "features": str(extract(run))}
    cluster(tmp_path / "whole", **options)
    assert Image.open(tmp_path / "whole" / "clusters" / "clusters.png").height == 2 * STEP + MARGIN
    save = module.save_state

    def killed(path, state):
        save(path, state)
        if path.name == "stability.npz" and len(state.objective) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save_state", killed)
        cluster(tmp_path / "killed", **options)
    cluster(tmp_path / "killed", **options)
    assert made(tmp_path / "killed") == made(tmp_path / "whole")
