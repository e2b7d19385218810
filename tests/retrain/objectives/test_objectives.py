"""What a target network can learn, against the same numbers by numpy, and from the command to the weights."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ktransfer import networks
from ktransfer.artifacts.centroids import read_centroids
from ktransfer.artifacts.features import open_features
from ktransfer.cluster import assign, cluster, extract
from ktransfer.errors import UsageError
from ktransfer.retrain import retrain
from ktransfer.retrain.config import RetrainConfig
from ktransfer.retrain.known import find_known
from ktransfer.retrain.objectives.table import open_objective
from ktransfer.retrain.stage import check

SCENES = "scenes:images=60,size=48"
CPU = torch.device("cpu")
SMALL = {
    "data": SCENES,
    "arch": "alexnet_bn",
    "width": 0.05,
    "stride": 2,
    "epochs": 2,
    "batch": 16,
    "precision": "float32",
    "device": "cpu",
}
OBJECTIVES = ("clusters", "multi", "soft", "features", "relations")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run with HOG features, four clusterings of them, and labels."""
    run = tmp_path_factory.mktemp("objectives")
    extract(run, data=SCENES, teacher="hog", size=48)
    cluster(run, k=8, views=4)
    assign(run)
    return run


def opened(run, objective, **more):
    config = replace(RetrainConfig(), objective=objective, **more)
    known, inputs = find_known(run, config, check(run, SMALL | {"objective": objective}).images)
    return known, open_objective(config, known, CPU), inputs


