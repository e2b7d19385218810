"""Detectors that selftrain finished, evaluated as they are; the runs are made by the command line."""

import json
import shutil

import pytest
from PIL import Image
from tiny import SELFTRAIN

from ktransfer import cli, files, plan
from ktransfer.detection import saved
from ktransfer.errors import UsageError
from ktransfer.eval import compare, evaluate

SCENES = "scenes:images=16,size=64"
SMALL = SELFTRAIN
WORDS = ["selftrain", *(word for key, value in SMALL.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that a line made: selftrain, then eval."""
    run = tmp_path_factory.mktemp("runs") / "cow"
    assert cli.main(["--run", str(run), *WORDS, "eval", "--protocol", "detect"]) == 0
    return run


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "cow")
    return tmp_path / "cow"


def result(run):
    return json.loads((run / "eval" / "detect.json").read_text())


def test_the_line_evaluates_teacher_and_student(made):
    found = result(made)
    assert found["protocol"] == "detect/2 finished" and found["schema"] == 2
    assert list(found["arms"]) == ["teacher", "student"]
    own = json.loads((made / "selftrain" / "scores.json").read_text())
    assert own["test_threshold"] == found["settings"]["threshold"] == 0.05
    for name, arm in found["arms"].items():
        cell = arm["scores"]["finished"]
        assert {key: cell[key] for key in own["scores"][name]} == own["scores"][name]
        assert cell["size"] == 64 and cell["detector"] == "retinanet"
    assert set(found["settings"]) == {"threshold", "test_scales", "trunk", "seed", "seeds"}
    assert found["inputs"]["network student"] == files.sha256(made / "selftrain" / "student" / "model.safetensors")
    assert "alexnet_bn, detector (student)" in (made / "eval" / "detect.md").read_text()
    assert "student,alexnet_bn,detector,finished,AP50" in (made / "eval" / "detect.csv").read_text()
    assert not list((made / "eval").glob("work-*"))
    said = f"ktransfer --run cow eval --protocol detect --labelled {SCENES} --trunk finished"
    assert found["command"] == said


def test_given_again_it_is_done_and_what_changed_is_refused_before_the_line_begins(copy, capsys):
    before = (copy / "eval" / "detect.json").read_bytes()
    assert cli.main(["--run", str(copy), "eval", "--protocol", "detect"]) == 0
    assert "detect: done before" in capsys.readouterr().err
    assert (copy / "eval" / "detect.json").read_bytes() == before
    anew = [("selftrain", SMALL | {"lr": 0.2, "overwrite": True}), ("eval", {"protocol": "detect"})]
    with pytest.raises(UsageError, match="this line makes the selftrain stage again"):
        plan.refuse_changes(plan.plan_line(anew, copy))


def test_other_images_other_runs_and_a_threshold(made, copy):
    shutil.copytree(copy / "selftrain", copy.parent / "second" / "selftrain")
    path = evaluate(
        copy,
        protocol="detect",
        labelled="scenes:images=16,size=64,seed=1",
        beside=str(copy.parent / "second"),
        threshold=0.5,
        test_scales="1,1.5",
        overwrite=True,
    )["detect"]
    found = json.loads(path.read_text())
    assert list(found["arms"]) == ["teacher", "student", "second teacher", "second student"]
    assert found["arms"]["student"] == found["arms"]["second student"]
    assert found["arms"]["student"]["scores"] != result(made)["arms"]["student"]["scores"]
    assert found["inputs"]["test"] != result(made)["inputs"]["test"]
    with pytest.raises(UsageError, match="threshold is"):
        compare([made, copy])
    assert "detector (student)" in compare([made, made])


def test_misuse_is_one_line(copy, tmp_path, monkeypatch):
    def fails(words, run=copy, **options):
        with pytest.raises(UsageError, match=words) as caught:
            evaluate(run, **{"protocol": "detect"} | options)
        assert "\n" not in str(caught.value)

    fails("holds no trained network", tmp_path / "none", labelled=SCENES)
    fails("scores is missing; make it first: .* selftrain", tmp_path / "none", labelled=SCENES, trunk="finished")
    fails("no labelled images were given", tmp_path / "none", trunk="finished")
    fails("holds no trained network", protocol="linear")
    fails("--supervised: is not for the detectors of selftrain", supervised=True)
    fails("--test-scales 9: must be", test_scales="9")
    fails(r"^--precision, --canvas: not read by detect of finished detectors \(", canvas=64, precision="float32")
    fails("--canvas: not read by detect of finished detectors", trunk="finished", canvas=64)
    for told in ("frozen", "finished,frozen"):
        fails("holds no trained network", trunk=told, labelled=SCENES)
    fails("scores is missing", beside=str(tmp_path / "none"))
    strange = tmp_path / "boxes.json"
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 9, "height": 9} for n in range(9)]
    notes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 5, 5]} for n in range(9)]
    held = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "cow"}]}
    strange.write_text(json.dumps(held))
    for one in images:
        Image.new("RGB", (9, 9)).save(tmp_path / one["file_name"])
    fails("has other classes than the detectors", labelled=str(strange))
    line = [("selftrain", SMALL), ("eval", {"protocol": "detect", "labelled": str(strange)})]
    with pytest.raises(UsageError, match="has other classes than the detectors"):
        plan.plan_line(line, tmp_path / "new")
    line = [("selftrain", SMALL | {"task": "segment", "head": "fpn"}), ("eval", {"protocol": "detect"})]
    with pytest.raises(UsageError, match="makes no detector"):
        plan.plan_line(line, tmp_path / "new")
    other = copy.parent / "again" / copy.name
    shutil.copytree(copy, other)
    fails("a second run named 'cow'", beside=f"{made_second(copy, other)},{other}")
    described = saved.describe(copy / "selftrain" / "teacher" / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(
            saved, "describe", lambda path: described.__class__(**vars(described) | {"settings": of_pixels()})
        )
        fails("no detector, but fcn")
    (copy / "selftrain" / "student" / "model.safetensors").unlink()
    fails("its student is missing or was changed; make it again")


def of_pixels():
    from ktransfer.detection.detectors import Settings

    return Settings("fcn")


def made_second(copy, other):
    """A third place with a run of the same name."""
    third = other.parent.parent / "third" / copy.name
    shutil.copytree(copy, third)
    return third


def test_a_teacher_that_was_given_is_found_and_nothing_else_is(copy, tmp_path):
    teacher = tmp_path / "theirs.safetensors"
    shutil.copy(copy / "selftrain" / "teacher" / "model.safetensors", teacher)
    run = tmp_path / "given"
    words = ["--run", str(run), *WORDS, "--teacher", str(teacher)]
    assert cli.main(words) == 0
    found = json.loads(evaluate(run, protocol="detect")["detect"].read_text())
    assert found["arms"]["teacher"] == result(copy)["arms"]["teacher"]
    teacher.write_bytes(b"another")
    with pytest.raises(UsageError, match="its teacher is missing or was changed"):
        evaluate(run, protocol="detect", overwrite=True)
