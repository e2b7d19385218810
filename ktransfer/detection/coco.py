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

from ktransfer.data import foreign
from ktransfer.data.dataset import UNKNOWN
from ktransfer.data.folders import file_size
from ktransfer.detection import frames
from ktransfer.detection.data import Detection, Objects, Outline, add, objects_of, summary
from ktransfer.errors import UsageError
from ktransfer.images import decoding

PARTS = ("images", "annotations", "categories")
Note = tuple[int, int, dict[str, Any]]
"""Of an annotation its place in the file, its label and itself."""


def read(path: Path, spec: str, turned: bool = True) -> Detection:
    """A COCO file of instances; images without objects are kept.

    Ids are names: whole numbers of any size, texts, or numbers written as text in one table and not in the other. The
    names of the images are relative to the folder of the file, to `images/` beside it, or to the folder that
    COCO's own layout has (`train2017/` beside `annotations/instances_train2017.json`): to the one of these that holds
    most of the first 20. Images that are not there are broken ones when they are read; here they are counted.

    Args:
        turned: the boxes are for images as their EXIF turns them; else for images as they are stored.

    Raises:
        UsageError: the file is no COCO file, an id is there twice or names nothing, a name leaves the folder, or no
            image is there.
    """
    held = _load(path)
    images, notes, categories = (held[part] for part in PARTS)
    if not images:
        raise UsageError(f"{path}: lists no images; give a COCO file that has some")
    rows = [_stated(path, "images", place, one) for place, one in enumerate(images)]
    names, sizes = [name for name, _ in rows], [size for _, size in rows]
    classes = [_stated(path, "categories", place, one)[0] for place, one in enumerate(categories)]
    ids, category_ids = ([one["id"] for one in part] for part in (images, categories))
    keys, numbers = (_keys(path, what, of) for what, of in (("image id", ids), ("category id", category_ids)))
    _unique(path, "file name", names)
    _unique(path, "category name", classes)
    if min(min(size) for size in sizes) < 1:
        raise UsageError(
            f"{path}: {names[[min(size) < 1 for size in sizes].index(True)]} has no width or height; correct it"
        )
    folder = _folder(path, names)
    bytes_of = [file_size(str(folder / name)) for name in names]
    counts: dict[str, int] = {}
    by_image = _by_image(path, notes, keys, {one: place for place, one in enumerate(numbers)})
    objects = tuple(_objects(path, own, size, counts) for own, size in zip(by_image, sizes, strict=True))
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
    frames.look(path, names, [folder / name for name in names], sizes, turned)
    digest = hashlib.sha256(path.read_bytes())
    digest.update(repr(bytes_of).encode())
    digest.update(frames.mark(turned))
    return Detection(
        spec=spec,
        name=path.stem,
        keys=tuple(names),
        targets=np.full(len(names), UNKNOWN, np.int32),
        classes=tuple(classes),
        fingerprint=digest.hexdigest(),
        read=lambda row, short_side: decoding.decode(folder / names[row], short_side, turned),
        short_side=lambda row: min(sizes[row]),
        reader=lambda row: partial(decoding.decode, folder / names[row], turned=turned),
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


def _stated(path: Path, part: str, place: int, one: dict[str, Any]) -> tuple[str, tuple[int, int]]:
    """The name of an image, with its width and height, or that of a category."""
    what = "file_name" if part == "images" else "name"
    try:
        name, _ = foreign.key(one[what]), one["id"]
        return name, (_pixels(one["width"]), _pixels(one["height"])) if part == "images" else (1, 1)
    except KeyError as error:
        wrong = f" lacks {error}"
    except ValueError as error:
        wrong = f": {error}"
    raise UsageError(
        f"{path}: {part}[{place}], {foreign.shown(one.get(what))}{wrong}; COCO's have id, file_name, width, height, "
        "name: correct it"
    )


def _pixels(value: Any) -> int:
    """A width or height; 0 where it is negative."""
    found = foreign.whole(value)
    if found >= 2**31:
        raise ValueError(f"{foreign.shown(value)} pixels is too large")
    return max(found, 0)


def _keys(path: Path, what: str, ids: list[Any]) -> list[str]:
    """Ids as they are compared, each once."""
    try:
        found = [foreign.key(one) for one in ids]
    except ValueError as error:
        raise UsageError(f"{path}: {what}: not a number or text ({error}); correct it") from error
    _unique(path, what, found)
    return found


def _unique(path: Path, what: str, values: Iterable[str]) -> None:
    value, times = max(Counter(values).items(), key=lambda pair: pair[1], default=("", 0))
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


def _by_image(path: Path, notes: list[dict[str, Any]], keys: list[str], numbers: dict[str, int]) -> list[list[Note]]:
    """Of each image its annotations."""
    rows = {one: row for row, one in enumerate(keys)}
    found: list[list[Note]] = [[] for _ in keys]
    named = [
        [_listed(note.get(name), known) for note in notes]
        for name, known in (("image_id", rows), ("category_id", numbers))
    ]
    for name, places in zip(("image_id", "category_id"), named, strict=True):
        if strange := [place for place, one in enumerate(places) if one is None]:
            raise UsageError(
                f"{path}: {len(strange)} annotations name a {name} that is not listed, such as "
                f"{foreign.shown(notes[strange[0]].get(name))} (annotations[{strange[0]}]); remove these"
            )
    for place, (note, row, label) in enumerate(zip(notes, *named, strict=True)):
        assert row is not None and label is not None
        found[row].append((place, label, note))
    return found


def _listed(value: Any, known: dict[str, int]) -> int | None:
    try:
        return known.get(foreign.key(value))
    except ValueError:
        return None


def _objects(path: Path, notes: list[Note], size: tuple[int, int], counts: dict[str, int]) -> Objects:
    found = [_object(path, place, note) for place, _, note in notes]
    return objects_of(
        [box for box, _, _ in found],
        [label for _, label, _ in notes],
        size,
        counts,
        crowd=[crowd for _, crowd, _ in found],
        areas=[area for _, _, area in found],
        outlines=[outline(note.get("segmentation"), size, counts) for _, _, note in notes],
    )


def _object(path: Path, place: int, note: dict[str, Any]) -> tuple[list[float], bool, float | None]:
    """Corners, whether it is a crowd, and the area where one is stated."""
    try:
        what = "bbox"
        box = corners(note["bbox"])
        what = "iscrowd"
        crowd = foreign.flag(note.get("iscrowd"))
        what = "area"
        area = foreign.number(note.get("area") or 0)
    except (KeyError, ValueError) as error:
        why = "is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{path}: an annotation is not as COCO's are (annotations[{place}], id {foreign.shown(note.get('id'))}: "
            f"{what}: {why}); each has bbox [x, y, w, h]: correct or remove it"
        ) from error
    return box, crowd, area if 0 < area < math.inf else None


