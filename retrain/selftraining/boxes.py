"""Pseudo-boxes: what a teacher sees in images without boxes, as a COCO file that other frameworks read too."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ktransfer import files
from ktransfer.data.dataset import UNKNOWN, Dataset, same_images
from ktransfer.data.folders import ENDINGS
from ktransfer.detection.coco import outline
from ktransfer.detection.data import Detection, Objects, Outline, objects_of
from ktransfer.detection.predictions import Prediction
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.machine import cores
from ktransfer.progress import bar

ANY = 2**30  # pixels, the sides of an image whose size is not asked for: no box reaches over its edge
YEAR = re.compile(r"^20\d\d_")
UNREADABLE = (1, 1)  # the size of an image that cannot be read; its canvas says why when it is wanted


class Named(Protocol):
    """What has classes, as a COCO file numbers them: a `Detection`, or a detector."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names."""

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Their numbers."""


def without_boxes(data: Dataset, like: Named, sizes: NDArray[np.int32] | None = None) -> Detection:
    """The images of any data set with their sizes and no objects; `classes` are those of `like`.

    Args:
        sizes: (n, 2) width and height, as `stated_sizes` gives them. Where they are not given and the data states none,
            each image is decoded, once in a process.
    """
    if sizes is None:
        sizes = data.sizes if isinstance(data, Detection) else _decoded_sizes(data)
    none = objects_of([], [], (1, 1), {})
    return Detection(
        spec=data.spec,
        name=data.name,
        keys=data.keys,
        targets=np.full(len(data), UNKNOWN, np.int32),
        classes=like.classes,
        fingerprint=data.fingerprint,
        read=data.read,
        short_side=data.short_side,
        reader=data.reader,
        sizes=sizes,
        objects=(none,) * len(data),
        ids=tuple(range(1, len(data) + 1)),
        category_ids=like.category_ids,
    )


def stated_sizes(path: Path, data: Dataset) -> NDArray[np.int32]:
    """(n, 2) width and height of the images that a file of `write` lists; `UNREADABLE` for the others.

    With them nothing is decoded for the student, which sees no other images.
    """
    held = {one["file_name"]: (one["width"], one["height"]) for one in files.read_json(path)["images"]}
    return np.array([held.get(key, UNREADABLE) for key in data.keys], np.int32)


def kept_sizes(path: Path, data: Dataset) -> NDArray[np.int32]:
    """(n, 2) width and height, as `without_boxes` finds them, by a file: decoded once however often it is killed."""
    if isinstance(data, Detection):
        return data.sizes
    if not path.is_file():
        files.write_bytes(path, _decoded_sizes(data).tobytes())
    return np.frombuffer(path.read_bytes(), np.int32).reshape(-1, 2).copy()


@lru_cache(maxsize=1)
def _decoded_sizes(data: Dataset) -> NDArray[np.int32]:
    with bar(len(data), "read image sizes") as shown, ThreadPoolExecutor(cores()) as pool:
        found: list[tuple[int, int]] = []
        for size in pool.map(lambda row: _size(data, row), range(len(data))):
            found.append(size)
            shown.update(1)
    return np.array(found, np.int32)


def _size(data: Dataset, row: int) -> tuple[int, int]:
    try:
        height, width = data.read(row, None).shape[:2]
    except BrokenImage:
        return UNREADABLE
    return width, height


def write(
    path: Path,
    data: Detection,
    predictions: Mapping[int, Prediction],
    about: dict[str, Any],
    outlines: Mapping[int, Sequence[Outline]] | None = None,
) -> None:
    """Write the boxes of the images that could be read, with scores, as COCO's format has them.

    Args:
        predictions: row of `data` -> boxes in pixels of the image.
        about: goes into `info`.
        outlines: of the predictions, where they have some.
    """
    images: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for row, prediction in sorted(predictions.items()):
        width, height = (int(side) for side in data.sizes[row])
        images.append({"id": data.ids[row], "file_name": data.keys[row], "width": width, "height": height})
        masks = outlines[row] if outlines is not None else [None] * len(prediction.scores)
        for box, score, label, mask in zip(*(part.tolist() for part in prediction), masks, strict=True):
            x1, y1, x2, y2 = (round(value, 2) for value in box)
            wide, high = round(x2 - x1, 2), round(y2 - y1, 2)
            notes.append(
                {
                    "id": len(notes) + 1,
                    "image_id": data.ids[row],
                    "category_id": data.category_ids[label],
                    "bbox": [x1, y1, wide, high],
                    "area": round(wide * high, 2),
                    "iscrowd": 0,
                    "score": round(score, 6),
                }
                | ({"segmentation": mask} if mask else {})
            )
    categories = [{"id": number, "name": name} for number, name in zip(data.category_ids, data.classes, strict=True)]
    files.write_json(path, {"info": about, "images": images, "annotations": notes, "categories": categories})


def join(path: Path, parts: Sequence[Path], about: dict[str, Any]) -> dict[str, int]:
    """Write what files of `write` hold as one of them: the same bytes as if all had been written at once.

    Returns:
        The sums of the numbers that stand in the `info` of the parts.
    """
    images: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    facts = Counter[str]()
    held: dict[str, Any] = {}
    for part in parts:
        held = files.read_json(part)
        images += held["images"]
        notes += [note | {"id": number} for number, note in enumerate(held["annotations"], len(notes) + 1)]
        facts.update(held["info"])
    files.write_json(path, held | {"info": about, "images": images, "annotations": notes})
    return dict(facts)


def read(path: Path, data: Detection, threshold: float | NDArray[np.float64]) -> tuple[Detection, NDArray[np.int64]]:
    """`data` with the boxes of a COCO file, ours or others', and the rows that the file lists.

    Images are found by their file name, classes by their name. Boxes with a `score` below the threshold are left out,
    and those around many objects (`iscrowd`); those without a score count as certain.

    Args:
        threshold: one score, or one for each class.

    Raises:
        UsageError: no COCO file, images or classes that the data does not have.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig"))
        place = {key: row for row, key in enumerate(data.keys)}
        by_id = {one["id"]: str(one["file_name"]) for one in held["images"]}
        names = {one["id"]: str(one["name"]) for one in held["categories"]}
        notes = [
            (note["image_id"], note["category_id"], note["bbox"], note.get("score"), note.get("segmentation"))
            for note in held["annotations"]
            if not note.get("iscrowd")
        ]
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); give a COCO file of boxes") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: lacks {error}; a COCO file has images, annotations with bbox, categories") from error
    for what, known, wanted in (("images", by_id.values(), place), ("classes", names.values(), data.classes)):
        strange = [name for name in known if name not in wanted]
        if strange:
            raise UsageError(
                f"{path}: {len(strange)} of its {what} are not those of {data.spec}, such as {strange[0]}; give the "
                "file that was made for these images"
            )
    least = np.broadcast_to(np.asarray(threshold, np.float64), len(data.classes))
    found: dict[int, list[tuple[list[float], int, Outline]]] = {place[name]: [] for name in by_id.values()}
    try:
        for image, category, bbox, score, mask in notes:
            x, y, width, height = (float(value) for value in bbox)
            label = data.classes.index(names[category])
            if score is None or float(score) >= least[label]:
                found[place[by_id[image]]].append(([x, y, x + width, y + height], label, outline(mask)))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path}: an annotation is not as COCO's are ({error}); each has bbox [x, y, w, h]") from error
    objects = list(data.objects)
    for row, held_here in found.items():
        width, height = (int(side) for side in data.sizes[row])
        corners, labels = [box for box, _, _ in held_here], [label for _, label, _ in held_here]
        outlines = [mask for _, _, mask in held_here]
        objects[row] = objects_of(corners, labels, (width, height), {}, outlines=outlines)
    return replace(data, objects=tuple(objects)), np.array(sorted(found), np.int64)


