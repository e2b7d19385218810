"""Files of boxes as others write them: ids of any kind, yes and no in words, numbers as text, boxes in shares."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ktransfer.detection import metrics
from ktransfer.detection.coco import read
from ktransfer.detection.data import load_ids, save_ids
from ktransfer.detection.opening import open_detection
from ktransfer.detection.predictions import Prediction
from ktransfer.errors import UsageError

IDS = st.one_of(
    st.integers(-3, 5),
    st.integers(2**53 - 2, 2**53 + 6),
    st.integers(-(2**70), 2**70),
    st.text("0123456789abcdef-", min_size=1, max_size=24),
)


def written(root, image_ids, category_ids, boxes, name="instances_train.json", order=None, **changes):
    """A COCO file of images of 60 x 40; boxes are rows of image, category, x, y, width, height."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for number in range(len(image_ids)):
        if not (root / "images" / f"{number}.png").exists():
            Image.new("RGB", (60, 40)).save(root / "images" / f"{number}.png")
    kinds = [{"id": one, "name": f"class {number}"} for number, one in enumerate(category_ids)]
    held = {
        "images": [
            {"id": one, "file_name": f"{number}.png", "width": 60, "height": 40} for number, one in enumerate(image_ids)
        ],
        "categories": [kinds[place] for place in order] if order else kinds,
        "annotations": [
            {"id": number, "image_id": image_ids[image], "category_id": category_ids[kind], "bbox": box}
            for number, (image, kind, *box) in enumerate(boxes)
        ],
    }
    (root / name).write_text(json.dumps(held | changes))
    return root / name


def drawn(images, kinds, seed):
    """Some boxes, and predictions near them."""
    world = np.random.default_rng(seed)
    boxes, found = [], {}
    for image in range(images):
        own, near = [], []
        for _ in range(world.integers(1, 5)):
            x, y, width, height = (int(one) for one in world.integers((0, 0, 8, 8), (30, 20, 30, 20)))
            kind = int(world.integers(kinds))
            own.append([image, kind, x, y, width, height])
            for _ in range(world.integers(0, 3)):
                moved = np.array([x, y, x + width, y + height]) + world.normal(0, 2, 4)
                near.append([*moved.tolist(), float(world.random()), kind if world.random() < 0.7 else 0])
        boxes += own
        table = torch.tensor(sorted(near, key=lambda one: -one[4])).view(-1, 6)
        found[image] = Prediction(table[:, :4].clone(), table[:, 4].clone(), table[:, 5].long())
    return boxes, found


