"""Pseudo-boxes as COCO files: there and back, thresholds, and files of others."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ktransfer.data import scenes
from ktransfer.data.opening import open_dataset
from ktransfer.detection import masks
from ktransfer.detection.data import Objects
from ktransfer.detection.opening import open_detection
from ktransfer.detection.predictions import Prediction
from ktransfer.errors import UsageError
from ktransfer.retrain.selftraining import boxes


@pytest.fixture(scope="module")
def data():
    return open_detection("scenes:images=12,size=64")[0]


def predictions(data):
    """Two boxes in row 0, one in row 2, none in row 5."""
    some = torch.tensor([[4.0, 5.0, 30.5, 40.25], [10.0, 10.0, 20.0, 20.0]])
    return {
        0: Prediction(some, torch.tensor([0.9, 0.55]), torch.tensor([3, 4])),
        2: Prediction(some[1:], torch.tensor([0.51]), torch.tensor([4])),
        5: Prediction(some[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64)),
    }


@pytest.fixture
def path(data, tmp_path):
    boxes.write(tmp_path / "pseudo.json", data, predictions(data), {"threshold": 0.5})
    return tmp_path / "pseudo.json"


def test_there_and_back(data, path):
    found, rows = boxes.read(path, boxes.without_boxes(data, data), 0.5)
    assert rows.tolist() == [0, 2, 5]
    assert found.objects[0].boxes.tolist() == [[4.0, 5.0, 30.5, 40.25], [10.0, 10.0, 20.0, 20.0]]
    assert found.objects[0].labels.tolist() == [3, 4]
    assert found.objects[2].labels.tolist() == [4]
    assert len(found.objects[5].boxes) == len(found.objects[1].boxes) == 0
    assert boxes.count(found.objects, 12)[3:5] == [1, 2]


@pytest.mark.parametrize("outlined", [False, True])
def test_parts_become_what_would_have_been_written_at_once(data, tmp_path, outlined):
    found = predictions(data)
    held = {row: [masks.encoded(np.eye(64, k=row) > 0)] * len(one.scores) for row, one in found.items()}
    outlines = held if outlined else None
    boxes.write(tmp_path / "whole.json", data, found, {"threshold": 0.5}, outlines)
    parts = [tmp_path / f"{row}.json" for row in (0, 2, 5, 7)]
    for row, part in zip((0, 2, 5, 7), parts, strict=True):
        mine = {row: found[row]} if row in found else {}
        boxes.write(part, data, mine, {"images": len(mine), "late": row == 7}, outlines)
    assert boxes.join(tmp_path / "joined.json", parts, {"threshold": 0.5}) == {"images": 3, "late": 1}
    assert (tmp_path / "joined.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_other_frameworks_read_it(path, capsys):
    coco = pytest.importorskip("pycocotools.coco").COCO(str(path))
    assert len(coco.getImgIds()) == 3
    assert next(note["bbox"] for note in coco.loadAnns(coco.getAnnIds())) == [4.0, 5.0, 26.5, 35.25]
    capsys.readouterr()


def test_thresholds(data, path):
    plain = boxes.without_boxes(data, data)
    assert boxes.count(boxes.read(path, plain, 0.6)[0].objects, 12) == [0, 0, 0, 1] + [0] * 8
    by_class = np.zeros(12)
    by_class[4] = 0.52
    assert boxes.count(boxes.read(path, plain, by_class)[0].objects, 12)[3:5] == [1, 1]


def test_boxes_of_others_have_no_scores(data, path):
    held = json.loads(path.read_text())
    for note in held["annotations"]:
        del note["score"]
    path.write_text(json.dumps(held))
    found, _ = boxes.read(path, boxes.without_boxes(data, data), 0.99)
    assert sum(boxes.count(found.objects, 12)) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop("images"), "lacks 'images'"),
        (lambda held: held["images"][0].update(file_name="../x"), "1 of its images are not those of"),
        (lambda held: held["categories"][0].update(name="cow"), "classes are not those of .* such as cow"),
        (lambda held: held["annotations"][0].update(bbox=["a", 0, 1, 1]), "annotation is not as COCO's"),
        (lambda held: held["annotations"][0].update(category_id=99), "annotation is not as COCO's"),
        (lambda held: held["annotations"][0].update(bbox=[[1], 0, 1, 1]), "annotation is not as COCO's"),
        (lambda held: held["annotations"][0].update(bbox=[10**400, 0, 1, 1]), "annotation is not as COCO's"),
        (lambda held: held["annotations"][0].update(score="high"), "annotation is not as COCO's"),
        (lambda held: held.update(annotations=[7]), "lacks"),
    ],
)
def test_foreign_files_are_refused_in_one_line(data, path, change, words):
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))
    with pytest.raises(UsageError, match=words) as caught:
        boxes.read(path, boxes.without_boxes(data, data), 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_no_json_is_refused(data, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        boxes.read(tmp_path / "x.json", data, 0.5)


def test_numbers_may_be_text_and_crowds_are_not_learned(data, path):
    held = json.loads(path.read_text())
    held["annotations"][0]["bbox"] = ["4", "5", "26.5", "35.25"]
    held["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(held))
    found, rows = boxes.read(path, boxes.without_boxes(data, data), 0.5)
    assert rows.tolist() == [0, 2, 5]
    assert found.objects[0].boxes.tolist() == [[4.0, 5.0, 30.5, 40.25]]


def test_images_of_the_test_part_are_known_by_name_and_pixels(tmp_path):
    scenes.write_scenes(tmp_path / "s", 24, 64)
    _, test = open_detection(str(tmp_path / "s" / "train.json"))
    plain = open_dataset(str(tmp_path / "s" / "train"))
    found = boxes.shared(plain, test)
    names = {key.rsplit("/", 1)[-1] for key in test.keys}
    assert [plain.keys[row].rsplit("/", 1)[-1] in names for row in found] == [True] * len(test)
    train, other = open_detection("scenes:images=12,size=64")
    assert {key.rsplit("/", 1)[-1] for key in train.keys} & {key.rsplit("/", 1)[-1] for key in other.keys}
    assert not len(boxes.shared(train, other))


def test_adaptive_thresholds_leave_as_many_boxes_as_labels(data, tmp_path):
    """Scores of class k at 0.5, 0.51, ...; labelled images hold so many of it that a known share passes."""
    images = boxes.without_boxes(data, data)
    place = torch.tensor([[1.0, 1.0, 9.0, 9.0]])
    made = {
        row: Prediction(place.repeat(12, 1), torch.full((12,), 0.5 + row / 100), torch.arange(12))
        for row in range(len(data))
    }
    boxes.write(tmp_path / "p.json", images, made, {})
    found = boxes.adaptive_thresholds(data, tmp_path / "p.json", images, 0.5)
    kept = boxes.read(tmp_path / "p.json", images, found)[0]
    own = boxes.count(data.objects, 12)
    for label, number in enumerate(boxes.count(kept.objects, 12)):
        assert number == min(own[label], len(data)) or found[label] == 0.5
    assert (found >= 0.5).all()
    assert (found > 0.5).any()
    one = data.objects[0]
    twice = Objects(*(np.concatenate([part, part]) for part in one[:5]), one.outlines * 2)
    crowds = twice._replace(crowd=np.arange(len(twice.labels)) >= len(one.labels))
    around = replace(data, objects=(crowds, *data.objects[1:]))
    assert boxes.adaptive_thresholds(around, tmp_path / "p.json", images, 0.5).tolist() == found.tolist()


def test_sizes_of_images_without_any_statement(folder):
    plain = open_dataset(str(folder))
    like = open_detection("scenes:images=12,size=64")[0]
    found = boxes.without_boxes(plain, like)
    assert found.classes == like.classes
    for row in range(len(plain)):
        width, height = found.sizes[row]
        try:
            assert plain.read(row, None).shape[:2] == (height, width)
        except Exception:
            assert (width, height) == boxes.UNREADABLE


def test_images_of_a_vocdevkit_are_known_by_their_names_without_ending(tmp_path):
    """Its keys have no ending; the unlabelled images are often its whole JPEGImages."""
    scenes.write_scenes(tmp_path / "s", 12, 64)
    _, test = open_detection(str(tmp_path / "s"))
    keys = tuple(f"VOC2007/{key.rsplit('/', 1)[-1].rsplit('.', 1)[0]}" for key in test.keys)
    assert boxes.shared(test, replace(test, keys=keys)).tolist() == list(range(len(test)))
    dated = tuple(f"VOC2012/2007_{name.rsplit('/', 1)[-1]}" for name in keys)  # as a later year lists them
    assert boxes.shared(test, replace(test, keys=dated)).tolist() == list(range(len(test)))
    dotted = tuple(f"{name}.17" for name in keys)
    assert not len(boxes.shared(test, replace(test, keys=dotted)))
