"""Held-out pseudo-labels against the ones that `assign` gives, and the network's predictions against its own by
hand."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ktransfer import networks
from ktransfer.artifacts.labels import read_labels
from ktransfer.cli import main
from ktransfer.data import scenes
from ktransfer.data.opening import open_dataset, open_splits
from ktransfer.errors import UsageError
from ktransfer.eval import evaluate
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.protocols import clusters, heldout
from ktransfer.images.decoding import square

SCENES = "scenes:images=60,size=48"
TINY = ["--width", "0.1", "--epochs", "1", "--batch", "8", "--precision", "float32"]
CPU = torch.device("cpu")
CONFIG = EvalConfig(precision="float32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole chain in small, its features after a PCA."""
    folder = tmp_path_factory.mktemp("heldout") / "run"
    line = ["--run", str(folder), "pretext", "--data", SCENES, "--arch", "vgg16_bn", *TINY, "--permutations", "8"]
    line += ["extract", "--precision", "float32", "cluster", "--k", "5", "--pca", "6"]
    line += ["retrain", "--arch", "alexnet_bn", "--stride", "2", *TINY]
    assert main(line) == 0
    return folder


@pytest.fixture(scope="module")
def test_split():
    return open_splits(SCENES)[1]


def arm_of(run):
    weights = run / "retrain" / "model.safetensors"
    return Arm("run", networks.trunk(networks.describe(weights)), weights)


def test_labels_are_those_of_assign(run, tmp_path):
    spec = "scenes:images=60,size=48,seed=1"
    data = open_dataset(spec)
    labels = heldout.heldout_labels(heldout.find_source(arm_of(run), data), data, CONFIG, CPU)
    shutil.copytree(run / "clusters", tmp_path / "clusters")
    assert main(["--run", str(run), "assign", "--data", spec, "--overwrite"]) == 0
    theirs = read_labels(run / "clusters" / "labels.csv")
    shutil.rmtree(run / "clusters")
    shutil.move(tmp_path / "clusters", run / "clusters")
    assert tuple(theirs.keys) == data.keys
    assert (labels == theirs.labels).all()
    assert len(np.unique(labels)) > 1


def test_predictions_are_those_of_the_whole_network_to_centre_squares(run, test_split):
    predicted = heldout.predictions(arm_of(run), test_split, CONFIG, CPU)
    weights = run / "retrain" / "model.safetensors"
    network = networks.describe(weights)
    model = networks.load(weights, network).eval()
    side = round(network.size * 8 / 7)
    edge = (side - network.size) // 2
    wanted = []
    for row in range(len(test_split)):
        image = torch.from_numpy(square(test_split.read(row, side), side).copy()).permute(2, 0, 1)[None]
        inner = image[..., edge : edge + network.size, edge : edge + network.size]
        with torch.no_grad():
            wanted.append(int(model(networks.normalise(inner, network.normalise)).argmax()))
    assert predicted.tolist() == wanted


def test_the_table(run, capsys):
    report = json.loads(
        evaluate(run, protocol="clusters", layers="conv1", precision="float32", clusters_k="4")["clusters"].read_text()
    )
    assert set(report["inputs"]) >= {"labels run", "clusters run"}
    cells = report["arms"]["run"]["scores"]
    assert list(cells) == [
        "conv1",
        "pseudo-labels",
        "held-out pseudo-labels",
        "network",
        "most frequent label",
        "chance",
    ]
    assert cells["chance"]["heldout"] == 1 / 5
    assert "heldout" not in cells["conv1"] and "nmi" in cells["held-out pseudo-labels"]
    assert sum("heldout" in cell for cell in report["arms"]["random"]["scores"].values()) == 0
    low, high = cells["network"]["heldout_interval"]
    assert low <= cells["network"]["heldout"] <= high
    shown = capsys.readouterr().out
    assert "clusters, % of the held-out pseudo-labels told right" in shown


def test_killed_at_the_held_out_labels_no_layer_is_clustered_again(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    options = {"protocol": "clusters", "layers": "conv1", "precision": "float32", "clusters_k": "4", "random": False}
    whole = evaluate(run, overwrite=True, **options)["clusters"].read_text()

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clusters, "heldout_labels", killed)
        evaluate(copy, overwrite=True, **options)
    monkeypatch.setattr(clusters, "clustered", lambda *given: pytest.fail("a layer is clustered again"))
    again = evaluate(copy, **options)["clusters"]
    assert again.read_text() == whole
    assert not (copy / "eval" / "work-clusters").exists()


