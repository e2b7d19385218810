"""Opening images with boxes: COCO files, a VOCdevkit or `scenes:`."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from ktransfer.data.dataset import UNKNOWN
from ktransfer.data.folders import VAL_NAMES
from ktransfer.detection.data import Detection, Objects, objects_of, parted, with_classes
from ktransfer.detection.frames import OBEY
from ktransfer.errors import UsageError
from ktransfer.progress import say_once


def open_detection(spec: str, masks: bool = False, exif: str = OBEY) -> tuple[Detection, Detection]:
    """The train and test splits that `--labelled` names, with the same classes.

    `scenes:...`; a root with `instances_train*.json` (or `train*.json`) and one of val, test, in it or in
    `annotations/`; a VOCdevkit (or one of its VOC2007, VOC2012); or one COCO file, a fifth of whose images, drawn
    with seed 0, then is the test split. A line says what was dropped or clipped. With `masks` a VOCdevkit gives
    its images that have the class of every pixel. The classes are those of the training split, in its order; those of
    the test split are known by their names.

    Args:
        exif: "obey": boxes are for images as their EXIF turns them upright; "ignore": for images as they are stored.

    Raises:
        UsageError: a file is missing or breaks a rule, the test split has boxes of a class that the training split
            does not have, or a split holds no box.
    """
    from ktransfer.detection import coco, voc

    if spec.startswith("scenes:"):
        return _scenes(spec, "train"), _scenes(spec, "val")
    root, turned = Path(spec).expanduser(), exif == OBEY
    if root.suffix == ".json":
        splits = parted(open_file(spec, exif))
    elif not root.is_dir():
        raise UsageError(
            f"{spec}: no such folder; give a root with COCO files or a VOCdevkit, one COCO file, or scenes:"
        )
    elif years := voc.years(root):
        splits = voc.open_splits(spec, years, "Segmentation" if masks else "Main", turned)
    else:
        found = [
            next(filter(None, (_coco_file(root, name) for name in names)), None) for names in (("train",), VAL_NAMES)
        ]
        if found[0] is None or found[1] is None:
            missing = "instances_train.json" if found[0] is None else "instances_val.json"
            raise UsageError(
                f"{spec}: no {missing} in it or in annotations/, and no VOCdevkit (VOC2007/ImageSets/Main); give a "
                "root that has one of these, one COCO file, or scenes:"
            )
        splits = coco.read(found[0], spec, turned), coco.read(found[1], spec, turned)
    splits = splits[0], _of_same_classes(*splits)
    for split, words in zip(splits, ("training", "test"), strict=True):
        if not any(len(one.boxes) for one in split.objects):
            raise UsageError(f"{spec}: no box in the {words} split; give images with boxes")
        _refuse_shares(split, words)
    return splits


def _of_same_classes(train: Detection, test: Detection) -> Detection:
    """The test split with the classes of the training split.

    Raises:
        UsageError: it has boxes of others.
    """
    if train.classes == test.classes:
        return test
    strange = [
        name
        for label, name in enumerate(test.classes)
        if name not in train.classes and any((one.labels == label).any() for one in test.objects)
    ]
    if strange:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise UsageError(
            f"{test.spec}: its splits have different categories ({', '.join(differing[:5])}), and the test split has "
            f"boxes of {strange[0]}; give both the same"
        )
    say_once(f"{test.spec}: its splits list different categories, or in different order; they are matched by name")
    return with_classes(test, train.classes, train.category_ids)


def _refuse_shares(data: Detection, words: str) -> None:
    """Refuse boxes that are shares of their image, all of which lie in its first pixel."""
    boxed = [row for row, one in enumerate(data.objects) if len(one.boxes)]
    if max(float(data.objects[row].boxes.max()) for row in boxed) <= 1 < int(data.sizes[boxed].min()):
        raise UsageError(
            f"{data.spec}: all boxes of the {words} split lie within the first pixel of their images, as if they were "
            "shares of width and height; give them in pixels"
        )


def open_file(spec: str, exif: str = OBEY) -> Detection:
    """One COCO file, or the training images of `scenes:...`.

    Args:
        exif: as for `open_detection`.

    Raises:
        UsageError: as `open_detection`.
    """
    from ktransfer.detection import coco

    if spec.startswith("scenes:"):
        return _scenes(spec, "train")
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UsageError(f"{spec}: no such file; give a COCO file (.json)")
    return coco.read(path, spec, exif == OBEY)


def _coco_file(root: Path, name: str) -> Path | None:
    """`instances_NAME.json`, `instances_NAME2017.json` or `NAME.json` in the root or in annotations/."""
    pattern = re.compile(rf"(instances_)?{name}\d*\.json")
    for folder in (root, root / "annotations"):
        found = (
            sorted(path for path in folder.glob("*.json") if pattern.fullmatch(path.name)) if folder.is_dir() else []
        )
        if len(found) > 1:
            raise UsageError(f"{folder}: {found[0].name} and {found[1].name} could both be {name}; name one COCO file")
        if found:
            return found[0]
    return None


def _scenes(spec: str, split: str) -> Detection:
    from ktransfer.data import opening, scenes

    chosen = scenes.parse(spec)
    images = opening.open_splits(spec)[split == "val"]
    size, counts = (chosen.size, chosen.size), dict[str, int]()
    objects: list[Objects] = []
    for row in range(len(images)):
        found = scenes.objects(chosen.seed, split, row, chosen.size)
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (one.box for one in found)]
        outlines = [one.polygons for one in found]
        objects.append(objects_of(boxes, [one.category for one in found], size, counts, outlines=outlines))
    return Detection(
        **vars(replace(images, targets=np.full(len(images), UNKNOWN, np.int32))),
        sizes=np.full((len(images), 2), chosen.size, np.int32),
        objects=tuple(objects),
        ids=tuple(range(1, len(images) + 1)),
        category_ids=tuple(range(1, len(scenes.CLASSES) + 1)),
        counts=counts,
    )
