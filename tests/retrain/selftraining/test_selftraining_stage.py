"""Self-training on small scenes: its files, its steps one by one, kills, and refusals."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import SELFTRAIN

from ktransfer import cli, plan
from ktransfer.data import scenes
from ktransfer.detection import saved
from ktransfer.detection.opening import open_detection
from ktransfer.detection.predictions import Prediction
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import checkpoints, published
from ktransfer.retrain import SelftrainConfig, selftrain
from ktransfer.retrain.selftraining import boxes, detecting, stage
from ktransfer.retrain.selftraining.student import Student
from ktransfer.training import loop

SCENES = "scenes:images=16,size=64"
SMALL = SELFTRAIN | {"test_threshold": 0.0}
FILES = ("teacher/model.safetensors", "pseudo.json", "student/model.safetensors", "scores.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    selftrain(run, **SMALL)
    return run


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def contents(run):
    return {name: (run / "selftrain" / name).read_bytes() for name in FILES}


def test_files_and_scores(made, capsys):
    steps = json.loads((made / "selftrain" / "stage.json").read_text())
    assert list(steps) == ["teacher", "pseudo", "student", "scores"]
    assert all(step["state"] == "done" for step in steps.values())
    assert steps["teacher"]["result"] == {"labelled": 8}
    assert steps["student"]["result"]["pseudo-labelled"] == 8
    by_class = np.array(list(steps["student"]["result"]["boxes by class, labelled and pseudo"].values()))
    assert by_class[:, 1].sum() == steps["student"]["result"]["pseudo-boxes"]
    whole = open_detection(SCENES)[0]
    ids = json.loads((made / "selftrain" / "student.ids.json").read_text())
    labels = [one.labels for number, one in zip(whole.ids, whole.objects, strict=True) if number in ids]
    assert by_class[:, 0].tolist() == np.bincount(np.concatenate(labels), minlength=12).tolist()
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


def test_a_published_network_is_a_backbone(tmp_path):
    selftrain(tmp_path, **SMALL | {"init": "efficientnet-lite0", "epochs": 1, "norm": "bn"})
    described = saved.describe(tmp_path / "selftrain" / "teacher" / "model.safetensors")
    assert described.network.arch == "timm:tf_efficientnet_lite0" and described.network.size == 64
    fresh = dict(saved.make(described, 0).named_parameters())["backbone.body.conv_stem.weight"]
    found = load_file(tmp_path / "selftrain" / "student" / "model.safetensors")["backbone.body.conv_stem.weight"]
    start = checkpoints.read_tensors(published.weights("efficientnet-lite0"))["_conv_stem.weight"]
    assert (found - start).abs().mean() < 0.1 * (found - fresh).abs().mean()


def test_every_parameter_of_a_fresh_detector_moves(made):
    """The trap of reference stage.md §2.1: layers that stay frozen at random weights."""
    described = saved.describe(made / "selftrain" / "teacher" / "model.safetensors")
    fresh = dict(saved.make(described, 0).named_parameters())
    for name in ("teacher", "student"):
        state = load_file(made / "selftrain" / name / "model.safetensors")
        still = [key for key, value in fresh.items() if torch.equal(state[key], value.detach())]
        assert still == []


def test_the_student_sees_other_crops_than_its_teacher(made):
    """The same labelled images, augmented by draws of its own: else it would see what its teacher has learned by."""
    teacher, student = (
        np.asarray(Image.open(made / "selftrain" / name / "augmented.png")) for name in ("teacher", "student")
    )
    assert teacher.shape == student.shape
    rows = (teacher == student)[4:].reshape(6, -1)  # twice: images as they are, in epoch 0, in epoch 1
    assert rows[[0, 3]].all()
    assert rows[[1, 2, 4, 5]].mean(axis=1).max() < 0.7


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
        patch.setattr("ktransfer.training.checkpoint.SECONDS", 0.0)
        patch.setattr("ktransfer.training.checkpoint.SHARE", 1e9)
        patch.setattr(loop, "fit", fit)
        selftrain(run, **SMALL)
    assert not (run / "selftrain" / where / "model.safetensors").exists()
    selftrain(run, **SMALL)
    assert contents(run) == contents(made)


@pytest.mark.parametrize(("step", "label"), [("pseudo", "predict pseudo"), ("scores", "evaluate student")])
def test_killed_while_it_looks_at_images_it_goes_on(made, copy, monkeypatch, step, label):
    path = copy / "selftrain" / "stage.json"
    records = json.loads(path.read_text())
    kept = list(records)[: list(records).index(step)]
    path.write_text(json.dumps({name: records[name] for name in kept}))
    original = detecting.detect

    def detect(*given, **more):
        if more["label"] == label:
            raise KeyboardInterrupt
        return original(*given, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(detecting, "detect", detect)
        selftrain(copy, **SMALL)
    assert json.loads(path.read_text())[step]["state"] == "running"
    if step == "pseudo":  # the student of the copy is done, of the same boxes
        path.write_text(json.dumps(json.loads(path.read_text()) | {"student": records["student"]}))
    selftrain(copy, **SMALL)
    assert contents(copy) == contents(made)


def test_a_later_setting_leaves_the_steps_before_as_they_are(copy, capsys):
    run = copy
    with pytest.raises(UsageError, match=r"student in .* was made differently: alpha was 1.0, is 0.5"):
        selftrain(run, **SMALL, alpha=0.5)
    capsys.readouterr()
    path = selftrain(run, **(SMALL | {"test_threshold": 0.5}))
    assert json.loads(path.read_text())["test_threshold"] == 0.5
    said = capsys.readouterr().err
    assert "teacher: done before" in said
    assert "student: done before" in said


def test_overwrite_makes_what_was_made_otherwise_and_all_after_it(made, copy, capsys):
    before = contents(made)
    teacher = str(copy / "selftrain" / "teacher" / "model.safetensors")
    with pytest.raises(UsageError, match=r"--teacher .*: --overwrite would remove it"):
        selftrain(copy, **SMALL, teacher=teacher, overwrite=True)
    assert contents(copy) == before
    for options, anew in (({"alpha": 0.5}, ["student"]), ({}, ["student"]), ({}, ["teacher", "pseudo", "student"])):
        capsys.readouterr()
        selftrain(copy, **SMALL, **options, overwrite=True)
        said = capsys.readouterr().err
        for name in ("teacher", "pseudo", "student"):
            assert (f"{name}: done before" in said) == (name not in anew)
        found = contents(copy)
        assert (found == before) == (not options)
        assert found["pseudo.json"] == before["pseudo.json"]


def test_a_line_is_refused_before_its_first_stage(copy):
    def line(**options):
        plan.refuse_changes(plan.plan_line([("selftrain", SMALL | options)], copy))

    with pytest.raises(UsageError, match=r"teacher in .* was made differently: lr was 0\.1, is 0\.2. Give selftrain"):
        line(lr=0.2)
    line(test_threshold=0.5)
    line(lr=0.2, overwrite=True)


def test_after_ctrl_c_overwrite_is_not_given_again(copy, capsys, monkeypatch):
    words = ["--run", str(copy), "selftrain", "--alpha", "0.5", "--overwrite"]
    words += [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def fit(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", fit)
        assert cli.main(words) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    said = shlex.split(last[last.index("ktransfer --run") :])[1:]
    assert said == [word for word in words if word != "--overwrite"]
    assert cli.main(said) == 0
    assert "teacher: done before" in capsys.readouterr().err


def test_a_student_becomes_the_next_teacher(made, tmp_path):
    teacher = str(made / "selftrain" / "teacher" / "model.safetensors")
    options = SMALL | {"rounds": 2, "adaptive": True, "ema": 0.5, "teacher": teacher}
    folder = selftrain(tmp_path / "run", **options).parent
    steps = json.loads((folder / "stage.json").read_text())
    assert list(steps) == ["pseudo", "student", "pseudo-2", "student-2", "scores"]
    names = ("student/model.safetensors", "student-2/model.safetensors")
    weights = [steps[name.split("/")[0]]["outputs"][name]["sha256"] for name in names]
    assert steps["pseudo-2"]["inputs"]["teacher"] == weights[0]
    assert steps["scores"]["inputs"]["student"] == weights[1]
    whole = open_detection(SCENES)[0]
    ids = json.loads((folder / "student.ids.json").read_text())
    labelled = sum(len(one.boxes) for number, one in zip(whole.ids, whole.objects, strict=True) if number in ids)
    assert 0 < steps["student"]["result"]["pseudo-boxes"] <= labelled < steps["pseudo"]["result"]["boxes"]


def test_a_network_that_this_line_makes_anew_is_not_looked_at(tmp_path):
    (tmp_path / "retrain").mkdir()
    (tmp_path / "retrain" / "model.safetensors").write_bytes(b"of another network")
    target = {"data": "scenes:images=16,size=64", "labels": "classes", "arch": "alexnet_bn", "width": 0.05, "size": 64}
    line = plan.plan_line([("retrain", target), ("selftrain", SMALL | {"init": "run"})], tmp_path)
    assert "init" not in line[1].steps[0].inputs
    assert line[1].detector.network.size == 64


def test_with_a_teacher_the_student_is_checked_too(made, tmp_path):
    teacher = made / "selftrain" / "teacher" / "model.safetensors"
    with pytest.raises(UsageError, match="alexnot"):
        selftrain(tmp_path / "run", **(SMALL | {"backbone": "alexnot"}), teacher=str(teacher))
    assert not (tmp_path / "run").exists()


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
        ({"labelled": None}, "no images with boxes were given"),
        ({"labelled": "nowhere"}, "nowhere"),
        ({"fraction": 1.0}, "no images for pseudo-boxes"),
        ({"backbone": "alexnot"}, r"--backbone alexnot: no such network"),
        ({"backbone": "resnet18", "width": 0.5}, r"--width 0.5: only .* not resnet18"),
        ({"init": "nothing.safetensors"}, r"nothing\.safetensors"),
        ({"init": "run"}, "retrain is missing"),
        ({"init": "hog"}, "--init hog: has no weights"),
        ({"init": "timm:resnet50"}, "--init timm:resnet50: a name of timm comes without weights"),
        ({"init": "no_such.nets:net"}, "--init no_such.nets:net: has no weights"),
        ({"teacher": "nothing.safetensors"}, r"nothing\.safetensors"),
        ({"pseudo": "nothing.json"}, r"nothing\.json"),
        ({"norm": "frozen"}, "norm frozen"),
        ({"detector": "yolo"}, "must be one of retinanet, fasterrcnn"),
        ({"augment": "S5"}, "must be one of none, S1"),
        ({"ids": "ids.json"}, "--ids: already chooses"),
        ({"pseudo": "x.json", "rounds": 2}, "one round"),
        ({"micro_batch": 4}, "--micro-batch 4: .* all 8 images"),
        ({"cache_images": "device", "device": "cpu"}, "--cache-images device"),
        ({"ema": 1.0}, "must be at most 0.9999"),
        ({"head": "fpn"}, "--head: is not for --task detect; leave it out"),
        ({"scales": "0.5,1"}, "--scales: is not for --task detect"),
        ({"detector": "fasterrcnn", "focal_gamma": 2.0}, "--focal-gamma: is not for --detector fasterrcnn"),
        ({"held_out": 0.2}, "--held-out: is not for trainings without --patience"),
        ({"balance": "plain", "decay": 0.9}, "--decay: is not for --balance plain"),
        ({"fraction": 1.0, "ids": "ids.json", "stratified": True}, "--stratified: is not for --ids without --patience"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(tmp_path, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        selftrain(tmp_path / "run", **(SMALL | options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "selftrain").exists()


def test_a_labelled_image_that_evaluates_too_is_refused(tmp_path):
    root, ids = tmp_path / "s", tmp_path / "ids.json"
    scenes.write_scenes(root, 12, 64)
    given = SMALL | {"labelled": str(root), "fraction": 1.0, "unlabelled": "scenes:images=12,size=64,seed=1"}
    stage.check(tmp_path / "run", given)  # the names alone are the same in both parts
    shutil.copy(root / "train" / "chair" / "000001.jpg", root / "val" / "chair" / "000001.jpg")
    with pytest.raises(UsageError, match=r"1 of its training images are test images too, such as train/chair/0"):
        stage.check(tmp_path / "run", given)
    ids.write_text("[1, 3, 4]")
    assert len(stage.check(tmp_path / "run", given | {"ids": str(ids)}).work.data.labelled) == 3


def test_labelled_images_without_a_box_are_told_by_what_chose_them(tmp_path):
    root, ids = tmp_path / "s", tmp_path / "ids.json"
    scenes.write_scenes(root, 12, 64)
    held = json.loads((root / "train.json").read_text())
    held["annotations"] = [note for note in held["annotations"] if note["image_id"] != 2]
    (root / "train.json").write_text(json.dumps(held))
    ids.write_text("[2]")
    with pytest.raises(UsageError, match=r"--ids .*ids\.json: no box in 1 images"):
        stage.check(tmp_path / "run", SMALL | {"labelled": str(root), "fraction": 1.0, "ids": str(ids)})


def test_the_extra_is_asked_for_when_the_command_starts(tmp_path, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "faster_coco_eval" else original(name, *rest)
    )
    with pytest.raises(UsageError, match=r"pip install 'ktransfer\[detection\]'"):
        selftrain(tmp_path / "run", **SMALL)


def test_samples_are_passes_over_the_labelled_images(tmp_path):
    short = SMALL | {"student_epochs": 1}
    selftrain(tmp_path / "samples", **short | {"samples": 12})  # 8 labelled images: two passes
    selftrain(tmp_path / "passes", **short | {"epochs": 2})
    assert contents(tmp_path / "samples") == contents(tmp_path / "passes")


def test_the_detector_s_constants_are_options(tmp_path):
    selftrain(tmp_path, **SMALL, anchor=2.0, focal_gamma=2.0, huber_weight=10.0, soft_nms=0.3)
    settings = saved.describe(tmp_path / "selftrain" / "student" / "model.safetensors").settings
    assert (settings.anchor, settings.focal_gamma, settings.huber_weight) == (2.0, 2.0, 10.0)


def test_rates_are_those_of_the_papers_in_proportion_to_the_batch(tmp_path):
    wide = SMALL | {"backbone": "vgg16_bn", "batch": 64, "lr": 0.0}
    assert stage.check(tmp_path, wide).work.config.lr == pytest.approx(0.08)
    masks = wide | {"task": "segment", "head": "fpn", "test_threshold": SelftrainConfig.test_threshold}
    assert stage.check(tmp_path, masks).work.config.lr == pytest.approx(0.02)
    assert stage.check(tmp_path, wide | {"lr": 0.3}).work.config.lr == 0.3


@pytest.mark.parametrize("each", [1, 8])
def test_few_pseudo_boxes_are_told(tmp_path, capsys, each):
    """One box in every eighth image, or in every image."""
    planned = stage.check(tmp_path / "run", SMALL)
    config, data = planned.work.config, planned.work.data
    other = boxes.without_boxes(data.unlabelled, data.labelled)
    one = Prediction(torch.tensor([[1.0, 1.0, 30.0, 30.0]]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    none = Prediction(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    boxes.write(tmp_path / "p.json", other, {row: one if row < each else none for row in range(8)}, {})
    stage._with_pseudo(config, data, "student", tmp_path / "p.json")
    assert ("background" in capsys.readouterr().err) == (each == 1)
