import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer import rng
from ktransfer.data import dataset, scenes
from ktransfer.detection import data as detection
from ktransfer.detection import opening
from ktransfer.detection.coco import read
from ktransfer.errors import BrokenImage, UsageError

PACKS = os.environ.get("KTRANSFER_DATA")


def coco(root, name="instances_train.json", **changes):
    """Three images of 60 x 40, the last without an object."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for number in (1, 2, 3):
        Image.new("RGB", (60, 40), (number * 60, 0, 0)).save(root / "images" / f"{number}.png")
    held = {
        "images": [{"id": 10 * n, "file_name": f"{n}.png", "width": 60, "height": 40} for n in (1, 2, 3)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [
            note(1, 10, 3, [5, 6, 10, 20], area=77),
            note(2, 10, 90, [50, 30, 20, 20]),
            note(3, 20, 90, [1, 1, 30, 30], iscrowd=1),
            note(4, 20, 3, [5, 5, 0, 4]),
            note(5, 20, 3, [70, 5, 4, 4]),
        ],
    } | changes
    (root / name).write_text(json.dumps(held))
    return root / name


def note(number, image, category, bbox, **more):
    outline = [[bbox[0], bbox[1], bbox[0] + 5, bbox[1], bbox[0], bbox[1] + 5]]
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "segmentation": outline} | more


def test_boxes_are_clipped_dropped_and_counted(tmp_path):
    data = read(coco(tmp_path), "x")
    assert data.classes == ("cat", "dog") and data.category_ids == (3, 90) and data.ids == (10, 20, 30)
    assert len(data) == 3 and data.sizes.tolist() == [[60, 40]] * 3
    first, second, third = data.objects
    assert first.boxes.tolist() == [[5, 6, 15, 26], [50, 30, 60, 40]] and first.boxes.dtype == np.float32
    assert first.labels.tolist() == [0, 1] and first.areas.tolist() == [77, 100]
    assert first.outlines[0] == [[5, 6, 10, 6, 5, 11]]
    assert second.crowd.tolist() == [True] and len(second.outlines) == 1
    assert third.boxes.shape == (0, 4) and third.labels.dtype == np.int64
    assert data.counts == {
        "boxes": 3,
        "boxes over the edge of their image, clipped": 1,
        "boxes without width or height, dropped": 1,
        "boxes wholly outside of their image, dropped": 1,
        "crowd boxes": 1,
        "images": 3,
        "images without a box": 1,
    }
    assert data.read(1, None)[0, 0].tolist() == [120, 0, 0]
    assert (data.targets == dataset.UNKNOWN).all() and data.short_side(0) == 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": []}, "lists no images"),
        ({"images": [{"id": 1, "file_name": "1.png", "width": 60}]}, "lacks 'height'"),
        ({"images": [{"id": 1, "file_name": "../1.png", "width": 6, "height": 6}]}, "leads out of the folder"),
        ({"images": [{"id": 1, "file_name": "/etc/1.png", "width": 6, "height": 6}]}, "leads out of the folder"),
        ({"images": [{"id": 1, "file_name": "a\\..\\..\\1.png", "width": 6, "height": 6}]}, "leads out of the folder"),
        ({"images": [{"id": 1, "file_name": "1.png", "width": 0, "height": 6}]}, "no width or height"),
        (
            {"images": [{"id": 1, "file_name": f"{n}.png", "width": 6, "height": 6} for n in (1, 2)]},
            "image id 1 occurs 2",
        ),
        (
            {"images": [{"id": n, "file_name": "1.png", "width": 6, "height": 6} for n in (1, 2)]},
            "file name 1.png occurs",
        ),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "category id 3 occurs 2"),
        ({"categories": 7}, "no list 'categories'"),
        (
            {"annotations": [note(1, 99, 3, [0, 0, 1, 1])]},
            "1 annotations name a image_id that is not listed, such as 99",
        ),
        ({"annotations": [note(1, 10, 4, [0, 0, 1, 1])]}, "category_id that is not listed, such as 4"),
        ({"annotations": [note(1, [10], 3, [0, 0, 1, 1])]}, "image_id that is not listed"),
        ({"images": [{"id": [1], "file_name": "1.png", "width": 6, "height": 6}]}, "image id: not a number or text"),
        ({"images": [{"id": 1, "file_name": "1.png", "width": 1e400, "height": 6}]}, "COCO's have id"),
        ({"annotations": [{"id": 1, "image_id": 10, "category_id": 3}]}, "an annotation is not as COCO's are"),
        ({"annotations": [{"id": 1, "image_id": 10, "category_id": 3, "bbox": [1, 2]}]}, "an annotation is not as"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words) as caught:
        read(coco(tmp_path, **changes), "x")
    assert "\n" not in str(caught.value)


def test_crowds_have_run_lengths(tmp_path):
    lengths = {"size": [40, 60], "counts": [0, 2400]}
    path = coco(tmp_path, annotations=[note(1, 10, 3, [0, 0, 9, 9], iscrowd=1, segmentation=lengths)])
    one = read(path, "x").objects[0]
    assert one.crowd.all() and one.outlines == (lengths,)


def test_missing_images_and_repeated_annotation_ids_are_counted(tmp_path):
    path = coco(tmp_path, annotations=[note(1, 10, 3, [0, 0, 9, 9]), note(1, 20, 3, [0, 0, 9, 9])])
    (tmp_path / "images" / "1.png").unlink()
    data = read(path, "x")
    assert data.counts["images that do not exist"] == 1 and data.counts["repeated annotation ids"] == 1
    assert data.counts["of 2 categories without a box"] == 1
    with pytest.raises(BrokenImage):
        data.read(0, None)
    for name in ("2.png", "3.png"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(UsageError, match="none of its images exists"):
        read(path, "x")


def test_no_json_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        opening.open_file(str(tmp_path / "a.json"))
    with pytest.raises(UsageError, match="no such file"):
        opening.open_file(str(tmp_path / "b.json"))


def test_a_root_has_two_parts(tmp_path):
    coco(tmp_path)
    with pytest.raises(UsageError, match=r"no instances_val\.json"):
        opening.open_detection(str(tmp_path))
    coco(tmp_path, "instances_val.json")
    train, test = opening.open_detection(str(tmp_path))
    assert train.classes == test.classes and train.name == "instances_train" and test.name == "instances_val"
    coco(tmp_path, "instances_val.json", categories=[{"id": 3, "name": "cat"}, {"id": 90, "name": "cow"}])
    with pytest.raises(UsageError, match=r"different categories \(cow, dog\)"):
        opening.open_detection(str(tmp_path))
    coco(tmp_path, "instances_val.json", annotations=[])
    with pytest.raises(UsageError, match="no box in the test split"):
        opening.open_detection(str(tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        opening.open_detection(str(tmp_path / "nowhere"))


def test_cocos_own_layout_is_found(tmp_path):
    for part in ("train2017", "val2017"):
        path = coco(tmp_path / part)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        path.rename(tmp_path / "annotations" / f"instances_{part}.json")
        for image in (tmp_path / part / "images").iterdir():
            image.rename(tmp_path / part / image.name)
    train, test = opening.open_detection(str(tmp_path))
    assert train.read(2, None)[0, 0].tolist() == [180, 0, 0] and len(test) == 3


def test_one_file_is_split(tmp_path):
    scenes.write_scenes(tmp_path / "s", 40, 48)
    train, test = opening.open_detection(str(tmp_path / "s" / "train.json"))
    assert len(train) == 32 and len(test) == 8 and not set(train.keys) & set(test.keys)
    assert train.fingerprint != test.fingerprint
    whole = opening.open_file(str(tmp_path / "s" / "train.json"))
    row = whole.keys.index(test.keys[3])
    assert (whole.read(row, None) == test.read(3, None)).all() and whole.ids[row] == test.ids[3]
    assert (whole.objects[row].boxes == test.objects[3].boxes).all()


def test_scenes_have_the_boxes_of_their_own_coco_files(tmp_path):
    scenes.write_scenes(tmp_path / "s", 24, 48, seed=5)
    parts = opening.open_detection("scenes:images=24,size=48,seed=5")
    written = opening.open_detection(str(tmp_path / "s"))
    for drawn, read_back in zip(parts, written, strict=True):
        assert drawn.classes == read_back.classes and drawn.ids == read_back.ids and len(drawn) == len(read_back)
        for ours, theirs in zip(drawn.objects, read_back.objects, strict=True):
            np.testing.assert_array_equal(ours.boxes, theirs.boxes)
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            assert ours.outlines == theirs.outlines
    assert scenes.objects(5, "val", 3, 48) == scenes.render(5, "val", 3, 48)[1]


def test_fractions_have_no_image_twice_and_nest():
    data = opening.open_file("scenes:images=200,size=32")
    small, large = (detection.fraction(data, share, 1) for share in (0.1, 0.3))
    assert len(small) == 20 and len(large) == 60 and len(set(large.tolist())) == 60
    assert set(small.tolist()) <= set(large.tolist()) and (np.diff(large) > 0).all()
    assert set(small.tolist()) != set(detection.fraction(data, 0.1, 2).tolist())
    assert detection.fraction(data, 1.0, 1).tolist() == list(range(200))
    even = detection.fraction(data, 0.12, 1, stratified=True)
    counts = np.bincount([data.objects[row].labels[0] for row in even], minlength=12)
    plain = np.bincount([data.objects[row].labels[0] for row in detection.fraction(data, 0.12, 1)], minlength=12)
    assert len(even) == 24 and counts.std() < plain.std()


def test_a_fraction_takes_the_least_words_of_the_seed():
    data = opening.open_file("scenes:images=50,size=32")
    words = rng.words(6, "detection/fraction", 0, torch.arange(50), 1)[:, 0].tolist()
    ranked = sorted(range(50), key=words.__getitem__)
    assert detection.fraction(data, 0.3, 6).tolist() == sorted(ranked[:15])


@pytest.mark.parametrize("share", [0.05, 0.12, 0.5])
def test_a_stratified_fraction_has_its_share_of_every_class(share):
    """Of the images by their rarest class, up to the one image that a share cannot be exact by."""
    data = opening.open_file("scenes:images=200,size=32")
    times = np.bincount(np.concatenate([one.labels for one in data.objects]))
    rarest = np.array([min(one.labels, key=lambda label: times[label], default=-1) for one in data.objects])
    chosen = rarest[detection.fraction(data, share, 1, stratified=True)]
    for group in set(rarest.tolist()):
        assert abs((chosen == group).sum() - share * (rarest == group).sum()) <= 1


def test_a_class_of_two_images_has_one_in_a_stratified_half():
    data = opening.open_file("scenes:images=200,size=32")
    rare = [one._replace(labels=np.full_like(one.labels, row in (60, 150))) for row, one in enumerate(data.objects)]
    for seed in range(5):
        chosen = detection.fraction(replace(data, objects=tuple(rare)), 0.5, seed, stratified=True)
        assert len(chosen) == 100 and len({60, 150} & set(chosen.tolist())) == 1


def test_the_least_fraction_is_one_image():
    data = opening.open_file("scenes:images=50,size=32")
    assert [len(detection.fraction(data, share, 0)) for share in (1e-6, 0.02, 0.031)] == [1, 1, 2]


def test_a_subset_reads_its_own_images():
    data = opening.open_file("scenes:images=20,size=32")
    plain = detection.subset(data, np.array([7, 3]))
    bare = detection.subset(replace(data, short_side=None, reader=None), np.array([7]))
    assert bare.short_side is bare.reader is bare.label_map is None and plain.keys == (data.keys[7], data.keys[3])
    named = {name: lambda row: row for name in ("label_map", "short_side", "reader")}
    mapped = detection.subset(replace(data, **named), np.array([7, 3]))
    assert all([getattr(mapped, name)(row) for row in (0, 1)] == [7, 3] for name in named)
    for row, whole in enumerate((7, 3)):
        np.testing.assert_array_equal(mapped.read(row, None), data.read(whole, None))
        assert mapped.objects[row] is data.objects[whole] and mapped.ids[row] == data.ids[whole]
    assert len({plain.fingerprint, data.fingerprint, detection.subset(data, np.array([3, 7])).fingerprint}) == 3


def test_id_lists_come_back(tmp_path):
    data = opening.open_file("scenes:images=50,size=32")
    rows = detection.fraction(data, 0.2, 0)
    detection.save_ids(tmp_path / "ids.json", data, rows)
    assert json.loads((tmp_path / "ids.json").read_text()) == (rows + 1).tolist()
    assert detection.load_ids(tmp_path / "ids.json", data).tolist() == rows.tolist()
    for text, words in (
        ("[1, 99]", "99 is not an image"),
        ("[1, 1]", "twice"),
        ("{}", "not a JSON list"),
        ("[", "not a JSON"),
    ):
        (tmp_path / "ids.json").write_text(text)
        with pytest.raises(UsageError, match=words):
            detection.load_ids(tmp_path / "ids.json", data)


def test_boxes_of_leaves_crowds_out(tmp_path):
    data = read(coco(tmp_path), "x")
    assert [len(boxes) for boxes, _ in detection.boxes_of(data)] == [2, 0, 0]
    assert [len(boxes) for boxes, _ in detection.boxes_of(data, crowd=True)] == [2, 1, 0]


@pytest.mark.skipif(PACKS is None, reason="KTRANSFER_DATA does not name the packs")
@pytest.mark.parametrize(("name", "train", "boxes"), [("det_animals7", 698, 1041), ("det_bccd", 205, 2804)])
def test_real_packs_open(name, train, boxes):
    parts = opening.open_detection(str(Path(PACKS) / name))
    assert len(parts[0]) == train and sum(len(one.boxes) for one in parts[0].objects) == boxes
    height, width = parts[1].read(0, None).shape[:2]
    assert parts[1].sizes[0].tolist() == [width, height]