def by_pycocotools(boxes, found, images, kinds):
    """AP, AP50, ... of the same boxes with ids from 1, in the order of the classes' names."""
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    truth = {
        "images": [{"id": image + 1, "width": 60, "height": 40} for image in range(images)],
        "categories": [{"id": kind + 1, "name": f"class {kind}"} for kind in range(kinds)],
        "annotations": [
            {"id": n + 1, "image_id": i + 1, "category_id": k + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, (i, k, *box) in enumerate(boxes)
        ],
    }
    answers = [
        {"image_id": i + 1, "category_id": k + 1, "bbox": [a, b, c - a, d - b], "score": score}
        for i, one in found.items()
        for (a, b, c, d), score, k in zip(
            one.boxes.double().tolist(), one.scores.tolist(), one.labels.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        held = coco.COCO()
        held.dataset = {"info": {}, **truth}
        held.createIndex()
        evaluated = evaluation.COCOeval(held, held.loadRes(answers), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return evaluated.stats[:6]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(IDS, min_size=5, max_size=5, unique_by=str),
    st.lists(IDS, min_size=3, max_size=3, unique_by=str),
    st.permutations(range(3)),
    st.booleans(),
    st.integers(0, 1000),
)
def test_no_numbering_changes_the_precision(tmp_path_factory, image_ids, category_ids, order, as_text, seed):
    """Ids large, equal as floats, negative, 0, hash-like, text; in one table as text; categories in any order."""
    root = tmp_path_factory.mktemp("ids")
    boxes, found = drawn(5, 3, seed)
    path = written(root, image_ids, category_ids, boxes, order=order)
    if as_text:
        held = json.loads(path.read_text())
        for note in held["annotations"]:
            note |= {name: str(note[name]) for name in ("image_id", "category_id")}
        path.write_text(json.dumps(held))
    data = read(path, "x")
    place = torch.tensor([data.classes.index(f"class {kind}") for kind in range(3)])
    given_back = {row: one._replace(labels=place[one.labels]) for row, one in found.items()}
    scores = metrics.scores(data, given_back, 0)
    for name, value in zip(metrics.SIZES, by_pycocotools(boxes, found, 5, 3), strict=True):
        assert scores.get(name, -1) == pytest.approx(value, abs=1e-9), name
    save_ids(root / "ids.json", data, np.array([4, 1]))
    assert load_ids(root / "ids.json", data).tolist() == [4, 1]


def test_perfect_boxes_are_perfect_whatever_their_ids(tmp_path):
    big = [2**53, 2**53 + 1]
    boxes = [[0, 0, 1, 1, 20, 20], [1, 1, 5, 5, 20, 20]]
    data = read(written(tmp_path, big, big, boxes), "x")
    assert data.ids == data.category_ids == tuple(big)
    one = {
        row: Prediction(torch.from_numpy(own.boxes), torch.ones(1), torch.from_numpy(own.labels))
        for row, own in enumerate(data.objects)
    }
    scores = metrics.scores(data, one, 0)
    assert scores["AP"] == pytest.approx(1) and scores["AP_interval"] == [pytest.approx(1)] * 2


def test_whole_floats_are_their_numbers_unless_they_have_lost_digits(tmp_path):
    boxes = [[0, 0, 1, 1, 20, 20], [1, 1, 5, 5, 20, 20]]
    path = written(tmp_path, [1, 2], [7, 8], boxes)
    path.write_text(path.read_text().replace('"image_id": 2', '"image_id": 2.0').replace('"id": 7,', '"id": 7.0,'))
    assert [one.labels.tolist() for one in read(path, "x").objects] == [[0], [1]]
    path = written(tmp_path, [2**53, 2**53 + 1], [7, 8], boxes)
    path.write_text(path.read_text().replace(f'"image_id": {2**53 + 1}', f'"image_id": {2**53 + 1}.0'))
    with pytest.raises(UsageError, match=r"1 annotations name a image_id that is not listed.*annotations\[1\]"):
        read(path, "x")


@pytest.mark.parametrize("part", ["images", "categories"])
@pytest.mark.parametrize("strange", [None, True, [1], {"a": 1}, float("nan")])
def test_what_is_no_id_is_refused(tmp_path, part, strange):
    path = written(tmp_path, [1, 2], [7, 8], [[0, 0, 1, 1, 20, 20]])
    held = json.loads(path.read_text())
    held[part][1]["id"] = strange
    path.write_text(json.dumps(held))
    with pytest.raises(UsageError, match="id: not a number or text") as caught:
        read(path, "x")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_same_id_in_two_ways_of_writing_is_twice(tmp_path):
    with pytest.raises(UsageError, match="category id 1 occurs 2 times"):
        read(written(tmp_path, [1], [1, "1"], [[0, 0, 1, 1, 20, 20]]), "x")


def changed(root, part, **values):
    path = written(root, [1, 2], [7, 8], [[0, 0, 1, 2, 20, 20], [1, 1, 5, 5, 20, 20]])
    held = json.loads(path.read_text())
    held[part][0] |= values
    path.write_text(json.dumps(held))
    return path


@pytest.mark.parametrize("no", ["0", "false", "False", 0, 0.0, None, False, "0.0", "no", ""])
@pytest.mark.parametrize("yes", ["1", "true", 1, 1.0, True, "TRUE"])
def test_yes_and_no_in_words(tmp_path, no, yes):
    assert read(changed(tmp_path, "annotations", iscrowd=no), "x").objects[0].crowd.tolist() == [False]
    assert read(changed(tmp_path, "annotations", iscrowd=yes), "x").objects[0].crowd.tolist() == [True]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"iscrowd": "maybe"}, "iscrowd: 'maybe' is neither 0 nor 1"),
        ({"iscrowd": [0]}, "iscrowd"),
        ({"iscrowd": 2}, "iscrowd: 2 is neither"),
        ({"area": [400]}, r"area: \[400\] is no number"),
        ({"area": {"a": 1}}, "area"),
        ({"bbox": None}, "bbox: None is not a list of four numbers"),
        ({"bbox": {"0": 1, "1": 2, "2": 3, "3": 4}}, "bbox"),
        ({"bbox": "1234"}, "bbox: '1234' is not a list"),
        ({"bbox": [{}, {}, {}, {}]}, "bbox: {} is no number"),
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"bbox": [1, 2, 3, 4, 5]}, "bbox"),
        ({"bbox": [1, 2, None, 4]}, "bbox: None is no number"),
        ({"bbox": [1, 2, True, 4]}, "bbox: True is no number"),
    ],
)
def test_what_is_no_annotation_is_named(tmp_path, values, words):
    path = changed(tmp_path, "annotations", **values)
    with pytest.raises(UsageError, match=words) as caught:
        read(path, "x")
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and "annotations[0], id 0" in line


