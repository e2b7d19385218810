import json

import numpy as np
import pytest
import torch

from ktransfer.data.loader import ImageLoader
from ktransfer.errors import UsageError
from ktransfer.eval import evaluate
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.protocols import detect
from ktransfer.networks import Network

SMALL = {
    "labelled": "scenes:images=24,size=64",
    "canvas": 64,
    "epochs": 1,
    "batch": 8,
    "protocol": "detect",
    "precision": "float32",
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_boxes(monkeypatch):
    """Heads learn from few boxes, and predict few: they take most of the time."""
    monkeypatch.setattr(detect, "SAMPLED", 16)
    monkeypatch.setattr(detect, "PROPOSALS", 30)


def test_a_table_of_detectors(small_student):
    report = json.loads(evaluate(small_student, **SMALL)["detect"].read_text())
    assert report["protocol"] == "detect/2" and list(report["arms"]) == ["random", "run"]
    for arm in report["arms"].values():
        assert list(arm["scores"]) == ["frozen", "full"]
        for cell in arm["scores"].values():
            assert cell["threshold"] == 0.05 and cell["neck"] == "single"
            for measure in detect.MEASURES:
                low, high = cell[f"{measure}_interval"]
                assert 0 <= low <= cell[measure] <= high <= 1
    assert report["settings"]["canvas"] == 64 and "lrs" not in report["settings"]
    assert not list((small_student / "eval").glob("work-*"))
    assert "VOC07" in (small_student / "eval" / "detect.csv").read_text()


def test_wrong_options_are_found_before_the_work(small_student, monkeypatch):
    for options, words in (
        ({"jitter": "2,1"}, "--jitter 2,1"),
        ({"trunk": "fulll"}, "did you mean 'full'"),
        ({"test_scales": "1,big"}, "--test-scales 1,big"),
        ({"test_scales": "0"}, "--test-scales 0"),
        ({"labelled": "nowhere"}, "no such folder"),
    ):
        with pytest.raises(UsageError, match=words):
            evaluate(small_student, **(SMALL | options))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"ktransfer\[detection\]"):
        evaluate(small_student, **SMALL)
    assert not (small_student / "eval" / "detect.json").exists()


def config(**more):
    return EvalConfig(**(SMALL | {"weight_decay": 1e-4, "trunk": "full", "workers": 1} | more))


def test_the_test_part_is_read_once_and_labels_at_random_teach_nothing(tmp_path, monkeypatch):
    """Learned by heart from shuffled labels, a detector finds objects, and not their classes."""
    train, test = detect.open_data("scenes:images=24,size=64")
    asked = []
    real = ImageLoader.batches
    monkeypatch.setattr(
        ImageLoader,
        "batches",
        lambda self, rows: real(self, (asked.append((self.dataset.name, one.tolist())) or one for one in rows)),
    )
    labels = np.random.default_rng(0).integers(0, 12, 24)
    shuffled = tuple(
        one._replace(labels=np.full_like(one.labels, label)) for one, label in zip(train.objects, labels, strict=True)
    )
    object.__setattr__(train, "objects", shuffled)
    arm = Arm("run", Network("alexnet_bn", 0.25, size=64), None)
    found = detect.evaluate(arm, (train, test), config(epochs=12), tmp_path / "work", CPU)
    assert found["scores"]["full"]["AP50"] < 0.2
    of_test = [row for name, rows in asked for row in rows if name == test.name]
    assert sorted(of_test) == list(range(len(test)))


def test_frozen_trunks_keep_their_weights_and_full_ones_move(tmp_path, monkeypatch):
    kept = {}
    real = detect.loop.fit

    def fit(model, *arguments, **more):
        body = model.backbone.body
        before = {name: value.clone() for name, value in body.state_dict().items()}
        real(model, *arguments, **more)
        kept[arguments[-1]] = [
            name for name, value in body.state_dict().items() if not torch.equal(before[name], value)
        ]

    monkeypatch.setattr(detect.loop, "fit", fit)
    splits = detect.open_data("scenes:images=24,size=64")
    arm = Arm("run", Network("alexnet_bn", 0.25, size=64), None)
    settings = config(trunk="frozen,partial,full", freeze="conv1, conv2")
    found = detect.evaluate(arm, splits, settings, tmp_path / "work", CPU)
    assert list(found["scores"]) == ["frozen", "partial", "full"]
    assert kept["detect run frozen"] == []
    assert {"conv1.weight", "conv5.bias", "bn3.running_mean"} <= set(kept["detect run full"])
    stayed = [name for name in kept["detect run full"] if name.split(".")[0] in ("conv1", "conv2", "bn1", "bn2")]
    assert set(kept["detect run partial"]) == set(kept["detect run full"]) - set(stayed)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"trunk": "partial"}, "--trunk partial and --freeze"),
        ({"freeze": "conv1"}, "--trunk partial and --freeze"),
        ({"trunk": "partial", "freeze": "relu1"}, "--freeze relu1: no layer of the trunk; it has conv1, "),
    ],
)
def test_what_cannot_be_frozen_is_refused(tmp_path, more, words):
    splits = detect.open_data("scenes:images=24,size=64")
    with pytest.raises(UsageError, match=words):
        detect.check([Network("alexnet_bn", 0.25, size=64)], splits, config(**more), tmp_path)


def test_interrupted_between_columns_it_goes_on(tmp_path, monkeypatch):
    splits = detect.open_data("scenes:images=24,size=64")
    arm = Arm("run", Network("alexnet_bn", 0.25, size=64), None)
    wanted = detect.evaluate(arm, splits, config(trunk="frozen,full"), tmp_path / "one", CPU)
    real, calls = detect._column, []

    def column(arm, name, *arguments):
        calls.append(name)
        if calls == ["frozen", "full"]:
            raise KeyboardInterrupt
        return real(arm, name, *arguments)

    monkeypatch.setattr(detect, "_column", column)
    with pytest.raises(KeyboardInterrupt):
        detect.evaluate(arm, splits, config(trunk="frozen,full"), tmp_path / "two", CPU)
    found = detect.evaluate(arm, splits, config(trunk="frozen,full"), tmp_path / "two", CPU)
    assert calls == ["frozen", "full", "full"] and found == wanted


def test_necks():
    assert detect.neck(Network("alexnet"), config()) == "single"
    assert detect.neck(Network("resnet18"), config()) == "p2-p6"
    assert detect.neck(Network("alexnet"), config(detector="retinanet")) == "p3-p7"
    assert detect.neck(Network("alexnet"), config(neck="p2-p6")) == "p2-p6"


def test_several_scales_are_read_at_test_alone(tmp_path, monkeypatch):
    splits = detect.open_data("scenes:images=24,size=64")
    arm = Arm("run", Network("alexnet_bn", 0.25, size=64), None)
    asked = []
    real = ImageLoader.batches
    monkeypatch.setattr(
        ImageLoader, "batches", lambda self, rows: asked.append((self.dataset.name, self.size)) or real(self, rows)
    )
    found = detect.evaluate(arm, splits, config(test_scales="1,1.5", cache_images="off"), tmp_path / "work", CPU)
    assert set(found["scores"]["full"]) >= set(detect.MEASURES)
    assert [size for name, size in asked if name == splits[1].name] == [64, 64, 96, 96]
    assert {size for name, size in asked if name == splits[0].name} == {64}
    with pytest.raises(UsageError, match="--cache-images device"):
        detect.evaluate(arm, splits, config(cache_images="device"), tmp_path / "work", CPU)