def test_labels_of_other_images_have_no_column(run, tmp_path, capsys):
    """Those of another seed have the same keys."""
    copy = shutil.copytree(run, tmp_path / "run")
    options = {"protocol": "clusters", "layers": "conv1", "clusters_k": "4", "random": False}
    path = evaluate(copy, labelled="scenes:images=60,size=48,seed=1", overwrite=True, **options)["clusters"]
    assert "pseudo-labels" not in json.loads(path.read_text())["arms"]["run"]["scores"]
    assert f"the pseudo-labels of run are left out: arrow/000000 of {SCENES} and of " in capsys.readouterr().err


def test_shares_by_hand():
    labels, predicted = np.array([0, 0, 0, 2, 1, -1, 3]), np.array([0, 0, 1, 2, 1, 4, -1])
    cells = heldout.compared(labels, predicted, 8)
    assert cells["network"]["heldout"] == 4 / 5
    assert cells["most frequent label"]["heldout"] == 3 / 5
    assert cells["chance"] == {"heldout": 1 / 8, "heldout_interval": [1 / 8, 1 / 8]}
    # Wilson's interval of 4 of 5, from the quadratic equation that defines it.
    for end in cells["network"]["heldout_interval"]:
        assert (0.8 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 5)


def test_what_there_is_nothing_to_ask_for(run, test_split, tmp_path, capsys):
    with pytest.raises(UsageError, match="learned from these same images"):
        heldout.find_source(arm_of(run), open_splits(SCENES)[0])
    copy = shutil.copytree(run, tmp_path / "run")
    labels, centroids = copy / "clusters" / "labels.csv", copy / "clusters" / "clusters.h5"
    kept = {path: path.read_bytes() for path in (labels, centroids, copy / "pretext" / "model.safetensors")}
    for path, words in (
        (labels, "did not learn the labels"),
        (centroids, "made again after the labels"),
        (copy / "pretext" / "model.safetensors", "network"),
    ):
        path.write_bytes(kept[path] + b"\n")
        with pytest.raises(UsageError, match=words):
            heldout.find_source(arm_of(copy), test_split)
        path.write_bytes(kept[path])
    record = copy / "features" / "stage.json"
    made = json.loads(record.read_text())
    other = json.loads(record.read_text())
    other["scenes"]["outputs"]["scenes.h5"]["sha256"] = "of another layer"
    record.write_text(json.dumps(other))
    with pytest.raises(UsageError, match="made again since"):
        heldout.find_source(arm_of(copy), test_split)
    made["scenes"]["config"]["elsewhere"] = True
    record.write_text(json.dumps(made))
    with pytest.raises(UsageError, match="not made in the run"):
        heldout.find_source(arm_of(copy), test_split)
    path = evaluate(copy, protocol="clusters", layers="conv1", clusters_k="4", random=False, overwrite=True)["clusters"]
    assert list(json.loads(path.read_text())["arms"]["run"]["scores"]) == ["conv1", "pseudo-labels"]
    assert "run is not evaluated on held-out pseudo-labels: the features" in capsys.readouterr().err


def test_images_that_were_learned_from_are_not_held_out(tmp_path):
    """A folder is learned from, and a list names some of its images for the test."""
    scenes.write_scenes(tmp_path / "s", 12, 48)
    learned, test = (open_dataset(str(tmp_path / "s" / part)) for part in ("train", "val"))
    assert heldout._shared(learned, test) == 0
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"s/train/{key}\n" for key in learned.keys[:4]) + f"s/val/{test.keys[0]}\n")
    assert heldout._shared(learned, open_dataset(str(listed))) == 4
    assert heldout._shared(open_dataset(str(listed)), learned) == 4


def test_a_run_that_learned_some_of_the_test_images_is_not_asked(run, test_split):
    some = replace(test_split, fingerprint="of fewer", read=open_splits(SCENES)[0].read)
    shared = len(set(some.keys) & set(open_splits(SCENES)[0].keys))
    with pytest.raises(UsageError, match=f"learned from {shared} of the {len(some)} test images"):
        heldout.find_source(arm_of(run), some)
