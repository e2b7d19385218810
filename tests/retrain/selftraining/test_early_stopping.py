"""Early stopping of a self-training: who evaluates, what is kept, and kills."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import SELFTRAIN

from ktransfer.data import scenes
from ktransfer.detection import canvas, metrics, saved
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_detection
from ktransfer.detection.predictions import detect
from ktransfer.errors import StageError, UsageError
from ktransfer.retrain import SelftrainConfig, selftrain
from ktransfer.retrain.selftraining import early_stopping
from ktransfer.training import loop

SCENES = "scenes:images=16,size=64"
SMALL = SELFTRAIN | {"fraction": 0.75, "epochs": 6, "test_threshold": 0.0, "patience": 5, "held_out": 0.25}
WEIGHTS = "model.safetensors"
FILES = [f"{name}/{file}" for name in ("teacher", "student") for file in (WEIGHTS, early_stopping.IDS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with the average of the student, and the rows of each batch."""
    seen, original = {}, loop.fit

    def fit(model, loss, source, batches, *rest):
        seen[rest[3]] = {row for epoch in range(6) for row in batches(epoch).flatten().tolist()}
        original(model, loss, source, batches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "fit", fit)
        folder = selftrain(tmp_path_factory.mktemp("runs") / "whole", **SMALL, ema=0.5).parent
    return folder, seen


def contents(folder):
    return {name: (folder / name).read_bytes() for name in [*FILES, "pseudo.json", "scores.json"]}


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_what_is_held_out_is_not_learned_and_gives_the_number(made, name):
    folder, seen = made
    record = json.loads((folder / "stage.json").read_text())[name]
    labelled = json.loads((folder / f"{name}.ids.json").read_text())
    held = json.loads((folder / name / early_stopping.IDS).read_text())
    assert (len(labelled), len(held), record["result"]["held-out"]) == (12, 3, 3)
    rows = {labelled.index(number) for number in held}
    assert not rows & seen[name]
    assert seen[name] >= set(range(12)) - rows
    assert f"{name}/{early_stopping.IDS}" in record["outputs"]
    whole, _ = open_detection(SCENES)
    model, _ = saved.load(folder / name / WEIGHTS)
    places = torch.tensor([whole.ids.index(number) for number in held])
    source = canvas.canvases(whole, 64, cache="off")
    predictions = detect(model, whole, source, places, 64, Settings(), torch.device("cpu"))
    found = metrics.coco_scores(whole, predictions)
    assert record["result"]["held-out AP"] == pytest.approx(found["AP"], abs=1e-6)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line[early_stopping.MEASURE] for line in lines if early_stopping.MEASURE in line]
    best = (
        np.argmax(evaluated) + 1 if max(evaluated) > 0 else len(evaluated)
    )  # before anything is found the last is the best
    assert (len(evaluated), best) == (record["result"]["passes"], record["result"]["best pass"])
    assert max(evaluated) == pytest.approx(found["AP"], abs=1e-6)
    assert max(evaluated) > 0 or name == "student"  # which learns too little in twelve steps of two kinds of boxes


