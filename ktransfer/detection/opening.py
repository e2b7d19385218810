"""Opening images with boxes: COCO files, a VOCdevkit or `scenes:`."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from ktransfer.data.dataset import UNKNOWN
from ktransfer.data.folders import VAL_NAMES
from ktransfer.detection.data import Detection, Objects, fraction, objects_of, subset
from ktransfer.errors import UsageError

SPLIT = 0.2  # of a file that has no second one beside it


def open_detection(spec: str, masks: bool = False) -> tuple[Detection, Detection]:
    """The train and test splits that `--labelled` names, with the same classes.

    `scenes:...`; a root with `instances_train*.json` (or `train*.json`) and one of val, test, in it or in
    `annotations/`; a VOCdevkit (or one of its VOC2007, VOC2012); or one COCO file, a fifth of whose images, drawn
    with seed 0, then is the test split. A line says what was dropped or clipped. With `masks` a VOCdevkit gives
    its images that have the class of every pixel.

    Raises:
        UsageError: a file is missing or breaks a rule, the classes differ, or a split holds no box.
    """
    from ktransfer.detection import coco, voc

    if spec.startswith("scenes:"):
        return _scenes(spec, "train"), _scenes(spec, "val")
    root = Path(spec).expanduser()
    if root.suffix == ".json":
        whole = open_file(spec)
        test = fraction(whole, SPLIT, 0)
        splits = subset(whole, np.setdiff1d(np.arange(len(whole)), test)), subset(whole, test)
    elif not root.is_dir():
        raise UsageError(
            f"{spec}: no such folder; give a root with COCO files or a VOCdevkit, one COCO file, or scenes:"
        )
    elif years := voc.years(root):
        splits = voc.open_splits(spec, years, "Segmentation" if masks else "Main")
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
        splits = coco.read(found[0], spec), coco.read(found[1], spec)
    if splits[0].classes != splits[1].classes:
        differing = sorted(set(splits[0].classes) ^ set(splits[1].classes)) or ["their order"]
        raise UsageError(
            f"{spec}: its splits have different categories ({', '.join(differing[:5])}); give both the same"
        )
    for split, words in zip(splits, ("training", "test"), strict=True):
        if not any(len(one.boxes) for one in split.objects):
            raise UsageError(f"{spec}: no box in the {words} split; give images with boxes")
    return splits


def open_file(spec: str) -> Detection:
    """One COCO file, or the training images of `scenes:...`.

    Raises:
        UsageError: as `open_detection`.
    """
    from ktransfer.detection import coco

    if spec.startswith("scenes:"):
        return _scenes(spec, "train")
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UsageError(f"{spec}: no such file; give a COCO file (.json)")
    return coco.read(path, spec)


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