@pytest.mark.parametrize("area", [None, "", 0, -5, float("nan"), float("inf")])
def test_an_area_that_says_nothing_is_that_of_the_box(tmp_path, area):
    assert read(changed(tmp_path, "annotations", area=area), "x").objects[0].areas.tolist() == [400]
    assert read(changed(tmp_path, "annotations", area="123.5"), "x").objects[0].areas.tolist() == [123.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -4])
def test_boxes_without_finite_sides_are_dropped_and_counted(tmp_path, value):
    data = read(changed(tmp_path, "annotations", bbox=[1, 2, value, 20]), "x")
    assert len(data.objects[0].boxes) == 0 and data.counts["boxes without width or height, dropped"] == 1


@pytest.mark.parametrize("width", ["60.0", "60", 60.0])
def test_sides_may_be_text(tmp_path, width):
    assert read(changed(tmp_path, "images", width=width), "x").sizes[0].tolist() == [60, 40]


@pytest.mark.parametrize("width", [None, "wide", [60], 60.5, True, float("nan"), 2**40, "\u0666\u0660"])
def test_what_is_no_side_is_named(tmp_path, width):
    path = changed(tmp_path, "images", width=width)
    with pytest.raises(UsageError, match=r"images\[0\], '0.png': ") as caught:
        read(path, "x")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", [None, ["0.png"], True])
def test_what_is_no_name_is_refused(tmp_path, name):
    for part, what in (("images", "file_name"), ("categories", "name")):
        with pytest.raises(UsageError, match=rf"{part}\[0\]"):
            read(changed(tmp_path, part, **{what: name}), "x")


SQUARE = [1, 2, 21, 2, 21, 22, 1, 22]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (SQUARE, [SQUARE]),
        ([SQUARE], [SQUARE]),
        ({"counts": [0, 2400]}, {"size": [40, 60], "counts": [0, 2400]}),
        ({"size": [40.0, "60"], "counts": [0, 2400]}, {"size": [40, 60], "counts": [0, 2400]}),
        ([], None),
        (None, None),
        ("x", None),
        (7, None),
        ([[{"x": 1}] * 6], None),
        ([["a"] * 6], None),
        ({"size": [40]}, None),
        ({"size": [40, 60]}, None),
        ([SQUARE, 7], None),
    ],
)
def test_masks_decide_nothing_for_boxes(tmp_path, given, wanted):
    one = read(changed(tmp_path, "annotations", segmentation=given), "x")
    assert one.objects[0].outlines == (wanted,) and one.objects[0].boxes.tolist() == [[1, 2, 21, 22]]
    lost = one.counts.get("outlines that cannot be read, left out", 0)
    assert lost == (wanted is None and given not in ([], None))


def test_classes_of_the_test_split_are_known_by_name(tmp_path, capsys):
    boxes = [[0, 0, 1, 1, 20, 20], [1, 2, 5, 5, 20, 20]]
    written(tmp_path, [1, 2], [10, 20, 30], boxes)
    written(tmp_path, [1, 2], ["a", "b", "c"], boxes, "instances_val.json", order=[2, 0, 1])
    train, test = open_detection(str(tmp_path))
    assert train.classes == test.classes == ("class 0", "class 1", "class 2")
    assert [one.labels.tolist() for one in test.objects] == [[0], [2]]
    assert "matched by name" in capsys.readouterr().err
    # A subset, and one class more that has no box.
    named = [{"id": 5, "name": "class 2"}, {"id": 6, "name": "rare"}]
    notes = [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [1, 1, 9, 9]}]
    written(tmp_path, [1, 2], [5], [], "instances_val.json", categories=named, annotations=notes)
    train, test = open_detection(str(tmp_path))
    assert test.classes == train.classes and test.objects[0].labels.tolist() == [2]
    written(
        tmp_path, [1, 2], [5], [], "instances_val.json", categories=named, annotations=[notes[0] | {"category_id": 6}]
    )
    with pytest.raises(UsageError, match=r"different categories \(class 0, class 1, rare\).*boxes of rare"):
        open_detection(str(tmp_path))


def test_boxes_that_are_shares_are_refused(tmp_path):
    written(tmp_path, [1, 2], [7, 8], [[0, 0, 0.1, 0.1, 0.5, 0.9]])
    written(tmp_path, [1, 2], [7, 8], [[0, 0, 1, 1, 20, 20]], "instances_val.json")
    with pytest.raises(UsageError, match=r"training split lie within the first pixel.*in pixels"):
        open_detection(str(tmp_path))
