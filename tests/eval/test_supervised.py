"""The arm that learns the true labels: trained once, resumable, evaluated like the others; several labels an image."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.eval import EvalConfig, compare, evaluate, stage, supervised
from ktransfer.eval.arms import Arm, find_arms, last_network, model_of
from ktransfer.networks import Network
from ktransfer.pretext import pretext
from ktransfer.retrain import retrain
from ktransfer.training import loop

SCENES = "scenes:images=40,size=48"
TRAIN = {"epochs": 1, "batch": 16, "lrs": "0.01", "precision": "float32"}
FAST = TRAIN | {"layers": "conv2"}
TUNED = {"test_crops": 1}
LEARN = {"supervised": True, "supervised_epochs": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A target network that learned the classes, and a teacher: an AlexNet, and the trunk of a VGG."""
    home = tmp_path_factory.mktemp("runs")
    common = {"width": 0.05, "epochs": 1, "batch": 8}
    retrain(home / "target", data=SCENES, labels="classes", arch="alexnet_bn", stride=2, **common)
    pretext(home / "vgg", data=SCENES, arch="vgg16_bn", permutations=5, **common)
    return home


@pytest.fixture
def runs(made, tmp_path):
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def trainings(monkeypatch):
    """The labels of all trainings."""
    seen = []
    fit = loop.fit

    def watch(model, loss, images, batches, options, folder, device, label, *rest):
        seen.append(label)
        fit(model, loss, images, batches, options, folder, device, label, *rest)

    monkeypatch.setattr(loop, "fit", watch)
    return seen


def trained(run, config):
    return supervised.train(supervised.check(last_network(run), [config], torch.device("cpu")))


def result(run, protocol="linear"):
    return json.loads((run / "eval" / f"{protocol}.json").read_text())


def test_it_is_trained_once_and_evaluated_by_all(runs, trainings):
    run = runs / "target"
    evaluate(run, protocol="linear,nonlinear,finetune", **LEARN, **FAST, **TUNED)
    assert trainings.count("supervised") == 1
    for protocol in ("linear", "nonlinear", "finetune"):
        found = result(run, protocol)
        assert list(found["arms"]) == ["random", "target", "supervised"]
        assert found["arms"]["supervised"]["task"] == "classes"
        assert found["measures"].keys() >= {"top1"}
        assert "mAP" not in (run / "eval" / f"{protocol}.md").read_text()
    record = json.loads((run / "eval" / "stage.json").read_text())
    assert record["supervised"]["state"] == "done"
    assert (
        record["linear"]["inputs"]["network supervised"]
        == record["supervised"]["outputs"]["supervised/model.safetensors"]["sha256"]
    )
    made_by = record["supervised"]["config"]
    assert {key: made_by[key] for key in ("epochs", "lr", "batch", "crop", "weight_decay", "size", "stride")} == {
        "epochs": 2,
        "lr": 0.01,
        "batch": 256,
        "crop": 0.08,
        "weight_decay": 5e-4,
        "size": 40,
        "stride": 2,
    }
    assert sorted(path.name for path in (run / "eval" / "supervised").iterdir()) == [
        "metrics.jsonl",
        "model.safetensors",
    ]

    # Another evaluation needs no other training, nor does one made again; another recipe does, and asks.
    trainings.clear()
    evaluate(run, protocol="linear", overwrite=True, **LEARN, **(FAST | {"epochs": 2}))
    assert "supervised" not in trainings
    with pytest.raises(
        UsageError, match=r"supervised in .* was made differently: epochs was 2, is 3.*eval --overwrite"
    ):
        evaluate(run, protocol="linear", **(LEARN | {"supervised_epochs": 3}), **(FAST | {"epochs": 2}))
    evaluate(run, protocol="linear", overwrite=True, **(LEARN | {"supervised_epochs": 3}), **FAST)
    assert trainings.count("supervised") == 1
    # Nor does it touch what was evaluated without it.
    evaluate(run, protocol="filters", random=False)
    before = result(run, "filters")
    with pytest.raises(UsageError, match="--supervised-epochs: not read by filters"):
        evaluate(run, protocol="filters", random=False, supervised_epochs=5)
    evaluate(run, protocol="filters", random=False, overwrite=True)
    assert result(run, "filters") == before


