"""The protocols on frozen vectors, on planted ones: the Bayes rate, chance, and what may never be looked at."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ktransfer import networks
from ktransfer.artifacts.features import Features
from ktransfer.data.opening import open_splits
from ktransfer.errors import StageError
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.learners import frozen
from ktransfer.eval.learners.frozen import labels_of
from ktransfer.eval.learners.maps import Frozen, Layer
from ktransfer.networks import Network

CPU = torch.device("cpu")
NAMES = ("knn", "lowshot", "svm", "logreg")
HEADLINE = {"knn": ("top1", "nearest"), "lowshot": ("ten", "shot20"), "svm": ("top1", "shot16"), "logreg": ("top1",)}
NETWORK = Network("alexnet_bn", 0.05, 2, 56)
ARM = Arm("random", NETWORK, None)
CLASSES, NUMBERS = 6, 10


def config(name, **options):
    return EvalConfig(precision="float32", protocol=name, **options)


def module(name):
    return importlib.import_module(f"ktransfer.eval.protocols.{name}")


def planted(count, seed, signal=1.1, targets=None):
    """Gaussian classes on `NUMBERS` numbers; the share that the Bayes rule gets right; 3 rows are broken."""
    means = signal * np.random.default_rng(99).normal(size=(CLASSES, NUMBERS))
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, count) if targets is None else targets
    rows = (means[targets] + rng.normal(size=(count, NUMBERS))).astype(np.float32)
    bayes = ((rows[:, None] - means) ** 2).sum(2).argmin(1)
    valid = np.ones(count, bool)
    valid[[1, 5, 6]] = False
    rows[~valid] = 0
    layer = Layer("conv5", NUMBERS, 1, 0, NUMBERS)
    features = Features(None, rows, valid, targets.astype(np.int32), {})
    return Frozen([layer], features, []), float((bayes == targets)[valid].mean())


def run(name, monkeypatch, tmp_path, train, test, tags=(None, None), **options):
    """What the protocol says of planted vectors."""
    splits = open_splits(f"scenes:images={len(train.features.rows)},size=48")
    splits = tuple(
        replace(
            data,
            keys=tuple(f"{row}" for row in range(len(part.features.rows))),
            targets=part.features.targets,
            classes=splits[0].classes[:CLASSES],
            tags=tag,
        )
        for data, part, tag in zip(splits, (train, test), tags, strict=True)
    )
    monkeypatch.setattr(frozen, "frozen_maps", lambda *args, **more: (train, test))
    monkeypatch.setattr(frozen, "_layers", lambda *args: train.layers)
    place = tmp_path / "eval" / f"work-{name}" / "arm"
    place.mkdir(parents=True)
    found = module(name).evaluate(ARM, splits, config(name, **options), place, CPU)
    assert json.loads(json.dumps(found)) == found
    return found["scores"]["conv5"]


@pytest.mark.parametrize("name", NAMES)
def test_planted_signal_is_found_to_the_bayes_rate(name, monkeypatch, tmp_path):
    (train, _), (test, bayes) = planted(1500, 0), planted(1500, 1)
    cell = run(name, monkeypatch, tmp_path, train, test)
    assert 0.7 < bayes < 0.95
    for measure in HEADLINE[name]:
        low, high = cell[f"{measure}_interval"]
        assert low <= cell[measure] <= high
    # 1-NN comes to about twice the Bayes error; few labels cost a little, cosines forget lengths.
    most = {"knn": 0.06, "lowshot": 0.08, "svm": 0.03, "logreg": 0.02}[name]
    assert bayes - most < cell[HEADLINE[name][0]] < bayes + 0.02
    if name == "knn":
        assert 1 - 2 * (1 - bayes) - 0.06 < cell["nearest"] < cell["top1"]
    if name == "lowshot":
        assert cell["one"] < cell["ten"] and cell["shot5"] < cell["shot20"]


@pytest.mark.parametrize("name", NAMES)
def test_shuffled_labels_stay_at_chance(name, monkeypatch, tmp_path):
    """No way leads from the labels of test images, or of images held out, to the predictions."""
    train, test = (planted(1200, seed)[0] for seed in (0, 1))
    for part, seed in ((train, 2), (test, 3)):
        np.random.default_rng(seed).shuffle(part.features.targets)
    cell = run(name, monkeypatch, tmp_path, train, test)
    chance = 1 / CLASSES
    for measure in HEADLINE[name]:
        guess = 1 / 5 if measure == "shot20" else chance
        # 600 episodes share 1200 images: their interval is that over episodes alone.
        assert abs(cell[measure] - guess) < 0.04, measure
    if "held_out" in cell:
        assert max(cell["held_out"].values()) < chance + 0.07  # the best of many


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_the_test_part_choose_nothing(name, monkeypatch, tmp_path):
    (train, _), (test, _) = planted(400, 0), planted(300, 1)
    wrong = replace(test, features=replace(test.features, targets=(test.features.targets + 1) % CLASSES))
    first = run(name, monkeypatch, tmp_path / "a", train, test)
    second = run(name, monkeypatch, tmp_path / "b", train, wrong)
    chosen = {"k", "held_out", "decay", "C", "cost", "one_decay", "ten_decay", "one_labels", "ten_labels", "numbers"}
    assert {key: first[key] for key in chosen & set(first)} == {key: second[key] for key in chosen & set(second)}
    assert chosen & set(first)
    assert first[HEADLINE[name][0]] > second[HEADLINE[name][0]]


@pytest.mark.parametrize("name", NAMES)
def test_broken_images_are_left_out(name, monkeypatch, tmp_path):
    """Their rows of zeros and their labels, which stand in the file, change nothing."""
    (train, _), (test, _) = planted(300, 0), planted(200, 1)
    other = [
        replace(part, features=replace(part.features, targets=np.where(part.features.valid, part.features.targets, 0)))
        for part in (train, test)
    ]
    if name == "lowshot":  # draws among all images, also those that turn out broken
        other[0] = train
    first = run(name, monkeypatch, tmp_path / "a", train, test)
    assert first == run(name, monkeypatch, tmp_path / "b", *other)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_read_once_and_each_layer_is_evaluated(name, tmp_path, monkeypatch):
    monkeypatch.setattr(module("svm"), "DRAWS", 2)
    monkeypatch.setattr(module("svm"), "COSTS", (0.01, 0.1))
    splits, read = open_splits("scenes:images=60,size=48"), ([], [])
    counted = tuple(
        replace(data, read=lambda row, side, data=data, rows=rows: (rows.append(row), data.read(row, side))[1])
        for data, rows in zip(splits, read, strict=True)
    )
    work = tmp_path / "eval" / f"work-{name}" / "random"
    small = config(name, grid=2, layers=None if name == "logreg" else "conv2,conv5")
    module(name).check([NETWORK], splits, small, tmp_path)
    found = module(name).evaluate(ARM, counted, small, work, CPU)
    for data, rows in zip(splits, read, strict=True):
        assert sorted(rows) == list(range(len(data)))
    assert list(found["scores"]) == (["conv5"] if name == "logreg" else ["conv2", "conv5"])
    assert found["scores"]["conv5"]["numbers"] == 16 * 4
    again = module(name).evaluate(ARM, splits, config(name, grid=2, layers="conv2"), work.with_name("again"), CPU)
    assert list(again["scores"]) == ["conv2"]
    if name != "logreg":
        assert again["scores"]["conv2"] == found["scores"]["conv2"]


def test_layers_evaluated_before_an_interruption_are_kept(monkeypatch, tmp_path):
    splits = open_splits("scenes:images=48,size=48")
    knn, calls = module("knn"), []
    expected = knn.evaluate(ARM, splits, config("knn"), tmp_path / "whole", CPU)
    one_layer = knn._one_layer

    def killed(train, test, layer, **rest):
        calls.append(layer.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return one_layer(train, test, layer, **rest)

    monkeypatch.setattr(knn, "_one_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        knn.evaluate(ARM, splits, config("knn"), tmp_path / "work", CPU)
    assert knn.evaluate(ARM, splits, config("knn"), tmp_path / "work", CPU) == expected
    assert calls == ["conv1", "conv2", "conv3", "conv3", "conv4", "conv5"]


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (Network("vgg16_bn", 0.05, 4, 32), "conv4_3"),
        (Network("vgg13", size=32, classes=5), "conv5_2"),
        (Network("resnet18", size=64, classes=5), "layer4"),
        (NETWORK, "conv5"),
    ],
)
def test_the_last_layer_is_the_last_one_there_is(network, layer):
    """The five that are shown by default end earlier in some networks."""
    model = networks.build(network, 0, "test")
    assert [one.name for one in frozen._layers(model, network, config("logreg"), True)] == [layer]
    named = config("logreg", layers=next(iter(networks.layers(network, model))))
    assert [one.name for one in frozen._layers(model, network, named, True)] == [named.layers]


def test_the_disk_and_the_layers_are_checked_before(monkeypatch, tmp_path):
    splits = open_splits("scenes:images=48,size=48")
    for name in NAMES:
        with pytest.raises(Exception, match="conv9: alexnet_bn has no such layer"):
            module(name).check([NETWORK], splits, config(name, layers="conv9"), tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    for name in NAMES:
        with pytest.raises(Exception, match=r"eval needs 0\.\d+ GB"):
            module(name).check([NETWORK], splits, config(name, grid=4), tmp_path)


def test_too_many_broken_images(tmp_path, folder):
    splits = (open_splits("scenes:images=24,size=48")[0],) * 2
    from ktransfer.data.opening import open_dataset

    broken = open_dataset(str(folder))
    with pytest.raises(StageError, match=r"a/05\.jpg"):
        module("knn").evaluate(ARM, (broken, splits[1]), config("knn", max_broken=0.0), tmp_path / "w", CPU)
    found = module("knn").evaluate(ARM, (broken, broken), config("knn", max_broken=0.1), tmp_path / "w", CPU)
    assert [line.split(":")[0] for line in found["broken"]] == ["pics/a/05.jpg"] * 2


def test_labels_of_what_can_be_read():
    part = planted(20, 0)[0]
    assert labels_of(part).tolist() == np.delete(part.features.targets, [1, 5, 6]).tolist()