def softmax(rows):
    shifted = np.exp(rows - rows.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def cross_entropy(outputs, wanted):
    return float(-(wanted * np.log(softmax(outputs))).sum(axis=1).mean())


def draws(objective, rows=12):
    outputs = torch.randn(rows, objective.outputs, generator=torch.Generator().manual_seed(0)) * 3
    return outputs, torch.arange(rows) * 5


def centred(run):
    (path,) = (run / "features").glob("*.h5")
    features = np.asarray(open_features(path).rows, np.float64)
    around = features - features.mean(axis=0)
    return around / np.linalg.norm(around, axis=1, keepdims=True)


def columns(run):
    with (run / "clusters" / "labels.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_clusters_and_multi_are_cross_entropies_of_the_labels_in_the_file(prepared):
    table = columns(prepared)
    names = ("label", "label_2", "label_3", "label_4")
    labels = np.array([[int(line[name]) for name in names] for line in table])
    _, one, _ = opened(prepared, "clusters")
    outputs, rows = draws(one)
    value, sums = one.loss(outputs, rows)
    wanted = np.eye(8)[labels[rows, 0]]
    assert value.item() == pytest.approx(cross_entropy(outputs.double().numpy(), wanted), rel=1e-5)
    assert sums["accuracy"].item() == (outputs.argmax(1).numpy() == labels[rows, 0]).sum()

    _, multi, _ = opened(prepared, "multi")
    ks = [8, 2, 4, 8]
    assert (multi.outputs, multi.kept) == (sum(ks), 8)
    outputs, rows = draws(multi)
    heads = np.split(outputs.double().numpy(), np.cumsum(ks)[:-1], axis=1)
    losses = [
        cross_entropy(head, np.eye(k)[labels[rows, view]]) for view, (head, k) in enumerate(zip(heads, ks, strict=True))
    ]
    value, sums = multi.loss(outputs, rows)
    assert value.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert sums["accuracy"].item() == (heads[0].argmax(axis=1) == labels[rows, 0]).sum()


@pytest.mark.parametrize("heat", [0.0, 0.3])
def test_soft_is_the_distribution_over_distances_to_the_centroids(prepared, heat):
    _, soft, inputs = opened(prepared, "soft", temperature=heat)
    assert {"data", "labels", "features", "centroids"} == set(inputs)
    (path,) = (prepared / "features").glob("*.h5")
    rows_of = np.asarray(open_features(path).rows, np.float64)
    rows_of /= np.linalg.norm(rows_of, axis=1, keepdims=True)
    made = read_centroids(prepared / "clusters" / "clusters.h5").centroids.astype(np.float64)
    outputs, rows = draws(soft)
    squares = ((rows_of[rows][:, None] - made) ** 2).sum(axis=2)
    wanted = softmax(-squares / (heat or 0.05))
    value, sums = soft.loss(outputs, rows)
    assert value.item() == pytest.approx(cross_entropy(outputs.double().numpy(), wanted), rel=1e-4)
    labels = [int(columns(prepared)[row]["label"]) for row in rows.tolist()]
    assert sums["accuracy"].item() == (outputs.argmax(1).numpy() == labels).sum()


def test_features_is_one_minus_the_cosine_around_the_mean(prepared):
    wanted = centred(prepared)
    _, features, _ = opened(prepared, "features")
    assert features.outputs == features.kept == wanted.shape[1]
    outputs, rows = draws(features)
    numbers = outputs.double().numpy()
    cosines = (numbers * wanted[rows]).sum(axis=1) / np.linalg.norm(numbers, axis=1)
    value, sums = features.loss(outputs, rows)
    assert value.item() == pytest.approx((1 - cosines.mean()) / 0.05, rel=1e-4)
    assert sums["cosine"].item() == pytest.approx(cosines.sum(), rel=1e-3, abs=1e-4)
    perfect = torch.from_numpy(wanted[rows]) * 7
    assert features.loss(perfect, rows)[0].item() == pytest.approx(0, abs=2e-5)


def test_relations_compare_with_all_images_but_itself(prepared):
    wanted = centred(prepared)
    _, relations, _ = opened(prepared, "relations")
    outputs, rows = draws(relations)
    told = outputs.double().numpy()
    told /= np.linalg.norm(told, axis=1, keepdims=True)
    others = np.arange(60) != rows.numpy()[:, None]  # fewer images than anchors: all are
    losses = [
        cross_entropy(
            (told[place] @ wanted[others[place]].T / 0.04)[None],
            softmax((wanted[row] @ wanted[others[place]].T / 0.04)[None]),
        )
        for place, row in enumerate(rows.tolist())
    ]
    value, _ = relations.loss(outputs, rows)
    assert value.item() == pytest.approx(np.mean(losses), rel=1e-4)
    best, _ = relations.loss(torch.from_numpy(wanted[rows]).float(), rows)
    assert best < value


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_falls_and_the_weights_say_what_they_tell(prepared, tmp_path, objective):
    run = tmp_path / "run"
    for name in ("features", "clusters"):
        (run / name).mkdir(parents=True)
        for path in (prepared / name).iterdir():
            if path.is_file():
                (run / name / path.name).write_bytes(path.read_bytes())
    weights = retrain(run, **SMALL | {"objective": objective, "epochs": 40, "lr": 0.02})
    lines = [json.loads(line) for line in (run / "retrain" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < open_loss(run, objective)
    network = networks.describe(weights)
    vectors = objective in ("features", "relations")
    assert network.classes == (centred(prepared).shape[1] if vectors else 8)
    assert network.task == ("features" if vectors else "pseudo-labels")
    assert load_file(weights)["fc8.weight"].shape[0] == network.classes
    networks.load(weights, network)


def open_loss(run, objective):
    """That of outputs near zero, as a network begins."""
    _, made, _ = opened(run, objective)
    return made.loss(torch.randn(60, made.outputs) * 1e-3, torch.arange(60))[0].item()


def test_the_head_that_stays_is_the_first(prepared, tmp_path, monkeypatch):
    saved = []
    real = networks.save

    def watched(path, state, network, *names):
        saved.append((state, network))
        real(path, state, network, *names)

    monkeypatch.setattr(networks, "save", watched)
    retrain(tmp_path, **SMALL | {"objective": "multi", "labels": str(prepared / "clusters" / "labels.h5"), "epochs": 1})
    ((state, network),) = saved
    assert state["fc8.weight"].shape[0] == network.classes == 8


def test_what_does_not_go_together_is_one_line(prepared, tmp_path):
    labels = str(prepared / "clusters" / "labels.csv")
    wrong = [
        ({"objective": "features", "labels": labels}, "leave --labels out"),
        ({"objective": "multi", "labels": "classes"}, "an image has one class"),
        ({"objective": "clusters", "features": "x.h5"}, "leave one of them out"),
        ({"objective": "multi", "temperature": 0.1}, "has none"),
        ({"objective": "relations", "uniform": True}, "no clusters to draw from"),
        ({"objective": "features", "features": "x.h5"}, "no such feature file"),
        ({"objective": "relations"}, "the run has none"),
    ]
    for options, said in wrong:
        with pytest.raises(UsageError, match=said) as found:
            retrain(tmp_path, **SMALL | options)
        assert "\n" not in str(found.value)
    assert not (tmp_path / "retrain").exists()
    extract(tmp_path, data=SCENES, teacher="hog", size=48)
    cluster(tmp_path, k=8)
    assign(tmp_path)
    with pytest.raises(UsageError, match=r"of one clustering; make several: [^\n]*--views 8"):
        retrain(tmp_path, **SMALL | {"objective": "multi"})


@pytest.mark.parametrize("objective", ["features", "multi"])
def test_two_processes_learn_what_one_learns(prepared, tmp_path, launch, objective):
    found = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        for name in ("features", "clusters"):
            shutil.copytree(prepared / name, run / name)
        line = ("--run", run, "retrain", "--data", SCENES, "--objective", objective, "--arch", "alexnet")
        fixed = ("--width", "0.05", "--stride", "2", "--epochs", "2", "--batch", "10", "--precision", "float32")
        status, said = launch(processes, *line, *fixed)
        assert status == [0] * processes, said
        found.append(load_file(run / "retrain" / "model.safetensors"))
    one, two = found
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-4 * value.norm() + 1e-6