def adaptive_thresholds(labelled: Detection, path: Path, data: Detection, least: float) -> NDArray[np.float64]:
    """For each class the score at which an image has on average as many pseudo-boxes as a labelled one has boxes.

    Args:
        least: no threshold is lower.

    Returns:
        (classes,) float64.
    """
    scores: list[list[float]] = [[] for _ in data.classes]
    held = json.loads(path.read_text(encoding="utf-8"))
    label = {number: place for place, number in enumerate(data.category_ids)}
    for note in held["annotations"]:
        scores[label[note["category_id"]]].append(float(note["score"]))
    found = np.full(len(data.classes), least)
    for place, own in enumerate(scores):
        rate = sum(int((one.labels[~one.crowd] == place).sum()) for one in labelled.objects) / len(labelled)
        wanted = round(rate * len(held["images"]))
        ranked = sorted(own, reverse=True)
        if wanted < len(ranked):
            found[place] = max(least, np.nextafter(ranked[wanted], 2))  # the first box that is one too many is out
    return found


def shared(data: Dataset, test: Dataset) -> NDArray[np.int64]:
    """The rows of `data` that are images of `test` too: of the same file name, endings aside, and the same pixels."""
    named: dict[str, list[int]] = {}
    for row, key in enumerate(test.keys):
        named.setdefault(_name(key), []).append(row)
    pairs = [(row, other) for row, key in enumerate(data.keys) for other in named.get(_name(key), ())]
    same = same_images(data, test, pairs)
    return np.unique(np.array([row for (row, _), one in zip(pairs, same, strict=True) if one], np.int64))


def _name(key: str) -> str:
    """The file name without its ending, which VOC's keys do not have; numbers as in 2007.17 are no ending.

    And without the year with which VOC2012 names the images that it takes over: 2007_000175 is 000175 of VOC2007.
    """
    path = PurePosixPath(key)
    return YEAR.sub("", path.stem if path.suffix.lower() in ENDINGS else path.name)


def count(objects: tuple[Objects, ...], classes: int) -> list[int]:
    """How many boxes of each class there are, crowds aside."""
    labels = np.concatenate([one.labels[~one.crowd] for one in objects]) if objects else np.zeros(0, np.int64)
    return [int(number) for number in np.bincount(labels, minlength=classes)]
