"""Rotation and context as tasks of the stage: files, measures, resumption and refusals."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ktransfer import networks
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.pretext import permutations, pretext, solving, stage, tasks
from ktransfer.pretext.config import PretextConfig
from ktransfer.pretext.tasks import SETTINGS, SHEETS, open_task, usual_size
from ktransfer.training.batch import Batch

SCENES = "scenes:images=40,size=64"
NEW = ("rotation", "context")
SMALL = {
    "data": SCENES,
    "arch": "alexnet_bn",
    "width": 0.05,
    "epochs": 2,
    "batch": 16,
    "precision": "float32",
    "device": "cpu",
}
NOUNS = {"rotation": "rotations", "context": "pairs"}
GROUPS = {
    "rotation": [f"held_out_accuracy_{degrees}_degrees" for degrees in (0, 90, 180, 270)],
    "context": [f"held_out_accuracy_place_{place}" for place in range(8)],
}


def metrics(run):
    return [json.loads(line) for line in (run / "pretext" / "metrics.jsonl").read_text().splitlines()]


def record(run):
    return json.loads((run / "pretext" / "stage.json").read_text())["pretext"]


def settings(task, **options):
    return replace(PretextConfig(), task=task, size=64, precision="float32", **options)


def batch(count=12, epoch=3):
    rows = torch.arange(count)
    return Batch(rows, *ImageLoader(open_dataset(SCENES), 64).batch(rows), epoch)


@pytest.fixture(scope="module", params=NEW)
def finished(request, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / request.param
    return request.param, run, pretext(run, task=request.param, held_out=0.25, **SMALL)


def test_the_files_and_measures_of_a_finished_stage(finished):
    task, run, weights = finished
    assert {path.name for path in weights.parent.iterdir()} == {
        "stage.json",
        "metrics.jsonl",
        "model.safetensors",
        f"{task}.png",
    }
    with Image.open(weights.parent / f"{task}.png") as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 100
    network = networks.describe(weights)
    rotation = Network("alexnet_bn", 0.05, 4, 64, 0, "imagenet", "rotation")
    assert network == (rotation if task == "rotation" else Network("alexnet_bn", 0.05, 2, 64, 0, "picture", "context"))
    state, facts = load_file(weights), record(run)
    assert state["head.fc8.weight"].shape[0] == (4 if task == "rotation" else 8)
    assert networks.load(weights, network).state_dict().keys() == {n for n in state if not n.startswith("head.")}
    assert set(facts["outputs"]) == {"model.safetensors", f"{task}.png"} and set(facts["inputs"]) == {"data"}
    assert facts["config"]["tile"] == (56 if task == "rotation" else 14)
    result = facts["result"]
    assert set(result) <= {"held_out_accuracy", f"held_out_{NOUNS[task]}", *GROUPS[task]}
    assert result[f"held_out_{NOUNS[task]}"] == (40 if task == "rotation" else 10)
    assert [line["epoch"] for line in metrics(run) if "held_out_accuracy" in line] == [0, 1]


@pytest.mark.parametrize(("task", "classes"), [("rotation", 4), ("context", 8)])
def test_the_first_loss_is_that_of_guessing(tmp_path, task, classes):
    pretext(tmp_path, task=task, **SMALL | {"batch": 40, "epochs": 1, "held_out": 0.0})
    first = metrics(tmp_path)[0]
    assert first["step"] == 1 and first["loss"] == pytest.approx(math.log(classes), rel=0.05)
    assert first["accuracy"] < 0.5


def test_a_stopped_run_goes_on_to_the_same_bytes(finished, tmp_path, monkeypatch):
    task, _, weights = finished
    monkeypatch.setattr("ktransfer.training.checkpoint.SECONDS", 0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SHARE", math.inf)
    real, calls = solving.loss, []

    def stopping(*given, **named):
        calls.append(1)
        found = real(*given, **named)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(solving, "loss", stopping)
    monkeypatch.setattr("ktransfer.pretext.stage.tell_plan", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        pretext(tmp_path, task=task, held_out=0.25, **SMALL)
    assert record(tmp_path)["state"] == "running"
    pretext(tmp_path, task=task, held_out=0.25, workers=2, **SMALL)
    assert len(calls) == 2 + 1  # two epochs of one step: the last one again
    for name in ("model.safetensors", f"{task}.png"):
        assert (tmp_path / "pretext" / name).read_bytes() == (weights.parent / name).read_bytes()


@pytest.mark.parametrize("task", NEW)
@pytest.mark.parametrize("arch", networks.TRUNKS)
def test_every_trunk_learns_every_task(tmp_path, task, arch):
    options = SMALL | {"arch": arch, "epochs": 1, "limit": 8, "batch": 4}
    weights = pretext(tmp_path, task=task, **options)
    jigsaw = Network(arch, 0.05, 2, 64)
    network = networks.describe(weights)
    trunk = networks.load(weights, network)
    # The layers go by the same names as those of a network that learned puzzles.
    assert networks.layers(network, trunk) == networks.layers(jigsaw, networks.build(jigsaw, 0, "t"))
    assert all(value.isfinite().all() for value in load_file(weights).values())


@pytest.mark.parametrize("task", NEW)
def test_it_learns_by_heart(tmp_path, capsys, task):
    options = SMALL | {"width": 0.1, "lr": 0.05}
    pretext(tmp_path / "run", task=task, overfit=12, **options)
    number = 48 if task == "rotation" else 12
    assert f"all {number} {NOUNS[task]} solved" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("task", "least"), [("rotation", 0.9), ("context", 0.8)])
def test_it_learns_images_that_it_has_not_seen(tmp_path, task, least):
    """Stripes that get finer downwards and to the right tell which way is up, and which patch lies where."""
    root = tmp_path / "data"
    root.mkdir()
    random = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 64
    for row in range(64):
        noise = random.integers(0, 20, (64, 64))
        stripes = np.sin(60 * y * (0.2 + y)) + np.sin(60 * x * (0.2 + x) + 1)
        pixels = (128 + 50 * stripes + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(np.repeat(pixels[..., None], 3, axis=2)).save(root / f"{row:02}.png")
    epochs = 20 if task == "rotation" else 60
    options = {"data": str(root), "epochs": epochs, "held_out": 0.25, "width": 0.2, "lr": 0.02}
    pretext(tmp_path / "run", task=task, **SMALL | options)
    last = [line for line in metrics(tmp_path / "run") if "held_out_accuracy" in line][-1]
    assert last["held_out_accuracy"] > least
    assert last[f"held_out_{NOUNS[task]}"] == (64 if task == "rotation" else 16)


def test_a_plan_needs_the_usual_permutations_by_their_hash_alone():
    tasks._generated.cache_clear()
    opened = open_task(settings("jigsaw"))
    assert tasks._generated.cache_info().misses == 0
    assert opened.inputs["permutations"] == permutations.summarise(permutations.generate()).sha256
    assert opened.classes == len(opened.make.keywords["permutations"]()) == 701
    other = open_task(settings("jigsaw", min_distance=4))
    assert other.inputs["permutations"] == permutations.summarise(permutations.generate(701, 4)).sha256


@pytest.mark.parametrize("task", NEW)
def test_a_broken_image_makes_nothing_and_changes_no_other(task):
    given, opened = batch(), open_task(settings(task))
    whole = opened.make(given)
    valid = given.valid.clone()
    valid[5] = False
    left = opened.make(replace(given, valid=valid))
    each = 4 if task == "rotation" else 1
    kept = [each * row + part for row in range(12) if row != 5 for part in range(each)]
    assert torch.equal(left.label, whole.label[kept]) and torch.equal(left.tiles, whole.tiles[kept])
    assert len(whole.label) == 12 * each


@pytest.mark.parametrize("task", NEW)
def test_accuracy_is_the_share_of_solved_examples_overall_and_by_group(task):
    """A network that is wrong about label 1 alone: tiles are replaced by the prediction."""
    opened = open_task(settings(task))

    def telling(given):
        made = opened.make(given)
        prediction = torch.where(made.label == 1, 0, made.label)
        return made._replace(tiles=10.0 * nn.functional.one_hot(prediction, opened.classes))

    seeing = replace(opened, make=telling)
    given = batch()
    share = float((opened.make(given).label != 1).double().mean())
    value, sums = solving.loss(nn.Identity(), given, seeing)
    assert float(sums["count"]) == 12 and float(sums["accuracy"]) / 12 == pytest.approx(share)
    assert value.isfinite()
    data, rows = open_dataset(SCENES), torch.arange(40)
    config = settings(task, batch=7)
    found = solving.accuracy(nn.Identity(), seeing, ImageLoader(data, 64), rows, config, torch.device("cpu"))
    assert [found[name] for name in GROUPS[task]] == [float(place != 1) for place in range(opened.classes)]
    held_out = opened.make(Batch(rows, *ImageLoader(data, 64).batch(rows), solving.HELD_OUT_EPOCH))
    assert found["held_out_accuracy"] == pytest.approx(float((held_out.label != 1).double().mean()))
    assert solving.summary(found, opened).startswith(
        f"{found['held_out_accuracy']:.1%} of held-out {NOUNS[task]} solved"
    )
    assert solving.accuracy(nn.Identity(), seeing, ImageLoader(data, 64), rows[:0], config, torch.device("cpu")) == {}


def test_another_task_is_refused_and_overwriting_removes_the_other_sheet(finished, tmp_path):
    task, run, weights = finished
    before = weights.read_bytes()
    with pytest.raises(UsageError, match=rf"task was '{task}', is 'jigsaw'[^\n]*--overwrite"):
        pretext(run, task="jigsaw", held_out=0.25, **SMALL)
    assert weights.read_bytes() == before
    pretext(tmp_path, task="jigsaw", **SMALL | {"epochs": 1, "permutations": 4})
    pretext(tmp_path, task=task, overwrite=True, **SMALL | {"epochs": 1})
    assert {path.name for path in (tmp_path / "pretext").glob("*.png")} == {f"{task}.png"}


def test_colours_of_context():
    assert open_task(settings("context")).make.keywords["context"].colour == "dropped"
    assert open_task(settings("context", colour="projected")).make.keywords["context"].colour == "projected"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"task": "rotation", "permutations": 701},
            "--permutations 701: --task rotation has no such option (only jigsawpp",
        ),
        ({"task": "rotation", "colour": "paper"}, "no such option (only jigsawpp, jigsaw, context); leave it out"),
        ({"task": "context", "min-distance": 3}, "--min-distance 3: --task context has no such option"),
        ({"task": "context", "permutation_file": "a.bin"}, "--permutation-file a.bin: --task context has no such"),
        ({"task": "context", "colour": "released"}, "--task context takes paper or projected"),
        ({"task": "context", "tile": 16}, "three patches of 16 pixels with their gaps are wider than images of 64"),
        ({"task": "context", "size": 35}, "tiles of 7 pixels are too small for any network; give at least --size 36"),
        ({"task": "rotation", "tile": 65}, "tile 65 is larger than the images of 64 pixels"),
        ({"task": "rotation", "tile": 5}, "--tile 5: too small"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(tmp_path, given, message):
    with pytest.raises(UsageError) as caught:
        pretext(tmp_path / "run", **SMALL | given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_every_task_has_its_settings_its_sheet_and_its_least_size():
    choices = PretextConfig.__dataclass_fields__["task"].metadata["choices"]
    assert set(choices) == set(SETTINGS) == set(SHEETS) == set(stage.LEAST_SIZE)
    for task, least in stage.LEAST_SIZE.items():
        smaller, enough = (open_task(replace(PretextConfig(), task=task, size=size)) for size in (least - 1, least))
        assert smaller.side < stage.LEAST_TILE <= enough.side
    assert [usual_size(task, 500) for task in choices] == [255, 255, 256, 256]
    assert [usual_size(task, 100) for task in choices] == [99, 99, 100, 100]
