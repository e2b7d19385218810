"""Layouts of labelled images: what is found by looking, and which file is missing where it is not."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ktransfer.data.opening import open_splits
from ktransfer.errors import UsageError

PACKS = os.environ.get("KTRANSFER_DATA")


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(root / name)


def table(root: Path, name: str, *lines: str) -> None:
    (root / name).write_text("\n".join(("path,label", *lines)) + "\n")


def refused(root: Path, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        open_splits(str(root))
    assert "\n" not in str(caught.value)


def test_csv_with_one_label(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.png", "sub/d.png")
    table(tmp_path, "train.csv", "a.png,dog", "b.png, cat", "sub/d.png,dog")
    table(tmp_path, "val.csv", "c.png,dog")
    train, val = open_splits(str(tmp_path))
    assert (train.classes, train.targets.tolist(), train.tags) == (("cat", "dog"), [1, 0, 1], None)
    assert (val.classes, val.targets.tolist(), val.keys) == (("cat", "dog"), [1], ("c.png",))
    assert train.keys == ("a.png", "b.png", "sub/d.png") and train.read(2, None).shape == (6, 8, 3)
    assert train.targets.dtype == np.int32
    table(tmp_path, "train.csv", "a.png,cat", "b.png,cat", "sub/d.png,dog")
    assert open_splits(str(tmp_path))[0].fingerprint != train.fingerprint


@pytest.mark.parametrize(
    "lines",
    [
        ("a.png,dog;cat", "b.png,", "c.png,cat"),
        ("a.png,dog | cat", "b.png,", "c.png,cat"),
        ("a.png,dog", "b.png,", "c.png,cat", "a.png,cat", "a.png,dog"),
    ],
)
def test_csv_with_several_labels(tmp_path: Path, lines: tuple[str, ...]) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    table(tmp_path, "train.csv", *lines)
    table(tmp_path, "validation.csv", "c.png,dog")
    train, val = open_splits(str(tmp_path))
    assert train.tags is not None and val.tags is not None
    assert train.keys == ("a.png", "b.png", "c.png")
    assert (train.tags.tolist(), val.tags.tolist()) == ([[1, 1], [0, 0], [1, 0]], [[0, 1]])
    assert train.tags.dtype == np.int8 and train.targets.tolist() == [-1] * 3


def test_whole_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    table(tmp_path, "train.csv", "a.png,10", "b.png,9")
    table(tmp_path, "test.csv", "b.png,10")
    assert [part.classes for part in open_splits(str(tmp_path))] == [("9", "10")] * 2


def test_csv_files_that_are_wrong(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    table(tmp_path, "train.csv", "a.png,dog", "b.png,cat")
    refused(tmp_path, r"has train\.csv, but no val or valid or validation or test with the ending \.csv or \.tsv")
    table(tmp_path, "val.csv", "a.png,cow")
    refused(tmp_path, r"val\.csv: labels that .*train\.csv does not have: cow")
    table(tmp_path, "val.csv", "a.png,", "b.png,")
    refused(tmp_path, r"val\.csv has no label; write a column label")
    (tmp_path / "val.csv").write_text("path\na.png\n")
    refused(tmp_path, r"val\.csv has no label; write a column label")
    (tmp_path / "val.csv").write_text("path,label\n")
    refused(tmp_path, r"val\.csv lists no images")
    table(tmp_path, "val.csv", "x.png,dog")
    refused(tmp_path, r"none of the 1 images of its split val exists, such as .*x\.png")
    table(tmp_path, "train.csv", "a.png,dog", "b.png,dog")
    refused(tmp_path, "fewer than two different labels")
    (tmp_path / "train.csv").unlink()
    refused(tmp_path, r"has val\.csv, but no train with the ending")


def test_a_lone_table_beside_class_folders_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png")
    table(tmp_path, "train.csv", "a.png,dog")
    assert open_splits(str(tmp_path))[0].keys == ("cat/1.png", "dog/2.png")


def voc(root: Path, year: str = "VOC2007", parts: tuple[str, ...] = ("train", "val", "trainval", "test")) -> Path:
    place = root / year
    main = place / "ImageSets" / "Main"
    main.mkdir(parents=True)
    rows = {"train": "000001", "val": "000002", "trainval": "000001 000002", "test": "000003 000004"}
    truth = {"cat": {"000001": "1", "000002": "-1", "000003": " 0", "000004": " 1"}}
    truth["dog"] = {"000001": "-1", "000002": "1", "000003": " 1", "000004": "-1"}
    for part in parts:
        (main / f"{part}.txt").write_text("\n".join(rows[part].split()) + "\n")
        for label, known in truth.items():
            lines = [f"{image} {known[image]}" for image in rows[part].split()]
            (main / f"{label}_{part}.txt").write_text("\n".join(lines) + "\n")
    put(place, *(f"JPEGImages/00000{number}.jpg" for number in (1, 2, 3, 4)))
    return place


def test_voc(tmp_path: Path) -> None:
    place = voc(tmp_path / "VOCdevkit")
    for root in (tmp_path, tmp_path / "VOCdevkit", place):
        train, val = open_splits(str(root))
        assert train.tags is not None and val.tags is not None
        assert train.classes == val.classes == ("cat", "dog")
        assert (train.keys, val.keys) == (("000001.jpg", "000002.jpg"), ("000003.jpg", "000004.jpg"))
        assert (train.tags.tolist(), val.tags.tolist()) == ([[1, 0], [0, 1]], [[-1, 1], [1, 0]])  # a difficult cat
        assert (train.name, val.name) == ("trainval", "test")
        assert val.read(1, None).shape == (6, 8, 3)


def test_voc_without_labels_for_its_test_part(tmp_path: Path) -> None:
    place = voc(tmp_path, "VOC2012", ("train", "val", "trainval"))
    train, val = open_splits(str(tmp_path))
    assert (train.keys, val.keys) == (("000001.jpg",), ("000002.jpg",))
    for label in ("cat", "dog"):
        (place / "ImageSets/Main" / f"{label}_test.txt").write_text("000003 0\n000004 0\n")
    assert [part.name for part in open_splits(str(tmp_path))] == ["train", "val"]


def test_voc_files_that_are_missing(tmp_path: Path) -> None:
    place = voc(tmp_path)
    main = place / "ImageSets" / "Main"
    voc(tmp_path, "VOC2012")
    refused(tmp_path, "holds VOC2007 and VOC2012; name one, such as .*VOC2007")
    (main / "dog_test.txt").unlink()
    refused(place, r"dog_test\.txt: No such file.*needed for the labels")
    (main / "dog_test.txt").write_text("000003 1\n")
    refused(place, r"dog_test\.txt does not list the images of cat_test\.txt")
    (main / "dog_test.txt").write_text("000003 2\n")
    refused(place, r"dog_test\.txt, line 1: must be an image and 1, 0 or -1, not '000003 2'")
    (main / "dog_trainval.txt").unlink()
    refused(place, r"Main has no CLASS_trainval\.txt of two classes")
    voc(tmp_path / "other")
    (tmp_path / "other/VOC2007/JPEGImages").rename(tmp_path / "elsewhere")
    refused(tmp_path / "other", "VOC2007 has no JPEGImages")
    (tmp_path / "elsewhere").rename(tmp_path / "other/VOC2007/JPEGImages")
    (tmp_path / "other/VOC2007/ImageSets").rename(tmp_path / "elsewhere")
    refused(tmp_path / "other", "VOC2007 has JPEGImages, but no ImageSets/Main")


def coco(path: Path, names: tuple[str, ...], marks: tuple[tuple[int, int], ...], **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": 10 + place, "file_name": name} for place, name in enumerate(names)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [{"image_id": 10 + image, "category_id": kind} for image, kind in marks],
    }
    path.write_text(json.dumps(content | more))


@pytest.mark.parametrize("where", ["", "images/", "train2017/", "images/train2017/"])
def test_coco(tmp_path: Path, where: str) -> None:
    put(tmp_path, f"{where}a.jpg", f"{where}b.jpg", f"{where.replace('train', 'val')}c.jpg")
    folder = tmp_path / "annotations" if where else tmp_path
    coco(folder / "instances_train2017.json", ("a.jpg", "b.jpg"), ((0, 7), (0, 7), (0, 3)))
    coco(folder / "instances_val2017.json", ("c.jpg",), ((0, 7),))
    train, val = open_splits(str(tmp_path))
    assert train.tags is not None and val.tags is not None
    assert train.classes == val.classes == ("cat", "dog")  # in the order of their numbers
    assert (train.tags.tolist(), val.tags.tolist()) == ([[1, 1], [0, 0]], [[0, 1]])
    assert (train.keys, val.keys) == (("a.jpg", "b.jpg"), ("c.jpg",))
    assert val.read(0, None).shape == (6, 8, 3)
    coco(folder / "instances_train2017.json", ("a.jpg", "b.jpg"), ((0, 7),))
    assert open_splits(str(tmp_path))[0].fingerprint != train.fingerprint


def test_ids_of_coco_are_names(tmp_path: Path) -> None:
    """Texts, text in one table and number in the other, others in each split; classes are matched by name."""
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    texts = [{"id": "9", "name": "dog"}, {"id": "x", "name": "cat"}]
    marks = [{"image_id": "10", "category_id": "x"}, {"image_id": 11, "category_id": 9}]
    coco(tmp_path / "instances_train.json", ("a.jpg", "b.jpg"), (), categories=texts, annotations=marks)
    coco(tmp_path / "instances_val.json", ("c.jpg",), ((0, 7), (0, 7)))
    train, val = open_splits(str(tmp_path))
    assert train.tags is not None and val.tags is not None
    assert train.classes == val.classes == ("dog", "cat")
    assert (train.tags.tolist(), val.tags.tolist()) == ([[0, 1], [1, 0]], [[1, 0]])
    coco(tmp_path / "instances_val.json", ("c.jpg",), (), categories=[*texts, {"id": 9, "name": "owl"}])
    refused(tmp_path, "an id occurs twice in its categories")
    coco(tmp_path / "instances_val.json", ("c.jpg",), (), categories=[{"id": None, "name": "owl"}])
    refused(tmp_path, r"not an annotation file of COCO \(ValueError: None is not a number or text")


def test_coco_files_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "annotations" / "instances_train.json"
    coco(path, ("a.jpg",), ((0, 7),))
    refused(tmp_path, r"annotations has no instances_val\*\.json or .*instances_test\*\.json; put it there")
    coco(path.with_name("instances_val.json"), ("a.jpg",), ((0, 7),))
    refused(tmp_path, r"instances_train\.json: its images do not exist \(looked for .*images/train/a\.jpg\)")
    put(tmp_path, "a.jpg")
    open_splits(str(tmp_path))
    coco(path, ("a.jpg",), ())
    refused(tmp_path, "no image of its split train has a label")
    coco(path, ("a.jpg",), ((5, 7),))
    refused(tmp_path, "an annotation names image 15 or category 7, which it does not list")
    coco(path, (), ())
    refused(tmp_path, "lists no images")
    coco(path, ("a.jpg",), ((0, 7),), categories=[{"id": 7, "name": "cow"}])
    refused(tmp_path, r"have different categories \(cat, cow, dog\)")
    coco(path, ("a.jpg",), ((0, 7),), categories=3)
    refused(tmp_path, r"instances_train\.json is not an annotation file of COCO \(TypeError")
    path.write_text("{")
    refused(tmp_path, r"instances_train\.json is not an annotation file of COCO \(JSONDecodeError")
    coco(path, ("a.jpg",), ((0, 7),))
    coco(path.with_name("instances_train2.json"), ("a.jpg",), ((0, 7),))
    refused(tmp_path, "has instances_train.json and instances_train2.json; leave one of them there")


def test_a_root_without_any_layout_names_them(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    refused(tmp_path, r"has no folder train; --labelled takes a root with .*train\.csv.*VOCdevkit.*instances_\*\.json")


@pytest.mark.skipif(PACKS is None, reason="KTRANSFER_DATA names no folder that holds det_animals7")
def test_animals() -> None:
    root = Path(str(PACKS)) / "det_animals7"
    train, val = open_splits(str(root))
    assert (len(train), len(val), len(train.classes)) == (698, 210, 7)
    for part, name in ((train, "train"), (val, "val")):
        content = json.loads((root / f"instances_{name}.json").read_text())
        present = {(mark["image_id"], mark["category_id"]) for mark in content["annotations"]}
        assert part.tags is not None and part.tags.sum() == len(present)
        assert part.read(0, 64).min() >= 0


def test_an_image_without_a_label_does_not_make_them_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "a.png", "b.png", "c.png", "d.png")
    table(tmp_path, "train.csv", "a.png,dog", "b.png,", "c.png,cat")
    table(tmp_path, "val.csv", "d.png,cat", "a.png,  ")
    train, val = open_splits(str(tmp_path))
    assert train.tags is val.tags is None
    assert (train.keys, val.keys) == (("a.png", "c.png"), ("d.png",))
    assert (train.targets.tolist(), val.targets.tolist()) == ([1, 0], [0])
    said = capsys.readouterr().err
    assert "train.csv: 1 of 3 images, such as b.png, have no label and are left out" in said
    assert "val.csv: 1 of 2 images, such as a.png" in said


def test_what_makes_labels_several_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    table(tmp_path, "train.csv", "a.png,dog;cat", "b.png,", "c.png,cat")
    table(tmp_path, "val.csv", "c.png,dog")
    assert open_splits(str(tmp_path))[0].tags is not None
    assert "several labels an image: 1 of 4 have more than one, 1 have none" in capsys.readouterr().err


def test_a_supercategory_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "1.png", "2.png")
    kinds = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "animals"},
        {"id": 2, "name": "dog", "supercategory": "animals"},
        {"id": 3, "name": "person", "supercategory": "person"},
    ]
    for part, image in (("train", 1), ("val", 2)):
        notes = [{"id": 1, "image_id": image, "category_id": 1}]
        notes += [{"id": 2, "image_id": image, "category_id": 2}] if part == "train" else []
        held = {"images": [{"id": image, "file_name": f"{image}.png"}], "categories": kinds, "annotations": notes}
        (tmp_path / f"instances_{part}.json").write_text(json.dumps(held))
    train, val = open_splits(str(tmp_path))
    assert train.classes == val.classes == ("cat", "dog", "person")
    assert train.tags is not None and val.tags is not None
    assert (train.tags.tolist(), val.tags.tolist()) == ([[1, 1, 0]], [[1, 0, 0]])
    said = capsys.readouterr().err
    assert "1 supercategories that no image has are no classes: animals" in said
    assert "1 of 3 categories are in no image" in said
