"""Labelling: what a teacher is shown, what of it is kept when it is killed, and which images are left out."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import SELFTRAIN

from ktransfer.data import scenes
from ktransfer.detection import saved
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_detection
from ktransfer.errors import BrokenImage, StageError
from ktransfer.networks import Network
from ktransfer.retrain import selftrain
from ktransfer.retrain.selftraining import detecting, stage
from ktransfer.training import loop

SMALL = SELFTRAIN | {"test_threshold": 0.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A detector as it begins, which sees boxes everywhere."""
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    classes = open_detection(SMALL["labelled"])[0].classes
    network = Network("alexnet_bn", 0.05, 4, 64, 0, "imagenet", "random")
    described = saved.Described(network, "p3-p7", Settings("retinanet", threshold=0.0), classes, 64, 16)
    saved.save(path, saved.make(described, 0), described)
    return path


@pytest.fixture
def images(tmp_path):
    """Scenes as files, 16 to learn and some to test; the first eight to learn are broken."""
    scenes.write_scenes(tmp_path / "s", 16, 64)
    for key in open_detection(str(tmp_path / "s"))[0].keys[:8]:
        (tmp_path / "s" / key).write_bytes(b"")
    return tmp_path / "s"


def test_broken_images_are_in_no_batch(images, tmp_path, monkeypatch):
    options = SMALL | {"labelled": str(images), "fraction": 1.0, "unlabelled": "scenes:images=8,size=64,seed=1"}
    seen, original = {}, loop.fit

    def fit(model, loss, source, batches, *rest):
        seen[rest[3]] = {row for epoch in range(5) for row in batches(epoch).flatten().tolist()}
        original(model, loss, source, batches, *rest)

    monkeypatch.setattr(loop, "fit", fit)
    folder = selftrain(tmp_path / "run", **options, max_broken=0.5).parent
    assert seen == {"teacher": set(range(8, 16)), "student": set(range(8, 24))}
    assert (folder / "student" / "augmented.png").is_file()
    with pytest.raises(StageError, match="8 of 16 images"):
        selftrain(tmp_path / "strict", **options)


def test_too_many_broken_images_stop_labelling_and_evaluating(teacher, images, tmp_path):
    options = SMALL | {"unlabelled": str(images / "train")}
    work = stage.check(tmp_path / "run", options).work
    with pytest.raises(StageError, match="8 of 16 images"):
        stage._label(tmp_path / "run", work, teacher, "")
    work = work._replace(data=work.data._replace(test=open_detection(str(images))[0]))
    with pytest.raises(StageError, match="8 of 16 images"):
        stage._evaluate(tmp_path / "run", work, {"teacher": teacher})


def test_a_labelling_that_is_killed_goes_on(teacher, images, tmp_path, monkeypatch):
    """Half of the images are broken: those of the first part, and of the second, which is killed, in turns."""
    seen, whole = [], []
    options = SMALL | {"unlabelled": str(images / "train"), "max_broken": 0.5, "jitter_filter": 100.0}
    original, read, record = detecting.detect, images_read(whole), {}

    def labelled(run, killed=None):
        def detect(model, data, source, rows, *rest, **more):
            seen.append(rows.tolist())
            if len(seen) == killed:
                raise KeyboardInterrupt
            return original(model, data, source, rows, *rest, **more)

        seen.clear()
        whole.clear()
        monkeypatch.setattr(detecting, "detect", detect)
        monkeypatch.setattr(stage, "open_dataset", read)
        work = stage.check(tmp_path / run, options).work
        path = stage._label(tmp_path / run, work, teacher, "")
        record[run] = json.loads(path.with_name("stage.json").read_text())["pseudo"]
        assert [one.name for one in path.parent.iterdir() if "pseudo" in one.name] == ["pseudo.json"]
        return path.read_bytes()

    monkeypatch.setattr(detecting, "PART", 5)
    wanted = labelled("at once")
    assert (len(seen), sorted(whole)) == (4, list(range(16)))
    with pytest.raises(KeyboardInterrupt):
        labelled("killed", 3)
    assert labelled("killed") == wanted
    assert (seen, whole) == ([list(range(10, 15)), [15]], [])
    assert len(record["at once"]["broken"]) == 8
    for fact in ("broken", "result"):
        assert record["killed"][fact] == record["at once"][fact]
    assert record["killed"]["result"]["images"] == 8 and record["killed"]["result"]["boxes"] > 0


def images_read(whole):
    """`open_dataset` that notes the rows whose size is asked for."""

    def opened(spec, turned=True, original=stage.open_dataset):
        data = original(spec, turned)

        def read(row, short_side):
            if short_side is None:
                whole.append(row)
            return data.read(row, short_side)

        return replace(data, read=read)

    return opened


def test_images_of_the_test_part_are_not_labelled(teacher, images, tmp_path, capsys):
    options = SMALL | {"labelled": str(images / "train.json"), "unlabelled": str(images / "train")}
    work = stage.check(tmp_path / "run", options | {"max_broken": 0.9}).work
    path = stage._label(tmp_path / "run", work, teacher, "")
    listed = {one["file_name"].rsplit("/", 1)[-1] for one in json.loads(path.read_text())["images"]}
    test = work.data.test
    good = {key.rsplit("/", 1)[-1] for row, key in enumerate(test.keys) if not broken(test, row)}
    assert good
    assert not good & listed
    assert listed
    assert f"pseudo: {len(good)} of the unlabelled images are in the test split" in capsys.readouterr().err


def broken(data, row):
    try:
        data.read(row, None)
    except BrokenImage:
        return True
    return False


def test_sizes_are_read_once_in_a_run(images, tmp_path, monkeypatch):
    """An image is decoded whole for its size alone: broken ones too, in one step of all, and never for a student."""
    whole = []
    monkeypatch.setattr(stage, "open_dataset", images_read(whole))
    options = SMALL | {"fraction": 1.0, "unlabelled": str(images / "train"), "max_broken": 0.5}
    folder = selftrain(tmp_path / "run", **options, rounds=2).parent
    assert sorted(whole) == list(range(16))
    weights = (folder / "student" / "model.safetensors").read_bytes()
    assert json.loads((folder / "stage.json").read_text())["student"]["result"]["pseudo-labelled"] == 8
    whole.clear()
    for name in ("student", "student-2", "scores"):
        shutil.rmtree(folder / name, ignore_errors=True)
    records = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({name: records[name] for name in ("teacher", "pseudo")}))
    selftrain(tmp_path / "run", **options)
    assert whole == []
    assert (folder / "student" / "model.safetensors").read_bytes() == weights
    held = tmp_path / "others.json"
    shutil.copy(folder / "pseudo.json", held)
    selftrain(tmp_path / "other", **options, pseudo=str(held), teacher=str(folder / "teacher" / "model.safetensors"))
    assert sorted(whole) == list(range(16))
    found = load_file(tmp_path / "other" / "selftrain" / "student" / "model.safetensors")
    assert all(
        torch.equal(value, found[name]) for name, value in load_file(folder / "student/model.safetensors").items()
    )