def test_it_learns_as_a_retraining_on_the_classes_does(runs, monkeypatch):
    """Given the draws of a retraining, it ends with the same weights."""
    loss, fit = supervised.crop_loss, loop.fit
    monkeypatch.setattr(
        supervised, "with_classes", lambda network, classes, seed, _: networks.build(network, seed, "retrain")
    )
    monkeypatch.setattr(supervised, "crop_loss", lambda *given, **more: loss(*given, **more | {"purpose": "retrain"}))
    config = EvalConfig(labelled=SCENES, size=40, stride=2, supervised_epochs=2, precision="float32")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", lambda *given: fit(*given[:7], "retrain"))
        weights = trained(runs / "target", config)
    options = {"arch": "alexnet_bn", "width": 0.05, "stride": 2, "epochs": 2, "precision": "float32"}
    other = retrain(runs / "again", data=SCENES, labels="classes", **options)
    assert networks.describe(weights) == networks.describe(other)
    assert weights.read_bytes() == other.read_bytes()


def test_killed_and_given_again_it_ends_with_the_same_bytes(runs, monkeypatch):
    shutil.copytree(runs / "target", runs / "other")
    options = FAST | {"supervised": True, "supervised_epochs": 4}
    evaluate(runs / "other", **options)
    loss, steps = supervised.crop_loss, []

    def killed(*given, **more):
        steps.append(0)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return loss(*given, **more)

    monkeypatch.setattr("ktransfer.training.checkpoint.SECONDS", 0.0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SHARE", 1e9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervised, "crop_loss", killed)
        evaluate(runs / "target", **options)
    assert not (runs / "target" / "eval" / "linear.json").exists()
    evaluate(runs / "target", **options)
    weights = [(runs / name / "eval" / "supervised" / "model.safetensors").read_bytes() for name in ("target", "other")]
    assert weights[0] == weights[1]
    mine, theirs = (result(runs / name)["arms"]["supervised"] for name in ("target", "other"))
    assert mine == theirs


def test_what_it_cannot_be_trained_for_is_refused_before_anything_is_evaluated(runs, trainings, tmp_path):
    def fails(words, **options):
        with pytest.raises(UsageError, match=words) as caught:
            evaluate(run, **options, **LEARN)
        assert "\n" not in str(caught.value)
        assert not trainings

    run = runs / "vgg"
    networks.save(run / "pretext" / "model.safetensors", {}, Network("alexnet_bn", 0.05, 2, 40, 0, task="jigsawpp"))
    both = {"protocol": "linear,knn", "preset": "fair", "size": 96, "layers": "conv1"}
    fails(r"\(linear --size 96 --stride 2, knn --size 96 --stride 4\); give --size and --stride, or", **both)
    assert [one.config.stride for one in stage.check(run, both | LEARN | {"stride": 2}).evaluations] == [2, 2]

    # Boxes that a detector learns from need not be class folders.
    boxes = tmp_path / "boxes.json"
    images = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in range(10)]
    notes = [{"id": n, "image_id": n, "category_id": 1 + n % 2, "bbox": [8, 8, 40, 40]} for n in range(10)]
    names = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}]
    boxes.write_text(json.dumps({"images": images, "annotations": notes, "categories": names}))
    for one in images:
        Image.new("RGB", (64, 64)).save(tmp_path / one["file_name"])
    run = runs / "target"
    detect = {"protocol": "detect", "trunk": "frozen", "labelled": str(boxes), "canvas": 64}
    assert len(stage.check(run, detect).evaluations) == 1
    fails("--supervised: .*boxes", **detect)
    assert not (run / "eval").exists()

    trained(run, EvalConfig(labelled=SCENES, size=40, stride=2, supervised_epochs=1))
    trainings.clear()
    fails("supervised in .* was made differently: epochs was 1, is 2", protocol="knn", layers="conv1")
    (planned,) = stage.check(run, {"protocol": "knn", "overwrite": True} | LEARN).evaluations
    assert planned.config.protocol == "knn" and planned.config.overwrite