@pytest.mark.parametrize(("where", "when"), [("teacher", 8), ("student", 5)])
def test_killed_it_ends_with_the_same_bytes(made, tmp_path, monkeypatch, where, when):
    original = loop.fit

    def fit(model, loss, *rest):
        calls = iter(range(100))

        def killed(model, batch):
            if rest[5] == where and next(calls) == when:
                raise KeyboardInterrupt
            return loss(model, batch)

        original(model, killed, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ktransfer.training.checkpoint.SECONDS", 0.0)
        patch.setattr("ktransfer.training.checkpoint.SHARE", 1e9)
        patch.setattr(loop, "fit", fit)
        selftrain(tmp_path / "run", **SMALL, ema=0.5)
    assert contents(selftrain(tmp_path / "run", **SMALL, ema=0.5).parent) == contents(made[0])


def test_it_stops_with_the_weights_of_the_best_pass(tmp_path, monkeypatch):
    """With a constant rate these are the weights of a training that is only so long."""
    told = iter([0.2, 0.3, 0.1, 0.3, 0.4, 0.1, 0.1, 0.1, 0.2])
    evaluate = SimpleNamespace(coco_scores=lambda *_: {"AP": next(told), "AP50": 0.5})
    monkeypatch.setattr(early_stopping, "metrics", evaluate)
    options = SMALL | {"patience": 2, "schedule": "constant", "warmup": 0.0}
    folder = selftrain(tmp_path / "run", **options).parent
    results = [json.loads((folder / "stage.json").read_text())[name]["result"] for name in ("teacher", "student")]
    assert [(one["passes"], one["best pass"], one["held-out AP"]) for one in results] == [(4, 2, 0.3), (3, 1, 0.4)]
    for passes, name, more in ((2, "teacher", {}), (1, "student", {"teacher": str(folder / "teacher" / WEIGHTS)})):
        told = iter([0.1, 0.2, 0.1, 0.2])
        other = selftrain(tmp_path / name, **options | {"epochs": passes} | more).parent
        one, two = (load_file(path / name / WEIGHTS) for path in (folder, other))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_without_patience_nothing_is_held_out(tmp_path):
    data, _ = open_detection(SCENES)
    assert len(early_stopping.rows(data, SelftrainConfig())) == 0
    held = early_stopping.rows(data, SelftrainConfig(patience=1, held_out=0.25, seed=3))
    assert len(held) == 4
    assert set(early_stopping.rows(data, SelftrainConfig(patience=1, held_out=0.125, seed=3))) < set(held)
    learned, evaluating = early_stopping.divided(torch.tensor([5, 3, *held.tolist(), 2]), held)
    assert evaluating.tolist() == held.tolist()
    assert learned.tolist() == [row for row in (5, 3, 2) if row not in held]


def test_too_few_images_are_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"--patience: no box among the 0 other ones of 1 labelled images; change"):
        selftrain(tmp_path / "run", **(SMALL | {"fraction": 0.05}))
    assert not (tmp_path / "run" / "selftrain").exists()
    data, _ = open_detection(SCENES)
    nothing = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(StageError, match="no box in the held-out images that can be read"):
        early_stopping.stopping(None, data, None, nothing, SelftrainConfig(patience=1), None, tmp_path)


@pytest.mark.parametrize("methods", ["self", "joint"])
def test_images_that_are_held_out_and_unlabelled_too_teach_nothing(tmp_path, monkeypatch, capsys, methods):
    """Labelled and unlabelled images are the same folder: pseudo-boxes would teach those that evaluate."""
    scenes.write_scenes(tmp_path / "s", 12, 64)
    seen, original = set(), loop.fit

    def fit(model, loss, source, batches, *rest):
        if rest[3] != "teacher":
            rows = {row for epoch in range(8) for row in batches(epoch).flatten().tolist()}
            seen.update(source.dataset.keys[row].rsplit("/", 1)[-1] for row in rows)
        original(model, loss, source, batches, *rest)

    monkeypatch.setattr(loop, "fit", fit)
    options = SMALL | {"labelled": str(tmp_path / "s"), "unlabelled": str(tmp_path / "s" / "train"), "fraction": 1.0}
    options |= {"epochs": 1, "methods": methods, "patience": 1, "threshold": 0.0 if methods == "self" else 0.5}
    folder = selftrain(tmp_path / "run", **options).parent
    whole, _ = open_detection(str(tmp_path / "s"))
    numbers = json.loads((folder / "teacher" / early_stopping.IDS).read_text())
    held = {whole.keys[whole.ids.index(number)].rsplit("/", 1)[-1] for number in numbers}
    assert len(held) == 3 and len(seen) == 9 and not held & seen
    assert "3 of the unlabelled images are held out" in capsys.readouterr().err
