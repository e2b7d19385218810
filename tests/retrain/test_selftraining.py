"""Self-training on small scenes: its files, its steps one by one, kills, and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ktransfer.detection import saved
from ktransfer.errors import StageError, UsageError
from ktransfer.retrain import SelftrainConfig, selftrain, selftraining
from ktransfer.retrain.student import Student
from ktransfer.training import loop

SCENES = "scenes:images=16,size=64"
SMALL = {
    "labelled": SCENES,
    "fraction": 0.5,
    "backbone": "alexnet_bn",
    "width": 0.05,
    "channels": 16,
    "size": 64,
    "epochs": 1,
    "batch": 4,
    "lr": 0.1,
    "threshold": 0.0,
    "precision": "float32",
    "test_threshold": 0.0,
}
FILES = ("teacher/model.safetensors", "pseudo.json", "student/model.safetensors", "scores.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    selftrain(run, **SMALL)
    return run


def contents(run):
    return {name: (run / "selftrain" / name).read_bytes() for name in FILES}


def test_files_and_scores(made, capsys):
    steps = json.loads((made / "selftrain" / "stage.json").read_text())
    assert list(steps) == ["teacher", "pseudo", "student", "scores"]
    assert all(step["state"] == "done" for step in steps.values())
    assert steps["teacher"]["result"] == {"labelled": 8}
    assert steps["student"]["result"]["pseudo-labelled"] == 8
    scores = json.loads((made / "selftrain" / "scores.json").read_text())
    assert list(scores["scores"]) == ["teacher", "student"]
    assert scores["data"] == {"labelled": 8, "test": 12}
    for found in scores["scores"].values():
        assert 0 <= found["AP_interval"][0] <= found["AP"] <= found["AP_interval"][1] <= 1
    lines = [json.loads(line) for line in (made / "selftrain" / "student" / "metrics.jsonl").read_text().splitlines()]
    assert {"human_loss", "pseudo_loss", "ratio", "human_boxes", "pseudo_boxes"} <= set(lines[-1])
    ids = [json.loads((made / "selftrain" / f"{name}.ids.json").read_text()) for name in ("teacher", "student")]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 8
    before = contents(made)
    selftrain(made, **SMALL)
    assert contents(made) == before
    assert "| teacher |" in capsys.readouterr().out


def test_every_parameter_of_a_fresh_detector_moves(made):
    """The trap of reference selftraining.md §2.1: layers that stay frozen at random weights."""
    described = saved.describe(made / "selftrain" / "teacher" / "model.safetensors")
    fresh = dict(saved.make(described, 0).named_parameters())
    for name in ("teacher", "student"):
        state = load_file(made / "selftrain" / name / "model.safetensors")
        still = [key for key, value in fresh.items() if torch.equal(state[key], value.detach())]
        assert still == []


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_killed_and_given_again_it_ends_with_the_same_bytes(made, tmp_path, monkeypatch, where):
    run = tmp_path / "run"
    original, calls = loop.fit, []

    def fit(model, loss, *rest, **more):
        def killed(model, batch):
            calls.append(isinstance(model, Student))
            if calls.count(where == "student") == 2:
                raise KeyboardInterrupt
            return loss(model, batch)

        original(model, killed, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
        patch.setattr(loop, "fit", fit)
        selftrain(run, **SMALL)
    assert not (run / "selftrain" / where / "model.safetensors").exists()
    selftrain(run, **SMALL)
    assert contents(run) == contents(made)


def test_a_later_setting_leaves_the_steps_before_as_they_are(made, tmp_path, capsys):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(made, run)
    with pytest.raises(UsageError, match=r"student in .* was made otherwise: alpha was 1.0, is 0.5"):
        selftrain(run, **SMALL, alpha=0.5)
    capsys.readouterr()
    with pytest.raises(UsageError, match=r"scores in .* was made otherwise: test-threshold was 0\.0, is 0\.5"):
        selftrain(run, **(SMALL | {"test_threshold": 0.5}))
    said = capsys.readouterr().err
    assert "teacher: done before" in said
    assert "student: done before" in said


def test_boxes_of_others_and_a_teacher_of_another_run(made, tmp_path):
    teacher = made / "selftrain" / "teacher" / "model.safetensors"
    held = json.loads((made / "selftrain" / "pseudo.json").read_text())
    for note in held["annotations"]:
        del note["score"]
    (tmp_path / "human.json").write_text(json.dumps(held))
    path = selftrain(
        tmp_path / "run",
        **(SMALL | {"empty": "drop", "balance": "plain", "ema": 0.5}),
        teacher=str(teacher),
        pseudo=str(tmp_path / "human.json"),
    )
    assert list(json.loads((path.parent / "stage.json").read_text())) == ["student", "scores"]


def test_a_teacher_that_sees_nothing_stops_with_a_clear_line(made, tmp_path):
    teacher = made / "selftrain" / "teacher" / "model.safetensors"
    with pytest.raises(StageError, match=r"no pseudo-box reaches the score 1.0 .*--threshold"):
        selftrain(tmp_path / "run", **(SMALL | {"threshold": 1.0}), teacher=str(teacher))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labelled": None}, "no pictures with boxes given"),
        ({"labelled": "nowhere"}, "nowhere"),
        ({"fraction": 1.0}, "no pictures for pseudo-boxes"),
        ({"backbone": "alexnot"}, "alexnot"),
        ({"init": "nothing.safetensors"}, r"nothing\.safetensors"),
        ({"init": "run"}, "retrain is missing"),
        ({"teacher": "nothing.safetensors"}, r"nothing\.safetensors"),
        ({"pseudo": "nothing.json"}, r"nothing\.json"),
        ({"norm": "frozen"}, "norm frozen"),
        ({"detector": "yolo"}, "must be one of retinanet, fasterrcnn"),
        ({"augment": "S5"}, "must be one of none, S1"),
        ({"ids": "ids.json"}, "--ids: says already"),
        ({"pseudo": "x.json", "rounds": 2}, "one round"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(tmp_path, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        selftrain(tmp_path / "run", **(SMALL | options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "selftrain").exists()


def test_the_extra_is_asked_for_when_the_command_starts(tmp_path, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "faster_coco_eval" else original(name, *rest)
    )
    with pytest.raises(UsageError, match=r"pip install 'ktransfer\[detection\]'"):
        selftrain(tmp_path / "run", **SMALL)


def test_settings_of_the_paper_are_the_defaults():
    config = SelftrainConfig()
    assert (config.size, config.threshold, config.detector, config.rounds) == (640, 0.5, "retinanet", 1)
    assert config.batch == 256
    assert selftraining.NECKS["retinanet"] == "p3-p7"