def corners(bbox: Any) -> list[float]:
    """x0, y0, x1, y1 of a box [x, y, width, height]; ValueError where it is no list of four numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise ValueError(f"{foreign.shown(bbox)} is not a list of four numbers")
    x, y, width, height = (foreign.number(value) for value in bbox)
    return [x, y, x + width, y + height]


def outline(given: Any, size: tuple[int, int] | None, counts: dict[str, int]) -> Outline:
    """Polygons of at least three corners, all of them finite, run lengths, or None.

    What is neither is None too, and counted: a task that reads no outlines shall not stop for them.

    Args:
        size: width and height of the image, for run lengths that do not state them; None where they are not known.
    """
    try:
        return _outline(given, size)
    except (KeyError, ValueError):
        add(counts, "outlines that cannot be read, left out", 1)
        return None


def _outline(given: Any, size: tuple[int, int] | None) -> Outline:
    if isinstance(given, dict):
        stated = given.get("size") or (None if size is None else [size[1], size[0]])
        if not isinstance(stated, list) or len(stated) != 2 or not isinstance(given["counts"], str | list):
            raise ValueError("no run lengths")
        return {"size": [foreign.whole(side) for side in stated], "counts": given["counts"]}
    if given and isinstance(given, list) and not any(isinstance(one, list) for one in given):
        given = [given]  # one polygon without the list around it
    if given and not (isinstance(given, list) and all(isinstance(one, list) for one in given)):
        raise ValueError("no polygons")
    polygons = [[foreign.number(value) for value in one] for one in given or [] if len(one) >= 6 and len(one) % 2 == 0]
    return [one for one in polygons if math.isfinite(sum(one))] or None