def test_it_is_trained_as_the_line_says(runs, trainings, monkeypatch):
    """Where and in what pieces; with batch norm other pieces are another training."""
    run, seen = runs / "target", []
    fit = loop.fit

    def watch(model, loss, images, batches, options, *rest):
        seen.append(options)
        fit(model, loss, images, batches, options, *rest)

    monkeypatch.setattr(loop, "fit", watch)
    config = EvalConfig(labelled=SCENES, size=40, stride=2, supervised_epochs=1, precision="float32")
    told = {"micro_batch": 9, "compile": "off", "cache_images": "off", "workers": 1, "max_broken": 0.5}
    weights = trained(run, replace(config, **told)).read_bytes()
    assert {name: getattr(seen[-1], name) for name in told} == told
    with pytest.raises(UsageError, match="--micro-batch, which batch norm sees, changed"):
        trained(run, replace(config, **told | {"micro_batch": 8}))
    trained(run, replace(config, micro_batch=9))
    assert len(seen) == 1
    other = trained(run, replace(config, overwrite=True))
    assert len(seen) == 2 and other.read_bytes() != weights


def test_trainings_in_pieces_are_not_mixed(runs):
    """Of networks with batch norm: neither gone on with in other pieces nor compared."""
    options = {"protocol": "finetune", "random": False, **TRAIN, **TUNED}
    shutil.copytree(runs / "target", runs / "other")
    evaluate(runs / "target", micro_batch=8, **options)
    with pytest.raises(UsageError, match=r"finetune in .* was made differently: micro-batch changed"):
        evaluate(runs / "target", micro_batch=6, **options)
    evaluate(runs / "other", micro_batch=16, **options)  # the whole batch
    with pytest.raises(UsageError, match=r"finetune: micro-batch is '8' in .*target and None in .*other"):
        compare([runs / "target", runs / "other"])


def test_beside_a_teacher_it_is_the_trunk_that_learned(runs):
    evaluate(runs / "vgg", random=False, **LEARN, **(FAST | {"layers": "conv1_1,conv4_3"}))
    found = result(runs / "vgg")["arms"]
    assert [list(arm["scores"]) for arm in found.values()] == [["conv1_1", "conv4_3"]] * 2
    assert found["vgg"]["scores"]["conv4_3"]["numbers"] == found["supervised"]["scores"]["conv4_3"]["numbers"]
    weights = runs / "vgg" / "eval" / "supervised" / "model.safetensors"
    assert networks.describe(weights) == Network("vgg16_bn", 0.05, 4, 40, 0, "picture", "classes")
    evaluate(runs / "vgg", protocol="finetune", **LEARN, **TRAIN, **TUNED)
    assert list(result(runs / "vgg", "finetune")["arms"]) == ["random", "vgg", "supervised"]


def test_arms_with_their_classifiers(runs):
    """fc6 and fc7 are there where the size and the stride are those that they were trained for."""
    run = runs / "target"
    random, mine, learned = find_arms([last_network(run)], EvalConfig(size=40, stride=2, supervised=True))
    assert mine.whole == networks.describe(run / "retrain" / "model.safetensors")
    assert random.whole is not None and random.whole.task == "random" and random.whole.classes == 12
    assert learned.name == "supervised" and learned.whole is None  # nothing has learned yet
    assert all(arm.whole is None for arm in find_arms([last_network(run)], EvalConfig(size=48, stride=2)))
    assert all(arm.whole is None for arm in find_arms([last_network(runs / "vgg")], EvalConfig(size=40, stride=4)))
    assert {"fc6.weight", "conv1.weight"} <= set(model_of(Arm("a", mine.whole, mine.weights), 0).state_dict())
    networks.save(run / "retrain" / "model.safetensors", {}, Network("resnet18", size=40, classes=5))
    assert all(arm.whole is None for arm in find_arms([last_network(run)], EvalConfig(size=40, stride=4)))
    evaluated = find_arms([last_network(run)], EvalConfig(size=40, stride=4, supervised=True))[-1]
    assert evaluated.network.task == "classes"


