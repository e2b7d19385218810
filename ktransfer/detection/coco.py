"""COCO's instance files: images, boxes, polygons, crowds, categories."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ktransfer.data import decoding
from ktransfer.data.dataset import UNKNOWN
from ktransfer.data.folders import file_size
from ktransfer.detection.data import Detection, Outline, objects_of, summary
from ktransfer.errors import UsageError

PARTS = ("images", "annotations", "categories")


def read(path: Path, spec: str) -> Detection:
    """A COCO file of instances; images without objects are kept.

    The names of the images are relative to the folder of the file, to `images/` beside it, or to the folder that
    COCO's own layout has (`train2017/` beside `annotations/instances_train2017.json`): to the one of these that holds
    most of the first 20. Images that are not there are broken ones when they are read; here they are counted.

    Raises:
        UsageError: the file is no COCO file, an id is there twice or names nothing, a name leaves the folder, or no
            image is there.
    """
    held = _load(path)
    images, notes, categories = (held[part] for part in PARTS)
    if not images:
        raise UsageError(f"{path}: lists no images; give a COCO file that has some")
    try:
        ids = [one["id"] for one in images]
        names = [str(one["file_name"]) for one in images]
        sizes = [(int(one["width"]), int(one["height"])) for one in images]
        category_ids = [one["id"] for one in categories]
        classes = [str(one["name"]) for one in categories]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{path}: an image or category lacks {error}; COCO's have id, file_name, width, height, name"
        ) from error
    _unique(path, "image id", ids)
    _unique(path, "file name", names)
    _unique(path, "category id", category_ids)
    _unique(path, "category name", classes)
    if min(min(size) for size in sizes) < 1:
        raise UsageError(
            f"{path}: {names[[min(size) < 1 for size in sizes].index(True)]} has no width or height; correct it"
        )
    folder = _folder(path, names)
    bytes_of = [file_size(str(folder / name)) for name in names]
    counts: dict[str, int] = {}
    by_image = _by_image(path, notes, ids, {number: place for place, number in enumerate(category_ids)})
    try:
        objects = tuple(_objects(by_image[number], size, counts) for number, size in zip(ids, sizes, strict=True))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise UsageError(f"{path}: an annotation is not as COCO's are ({error}); each has bbox [x, y, w, h]") from error
    repeated = sum(times - 1 for times in Counter(repr(note.get("id")) for note in notes).values())
    used = {int(label) for one in objects for label in one.labels}
    more = {
        "repeated annotation ids": repeated,
        "images that do not exist": sum(size < 0 for size in bytes_of),
        f"of {len(classes)} categories without a box": len(classes) - len(used),
    }
    counts |= {words: number for words, number in more.items() if number}
    if counts.get("images that do not exist") == len(names):
        raise UsageError(
            f"{path}: none of its images exists, for example {folder / names[0]}; put them beside the file"
        )
    summary(path, counts)
    digest = hashlib.sha256(path.read_bytes())
    digest.update(repr(bytes_of).encode())
    return Detection(
        spec=spec,
        name=path.stem,
        keys=tuple(names),
        targets=np.full(len(names), UNKNOWN, np.int32),
        classes=tuple(classes),
        fingerprint=digest.hexdigest(),
        read=lambda row, short_side: decoding.decode(folder / names[row], short_side),
        short_side=lambda row: min(sizes[row]),
        reader=lambda row: partial(decoding.decode, folder / names[row]),
        sizes=np.array(sizes, np.int32),
        objects=objects,
        ids=tuple(ids),
        category_ids=tuple(category_ids),
        counts=counts,
    )


def _load(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); give a COCO file") from error
    lacking = [part for part in PARTS if not isinstance(held, dict) or not isinstance(held.get(part), list)]
    if lacking or not all(isinstance(one, dict) for part in PARTS for one in held[part]):
        what = f"no list '{lacking[0]}'" if lacking else "a list with entries that are not objects"
        raise UsageError(f"{path}: {what}; a COCO file of instances has the lists {', '.join(PARTS)}")
    return {part: held[part] for part in PARTS}


def _unique(path: Path, what: str, values: Iterable[Any]) -> None:
    try:
        value, times = max(Counter(values).items(), key=lambda pair: pair[1], default=(None, 0))
    except TypeError as error:
        raise UsageError(f"{path}: {what}: not a number or text; correct it") from error
    if times > 1:
        raise UsageError(f"{path}: {what} {value} occurs {times} times; each must occur once")


def _folder(path: Path, names: list[str]) -> Path:
    """Where the images lie; names that lead out of it are refused, before anything is looked for."""
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in name or ":" in parts.parts[0]:
            raise UsageError(f"{path}: {name!r} leads out of the folder; names must be relative and stay inside")
    split = path.stem.removeprefix("instances_")
    roots = [path.parent, path.parent.parent] if path.parent.name == "annotations" else [path.parent]
    tried = [root / inner for root in roots for inner in ("", "images", split, f"images/{split}")]
    # Not the first image alone: one that is missing shall not move the folder.
    return max(tried, key=lambda folder: sum((folder / name).is_file() for name in names[:20]))


def _by_image(
    path: Path, notes: list[dict[str, Any]], ids: list[Any], numbers: dict[Any, int]
) -> dict[Any, list[tuple[int, dict[str, Any]]]]:
    """Image id -> (label, annotation) of each of its objects."""
    found: dict[Any, list[tuple[int, dict[str, Any]]]] = {number: [] for number in ids}
    for key, known in (("image_id", found), ("category_id", numbers)):
        values = [note.get(key) for note in notes]
        strange = [value for value in values if not isinstance(value, int | str) or value not in known]
        if strange:
            raise UsageError(
                f"{path}: {len(strange)} annotations name a {key} that is not listed, such as {strange[0]}; remove "
                "these"
            )
    for note in notes:
        found[note["image_id"]].append((numbers[note["category_id"]], note))
    return found


def _objects(notes: list[tuple[int, dict[str, Any]]], size: tuple[int, int], counts: dict[str, int]) -> Any:
    corners = [(x, y, x + width, y + height) for x, y, width, height in (map(float, note["bbox"]) for _, note in notes)]
    areas = [float(note["area"]) if note.get("area") else None for _, note in notes]
    return objects_of(
        corners,
        [label for label, _ in notes],
        size,
        counts,
        crowd=[bool(note.get("iscrowd", 0)) for _, note in notes],
        areas=areas,
        outlines=[outline(note.get("segmentation")) for _, note in notes],
    )


def outline(given: Any) -> Outline:
    """Polygons of at least three corners, all of them finite, run lengths, or None."""
    if isinstance(given, dict):
        return {"size": list(given["size"]), "counts": given["counts"]}
    polygons = [[float(value) for value in one] for one in given or [] if len(one) >= 6 and len(one) % 2 == 0]
    return [one for one in polygons if math.isfinite(sum(one))] or None
