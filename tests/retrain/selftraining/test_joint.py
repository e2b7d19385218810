"""Joint training: its loss against one made by hand, its step in a self-training, kills, and refusals."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import SELFTRAIN

from ktransfer.data import scenes
from ktransfer.data.opening import open_dataset
from ktransfer.detection import canvas, saved
from ktransfer.detection.detectors import Settings
from ktransfer.detection.losses import truth
from ktransfer.detection.opening import open_detection
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.retrain import selftrain
from ktransfer.retrain.selftraining import boxes, joint, stage, steps, student, study
from ktransfer.training import loop
from ktransfer.training.batch import Batch

SMALL = SELFTRAIN | {"unlabelled": "scenes:images=8,size=64,seed=1", "methods": "self,joint"}
ALONE = {"methods": "joint", "threshold": 0.5}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    selftrain(run, **SMALL)
    return run


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def weights(run, name):
    return (run / "selftrain" / name / "model.safetensors").read_bytes()


def test_its_step_and_its_scores(made):
    steps = json.loads((made / "selftrain" / "stage.json").read_text())
    assert list(steps) == ["teacher", "pseudo", "student", "joint", "scores"]
    assert steps["joint"]["result"] == {"labelled": 8, "of a class": 8, "classes": 12}
    assert list(steps["joint"]["outputs"]) == ["joint/model.safetensors", "joint/augmented.png", "joint.ids.json"]
    scores = json.loads((made / "selftrain" / "scores.json").read_text())["scores"]
    assert list(scores) == ["teacher", "student", "joint"]
    lines = [json.loads(line) for line in (made / "selftrain" / "joint" / "metrics.jsonl").read_text().splitlines()]
    assert {"human_loss", "class_loss", "ratio", "class_right", "human_boxes"} <= set(lines[-1])
    assert 0 <= lines[-1]["class_right"] <= 1
    assert lines[-1]["class_loss"] == pytest.approx(np.log(12), abs=0.7)
    described = saved.describe(made / "selftrain" / "joint" / "model.safetensors")
    assert described == saved.describe(made / "selftrain" / "teacher" / "model.safetensors")
    state = load_file(made / "selftrain" / "joint" / "model.safetensors")
    fresh = dict(saved.make(described, 0).named_parameters())
    assert fresh.keys() <= state.keys() and not any("classifier" in name for name in state.keys() - fresh.keys())
    assert [name for name, value in fresh.items() if torch.equal(state[name], value.detach())] == []


def test_it_can_be_added_and_be_alone(made, tmp_path, capsys):
    run = tmp_path / "run"
    selftrain(run, **SMALL | {"methods": "self"})
    capsys.readouterr()
    selftrain(run, **SMALL)
    said = capsys.readouterr().err
    assert "student: done before" in said and "joint: done;" in said
    for name in ("teacher", "student", "joint"):
        assert weights(run, name) == weights(made, name)
    scores = [one / "selftrain" / "scores.json" for one in (run, made)]
    assert scores[0].read_bytes() == scores[1].read_bytes()
    teacher = str(made / "selftrain" / "teacher" / "model.safetensors")
    path = selftrain(tmp_path / "alone", **SMALL | ALONE, teacher=teacher)
    assert list(json.loads(path.read_text())["scores"]) == ["teacher", "joint"]
    assert list(json.loads((path.parent / "stage.json").read_text())) == ["joint", "scores"]
    assert weights(tmp_path / "alone", "joint") == weights(made, "joint")


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_killed_and_given_again_it_ends_with_the_same_bytes(made, copy, monkeypatch, ema):
    def begin_anew():
        shutil.rmtree(copy / "selftrain" / "joint")
        path = copy / "selftrain" / "stage.json"
        records = json.loads(path.read_text())
        path.write_text(json.dumps({name: records[name] for name in records if name != "joint"}))

    options = SMALL | ALONE | {"ema": ema}
    begin_anew()
    selftrain(copy, **options)
    wanted = weights(copy, "joint")
    assert (wanted == weights(made, "joint")) == (not ema)
    begin_anew()
    original, calls = loop.fit, []

    def fit(model, loss, *rest, **more):
        def killed(model, batch):
            calls.append(batch)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return loss(model, batch)

        original(model, killed, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ktransfer.training.checkpoint.SECONDS", 0.0)
        patch.setattr("ktransfer.training.checkpoint.SHARE", 1e9)
        patch.setattr(loop, "fit", fit)
        selftrain(copy, **options)
    assert (copy / "selftrain" / "joint" / "checkpoint" / "last.pt").is_file()
    selftrain(copy, **options)
    assert weights(copy, "joint") == wanted


@pytest.fixture
def parts():
    """A model, its loss, and a batch of two labelled images and three with classes."""
    labelled = open_detection("scenes:images=4,size=64")[0]
    others = open_dataset("scenes:images=6,size=64,seed=1")
    data = student.joined(labelled, boxes.without_boxes(others, labelled))
    network = Network("alexnet_bn", 0.1, 4, 64, 0, "imagenet", "random")
    described = saved.Described(network, "p3-p7", Settings("retinanet"), labelled.classes, 64, 16)
    model = joint.Joint(saved.make(described, 0), len(others.classes), 0)
    known, labels = truth(data, 64, CPU), torch.from_numpy(others.targets).long()
    rows = torch.tensor([1, 6, 3, 9, 4])
    pixels = canvas.canvases(data, 64, 1).batch(rows)[0]

    def loss(balance="normalised", alpha=1.0, strength="none"):
        own = student.losses(known, "imagenet", strength, 0)
        weighing = student.Weighing(balance, alpha, 0.9)
        return joint.losses(own, known.extents, labels, "imagenet", strength, 0, weighing), own

    return model, loss, Batch(rows, pixels, torch.ones(5, dtype=torch.bool), 0), labels


@pytest.mark.parametrize(("balance", "alpha"), [("normalised", 1.0), ("normalised", 0.25), ("plain", 2.0)])
def test_the_loss_is_that_of_both_parts(parts, balance, alpha):
    model, made, batch, labels = parts
    model.train()
    loss, own = made(balance, alpha)
    mask = batch.rows < 4
    located = own(model, replace(batch, valid=mask))[0].item()
    pixels = canvas.normalise(batch.pixels[~mask], torch.full((3, 2), 64.0), "imagenet")
    features = model.detector.backbone.body(pixels).mean((2, 3)).detach().double().numpy()
    kernel, bias = (value.detach().double().numpy() for value in model.classifier.parameters())
    logits = features @ kernel.T + bias
    logits -= logits.max(1, keepdims=True)
    wanted = labels[batch.rows[~mask] - 4].numpy()
    classed = (np.log(np.exp(logits).sum(1)) - logits[np.arange(3), wanted]).mean()
    ratio = located / classed if balance == "normalised" else 1.0
    total = (located + alpha * ratio * classed) / (1 + alpha if balance == "normalised" else 1)
    value, sums = loss(model, batch)
    assert value.item() == pytest.approx(total, rel=1e-4)
    assert sums["class_loss"].item() / sums["count"].item() == pytest.approx(classed, rel=1e-4)
    assert sums["class_right"].item() / 5 == pytest.approx((logits.argmax(1) == wanted).mean())


def test_classes_teach_the_trunk_and_not_the_heads(parts):
    model, made, batch, _ = parts
    loss, own = made("plain", 1.0)
    gradients = []
    for one in (lambda: loss(model, batch)[0], lambda: own(model, replace(batch, valid=batch.rows < 4))[0]):
        model.zero_grad()
        model.train()
        one().backward()
        gradients.append({name: value.grad.clone() for name, value in model.detector.named_parameters()})
    differing = {name for name in gradients[0] if not torch.allclose(gradients[0][name], gradients[1][name])}
    assert "backbone.body.conv1.weight" in differing and "backbone.body.conv5.weight" in differing
    assert not [name for name in differing if "backbone.body" not in name]


def test_it_learns_classes_by_heart(parts):
    model, made, batch, _ = parts
    loss, _ = made("normalised", 1.0, "S4")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    found = []
    for epoch in range(40):
        optimiser.zero_grad()
        value, sums = loss(model, replace(batch, epoch=epoch))
        value.backward()
        optimiser.step()
        found.append(sums["class_loss"].item() / 5)
    assert np.mean(found[-8:]) < 0.7 * np.mean(found[:4])


def test_images_of_the_test_part_and_broken_ones_teach_nothing(tmp_path, monkeypatch):
    scenes.write_scenes(tmp_path / "s", 16, 64)
    test = open_detection(str(tmp_path / "s"))[1]
    folder = tmp_path / "mine" / "class"
    for place in range(6):
        target = folder.with_name(f"class{place % 2}") / f"{place}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "s" / test.keys[place], target.with_name(test.keys[place].rsplit("/", 1)[-1]))
    for place in range(8):
        key = open_detection(str(tmp_path / "s"))[0].keys[place]
        name = folder.with_name(f"class{place % 2}") / f"other{place}.png"
        name.write_bytes((tmp_path / "s" / key).read_bytes() if place else b"")
    options = SMALL | {"labelled": str(tmp_path / "s"), "fraction": 1.0, "unlabelled": str(tmp_path / "mine")}
    options |= ALONE | {"max_broken": 0.3}
    others, seen, original = open_dataset(str(tmp_path / "mine")), set(), loop.fit

    def fit(model, loss, source, batches, *rest, **more):
        if rest[3] == "joint":
            seen.update(source.dataset.keys[row] for epoch in range(4) for row in batches(epoch).flatten().tolist())
        original(model, loss, source, batches, *rest, **more)

    monkeypatch.setattr(loop, "fit", fit)
    selftrain(tmp_path / "run", **options)
    assert {key for key in seen if key in others.keys} == {
        key for key in others.keys if "other" in key and "r0" not in key
    }
    record = json.loads((tmp_path / "run" / "selftrain" / "stage.json").read_text())["joint"]
    assert record["result"]["of a class"] == 8 and len(record["broken"]) == 1
    for path in (tmp_path / "mine").rglob("other*.png"):
        path.write_bytes(b"")
    with pytest.raises(StageError, match="joint: none of the images with classes can be read"):
        selftrain(tmp_path / "none", **options | {"max_broken": 1.0})


def test_a_list_with_other_classes_is_refused(tmp_path):
    scenes.write_scenes(tmp_path / "s", 12, 64, 1)
    keys = open_dataset(str(tmp_path / "s")).keys
    rows = [f"{tmp_path}/s/train/{key},{'ab'[place % 2]}" for place, key in enumerate(keys)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    options = SMALL | ALONE | {"unlabelled": str(tmp_path / "list.csv")}
    selftrain(tmp_path / "run", **options)
    rows[0] = rows[0][:-1] + "b"
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(UsageError, match=r"joint in .* was made differently: classes changed"):
        selftrain(tmp_path / "run", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": "jointly"}, "--methods jointly: no such method; did you mean 'joint'"),
        (ALONE | {"rounds": 2}, "--rounds: is not for --methods joint alone; leave it out"),
        (ALONE | {"empty": "drop"}, "--empty: is not for --methods joint alone"),
        ({"methods": "joint"}, "--threshold: is not for --methods joint alone"),
        ({"unlabelled": None}, "the images without boxes have no classes for --methods joint"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        selftrain(tmp_path / "run", **SMALL | options)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_classes_is_refused(tmp_path):
    scenes.write_scenes(tmp_path / "s", 12, 64)
    one = next((tmp_path / "s" / "train").iterdir())
    with pytest.raises(UsageError, match="no classes for --methods joint"):
        stage.check(tmp_path / "run", SMALL | {"unlabelled": str(one)})


def test_in_a_study_it_is_a_method(made, tmp_path):
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in SMALL.items() if name != "fraction")
    (tmp_path / "recipe.toml").write_text(f"[selftrain]\n{lines}\n[grid]\nfraction = [0.5]\n")
    shutil.copytree(made, tmp_path / "out" / "cells" / "fraction-0.5")
    text = study.study(tmp_path / "recipe.toml", tmp_path / "out").read_text()
    assert "| AP % | labelled images alone | with self-training | with joint training |" in text
    assert "| ImageNet Init | 33.3 | 36.0 | 34.0 | 36.6 |" in text


def test_overwrite_leaves_what_the_line_is_not_about(made, copy):
    before = {name: weights(made, name) for name in ("teacher", "student", "joint")}
    selftrain(copy, **SMALL | ALONE, test_threshold=0.001, overwrite=True)
    assert {name: weights(copy, name) for name in before} == before
    held = json.loads((copy / "selftrain" / "stage.json").read_text())
    assert held.keys() == {"teacher", "pseudo", "student", "joint", "scores"}
    assert (copy / "selftrain" / "pseudo.json").is_file()


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (ALONE | {"alpha": 0.5}, {"teacher", "pseudo", "student"}),
        (ALONE | {"lr": 0.2}, set()),  # the student rests on a teacher that goes
        (ALONE, set()),
        ({"methods": "self"}, {"joint"}),
        ({"methods": "self", "alpha": 0.5}, {"teacher", "pseudo", "joint"}),
        ({"methods": "self", "test_threshold": 0.1}, {"teacher", "pseudo", "student", "joint"}),
        ({"methods": "self", "rounds": 2}, {"teacher", "pseudo", "student", "joint"}),
        ({"methods": "self", "teacher": "selftrain/teacher/model.safetensors"}, {"teacher", "joint"}),
        ({"methods": "self", "pseudo": "selftrain/pseudo.json", "alpha": 0.5}, {"teacher", "pseudo", "joint"}),
    ],
)
def test_what_overwrite_removes(made, copy, given, left):
    """Files given instead of steps are those of another run."""
    given = {name: str(made / one) if name in ("teacher", "pseudo") else one for name, one in given.items()}
    steps.remove(copy, stage.check(copy, SMALL | given).steps)
    held = json.loads((copy / "selftrain" / "stage.json").read_text())
    assert held.keys() == left
    for name in ("teacher", "pseudo", "student", "joint"):
        there = copy / "selftrain" / ("pseudo.json" if name == "pseudo" else f"{name}/model.safetensors")
        assert there.is_file() == (name in left)


@pytest.mark.parametrize(
    ("other", "rests"),
    [("teacher", True), ("pseudo", True), ("student-2", True), ("pseudo-10", True), ("student-11", False)],
)
def test_a_round_rests_on_those_before(other, rests):
    assert steps._rests("student-10", other) == rests
    assert steps._rests(other, "student-10") != rests
    assert not steps._rests(other, "joint") and steps._rests("scores", other)


def test_what_is_of_pseudo_boxes_alone_leaves_it_as_it_is(made, copy, capsys):
    options = SMALL | {"threshold": 0.01}
    selftrain(copy, **options | ALONE)
    assert "joint: done before" in capsys.readouterr().err
    selftrain(copy, **options, overwrite=True)
    said = capsys.readouterr().err
    assert "teacher: done before" in said and "joint: done before" in said and "student: done;" in said
    selftrain(copy, **options | {"alpha": 0.5}, overwrite=True)
    said = capsys.readouterr().err
    assert "pseudo: done before" in said and "student: done;" in said and "joint: done;" in said
    assert weights(copy, "joint") != weights(made, "joint")


@pytest.mark.parametrize("strength", ["none", "S3"])
@pytest.mark.parametrize("lost", [(0, 2), (1, 3, 4)])
def test_a_half_of_which_nothing_can_be_read_adds_nothing(parts, strength, lost):
    model, loss, batch, _ = parts
    valid = batch.valid.clone()
    valid[list(lost)] = False
    joint_loss, _ = loss("plain", strength=strength)
    value, sums = joint_loss(model, replace(batch, valid=valid))
    value.backward()
    assert torch.isfinite(value) and all(torch.isfinite(number).all() for number in sums.values())
    gone, left = ("human_loss", "class_loss") if lost == (0, 2) else ("class_loss", "human_loss")
    assert sums[gone] == 0 and sums[left] == pytest.approx(float(value.detach()) * int(valid.sum()), rel=1e-6)


@pytest.fixture(scope="module")
def added(made, tmp_path_factory):
    """The finished run with a training on pseudo-boxes and classes at once."""
    run = tmp_path_factory.mktemp("runs") / "both"
    shutil.copytree(made, run)
    selftrain(run, **BOTH)
    return run


BOTH = SMALL | {"methods": "self,joint,both"}


def test_both_at_once_are_one_more_step_and_one_more_row(made, added):
    records = json.loads((added / "selftrain" / "stage.json").read_text())
    assert list(records) == ["teacher", "pseudo", "student", "joint", "scores", "both"]
    assert {"pseudo-boxes", "classes", "labelled", "unlabelled"} <= records["both"]["inputs"].keys()
    assert list(json.loads((added / "selftrain" / "scores.json").read_text())["scores"])[-1] == "both"
    for name in ("teacher", "student", "joint"):
        assert weights(added, name) == weights(made, name)
    lines = (added / "selftrain" / "both" / "metrics.jsonl").read_text().splitlines()
    assert {"human_loss", "pseudo_loss", "class_loss", "class_right", "ratio"} <= json.loads(lines[-1]).keys()
    state = load_file(added / "selftrain" / "both" / "model.safetensors")
    assert state.keys() == load_file(added / "selftrain" / "student" / "model.safetensors").keys()


def test_both_killed_and_given_again_end_with_the_same_bytes(added, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(added, run)
    wanted = weights(run, "both")
    shutil.rmtree(run / "selftrain" / "both")
    path = run / "selftrain" / "stage.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps({name: records[name] for name in records if name != "both"}))
    original, calls = loop.fit, []

    def fit(model, loss, *rest, **more):
        def killed(model, batch):
            calls.append(batch)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return loss(model, batch)

        original(model, killed, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ktransfer.training.checkpoint.SECONDS", 0.0)
        patch.setattr("ktransfer.training.checkpoint.SHARE", 1e9)
        patch.setattr(loop, "fit", fit)
        selftrain(run, **BOTH)
    assert (run / "selftrain" / "both" / "checkpoint" / "last.pt").is_file()
    selftrain(run, **BOTH)
    assert weights(run, "both") == wanted


@pytest.mark.parametrize("balance", ["normalised", "plain"])
def test_the_loss_of_both_by_hand(parts, balance):
    model, _, batch, labels = parts
    with torch.no_grad():
        both = joint.Both(model.detector, 12, 0)
    labelled = open_detection("scenes:images=4,size=64")[0]
    other = open_detection("scenes:images=6,size=64,seed=1")[0]
    known = truth(student.joined(labelled, other), 64, CPU)
    weighing = student.Weighing(balance, 0.5, 0.9)
    labels = labels.clone()
    labels[5] = -1  # row 9: its class is not known
    own = student.losses(known, "imagenet", "none", 0, weighing, 4)
    value, sums = joint.losses_of_both(own, known.extents, labels, "imagenet", "none", 0, weighing)(both, batch)
    human, pseudo = (sums[name] / 5 for name in ("human_loss", "pseudo_loss"))
    pixels = canvas.normalise(batch.pixels[[1, 4]], known.extents[batch.rows[[1, 4]]], "imagenet")
    told = torch.nn.functional.cross_entropy(both(pixels, classify=True), labels[[2, 0]])
    assert sums["class_loss"].item() / 5 == pytest.approx(told.item(), rel=1e-4)
    # In the first step the moving averages are the losses themselves.
    wanted = (1 + 0.5 + 0.5) * human / 2 if balance == "normalised" else human + 0.5 * pseudo + 0.5 * told
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
    value.backward()
    assert both.classifier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": "both"}, "--methods both: both needs the pseudo-boxes of self; give self,both"),
        ({"methods": "self,both", "unlabelled": None, "fraction": 0.5}, "no classes for --methods both"),
        ({"methods": "self,both", "task": "segment", "channels": 256}, "--methods both: is not for --task segment"),
    ],
)
def test_both_that_cannot_be(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        stage.check(tmp_path / "run", SMALL | options)