def test_nonlinear_has_columns_for_the_fully_connected_layers(runs, capsys):
    fast = FAST | TUNED | {"layers": "conv5,fc7"}
    evaluate(runs / "target", protocol="nonlinear", beside=str(runs / "vgg"), **(fast | {"layers": None}))
    columns = {name: list(arm["scores"]) for name, arm in result(runs / "target", "nonlinear")["arms"].items()}
    assert columns["target"] == columns["random"] == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]
    assert len(columns["vgg"]) == 5 and columns["vgg"][-1] == "conv4_2"
    capsys.readouterr()
    evaluate(runs / "target", protocol="nonlinear", size=48, overwrite=True, **fast)
    assert "its weights have no fc7 of this size and stride; it is left out" in capsys.readouterr().err
    assert list(result(runs / "target", "nonlinear")["arms"]["target"]["scores"]) == ["conv5"]
    before = (runs / "target" / "eval" / "nonlinear.json").read_bytes()
    with pytest.raises(UsageError, match="--layers fc6,fc7: no network here has them for images of 48 pixels") as e:
        evaluate(runs / "target", protocol="nonlinear", size=48, overwrite=True, **(fast | {"layers": "fc6,fc7"}))
    assert "\n" not in str(e.value)
    assert (runs / "target" / "eval" / "nonlinear.json").read_bytes() == before


def test_a_run_of_that_name(runs):
    (runs / "target").rename(runs / "supervised")
    with pytest.raises(UsageError, match="a run named 'supervised' beside --supervised; rename its folder"):
        evaluate(runs / "supervised", **LEARN, **FAST)


@pytest.fixture
def several(tmp_path):
    """48 images with several labels each, and 24 to evaluate by."""
    draws = np.random.default_rng(0)
    root = tmp_path / "several"
    root.mkdir()
    for part, count in (("train", 48), ("val", 24)):
        lines = ["path,label"]
        for place in range(count):
            has = draws.integers(0, 2, 2)
            pixels = draws.integers(0, 100, (48, 48, 3)) + 120 * np.array([has[0], 0, has[1]])
            name = f"{part}{place}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / name)
            lines.append(f"{name},{';'.join(word for word, there in zip(('warm', 'cold'), has, strict=True) if there)}")
        (root / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return root


def test_images_with_several_labels(runs, several):
    run = runs / "target"
    evaluate(run, protocol="finetune", labelled=str(several), **LEARN, **(TRAIN | TUNED | {"epochs": 6}))
    found = result(run, "finetune")
    assert list(found["arms"]) == ["random", "target", "supervised"]
    for arm in found["arms"].values():
        cell = arm["scores"]["joint"]
        assert cell["map_interval"][0] <= cell["map"] <= cell["map_interval"][1] and "top1" not in cell
    assert max(arm["scores"]["joint"]["map"] for arm in found["arms"].values()) > 0.8
    assert 0.3 < found["chance"] < 0.7
    text = (run / "eval" / "finetune.md").read_text()
    assert "fine-tuned, VOC07 11-point mAP %" in text and "top-1" not in text
    assert "finetune/2,random" in (run / "eval" / "finetune.csv").read_text()
    with pytest.raises(
        UsageError, match=r"--protocol linear: .* has images with several labels; choose a protocol that takes them: "
    ) as e:
        evaluate(run, protocol="linear", labelled=str(several), **FAST)
    assert "finetune" in str(e.value) and "\n" not in str(e.value)
    evaluate(run, protocol="filters", labelled=str(several))  # looks at no label
    assert list(result(run, "filters")["arms"]) == ["random", "target"]


def test_the_loss_of_several_labels(several):
    """The arm learns sigmoids; each image is drawn with its own crop."""
    from ktransfer.data.opening import open_splits
    from ktransfer.eval.learners.tuning import Labelled

    data, _ = open_splits(str(several))
    network = Network("alexnet_bn", 0.05, 2, 40)
    part = Labelled(data, network, EvalConfig(), torch.device("cpu"))
    assert part.several and part.labels.shape == (48, 2)
    loss = part.loss(torch.zeros(4, 2), torch.arange(4))
    assert float(loss) == pytest.approx(2 * np.log(2), rel=1e-6)
