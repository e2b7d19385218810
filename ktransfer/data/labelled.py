"""Labelled images in the layouts that data sets come in, found by looking: CSV, VOCdevkit and COCO.

`opening.open_splits` asks `open_layout` first; class folders and packs are its own. A root is read as

- VOC, where it or a VOC2007, VOC2012, ... below it (or below its VOCdevkit) has ImageSets/Main: the files
  CLASS_trainval.txt and CLASS_test.txt, or CLASS_train.txt and CLASS_val.txt where the test split has no labels;
- COCO, where it or its `annotations` has instances_train*.json: an image has the classes of its boxes;
- CSV, where it has train.csv (or .tsv) and val.csv (valid, validation, test): columns path and label (see
  `opening.open_dataset`). Several labels of an image stand in one cell, separated by ";" or "|", or in several rows;
  where that occurs anywhere in either file, the images of both have `tags`, and one without a label has none of the
  classes. Where it does not, images without a label are left out, and a line says how many.

Of VOC, COCO and such CSV files the images have `tags`; objects that VOC calls difficult are tagged -1, not counted.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktransfer.data import foreign
from ktransfer.data.dataset import Dataset, class_names, escaped, of_files
from ktransfer.data.folders import PACKS, VAL_NAMES, file_size, find_named, names_in
from ktransfer.data.lists import found as found_of
from ktransfer.data.lists import read_list
from ktransfer.errors import UsageError
from ktransfer.files import lines_of, read_text
from ktransfer.progress import say_once

TABLES = (".csv", ".tsv")
_SEVERAL = re.compile("[;|]")
_TRUTH = {"1": 1, "-1": 0, "0": -1}  # of VOC: yes, no, difficult


def open_layout(spec: str, root: Path) -> tuple[Dataset, Dataset] | None:
    """The train and val splits of a root in one of the layouts of this file, None where it is in none of them.

    Raises:
        UsageError: one line that says which file is missing or wrong.
    """
    return _voc(spec, root) or _coco(spec, root) or _csv(spec, root)


def _voc(spec: str, root: Path) -> tuple[Dataset, Dataset] | None:
    if not root.is_dir():
        return None
    places = [root, *sorted(root.glob("VOCdevkit/VOC*")), *sorted(root.glob("VOC[0-9]*"))]
    found = [place for place in places if (place / "ImageSets" / "Main").is_dir()]
    if not found:
        bare = next((place for place in places if (place / "JPEGImages").is_dir()), None)
        if bare is not None:
            raise UsageError(f"{bare} has JPEGImages, but no ImageSets/Main; unpack the whole VOC archive there")
        return None
    if len(found) > 1:
        raise UsageError(f"{spec} holds {' and '.join(place.name for place in found)}; name one, such as {found[0]}")
    main = found[0] / "ImageSets" / "Main"
    tested = any(1 in _voc_labels(path)[1] for path in sorted(main.glob("*_test.txt"))[:1])
    names = ("trainval", "test") if tested else ("train", "val")
    classes = sorted(path.name.removesuffix(f"_{names[0]}.txt") for path in main.glob(f"*_{names[0]}.txt"))
    if len(classes) < 2:
        raise UsageError(f"{main} has no CLASS_{names[0]}.txt of two classes; unpack the whole VOC archive there")
    if not (found[0] / "JPEGImages").is_dir():
        raise UsageError(f"{found[0]} has no JPEGImages; unpack the whole VOC archive there")
    say_once(f"{spec}: several labels an image, of {names[0]} and {names[1]} of {found[0].name}")
    train, val = (_voc_split(spec, found[0], name, classes) for name in names)
    return train, val


def _voc_split(spec: str, place: Path, name: str, classes: list[str]) -> Dataset:
    main = place / "ImageSets" / "Main"
    images: list[str] = []
    columns: list[list[int]] = []
    for label in classes:
        path = main / f"{label}_{name}.txt"
        listed, truth = _voc_labels(path)
        if columns and listed != images:
            raise UsageError(f"{path} does not list the images of {classes[0]}_{name}.txt; unpack both again")
        images = listed
        columns.append(truth)
    tags = np.array(columns, np.int8).T
    return _with_tags(spec, place / "JPEGImages", name, [f"{image}.jpg" for image in images], classes, tags)


def _voc_labels(path: Path) -> tuple[list[str], list[int]]:
    """Names of images, and 1, 0 or -1 (difficult) for each."""
    rows = [line.split() for line in lines_of(_read(path)) if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or row[1] not in _TRUTH:
            raise UsageError(f"{path}, line {number}: must be an image and 1, 0 or -1, not {' '.join(row)!r}")
    return [row[0] for row in rows], [_TRUTH[row[1]] for row in rows]


def _coco(spec: str, root: Path) -> tuple[Dataset, Dataset] | None:
    folder = next((place for place in (root / "annotations", root) if any(place.glob("instances_*.json"))), None)
    if folder is None:
        return None
    names = [_instances(folder, ("train",)), _instances(folder, VAL_NAMES)]
    say_once(f"{spec}: several labels an image, of {names[0].name} and {names[1].name}")
    (train, above), (val, _) = (_coco_split(spec, root, path) for path in names)
    if train.classes != val.classes:
        differing = ", ".join(sorted(set(train.classes) ^ set(val.classes))[:5])
        if differing or len(train.classes) != len(val.classes) or val.tags is None:
            raise UsageError(f"{names[0]} and {names[1]} have different categories ({differing}); give both the same")
        order = [val.classes.index(name) for name in train.classes]
        val = replace(val, classes=train.classes, tags=np.ascontiguousarray(val.tags[:, order]))
    return _only_classes(spec, above, train, val)


def _only_classes(spec: str, above: set[str], *splits: Dataset) -> tuple[Dataset, Dataset]:
    """Both splits without categories that no image has and that are others' supercategories: rows of the table of
    categories that some exporters write beside the classes."""
    used = np.logical_or(*((split.tags != 0).any(0) for split in splits if split.tags is not None))
    kept = np.array([one or name not in above for name, one in zip(splits[0].classes, used, strict=True)])
    lost = [name for name, one in zip(splits[0].classes, kept, strict=True) if not one]
    if lost:
        say_once(f"{spec}: {len(lost)} supercategories that no image has are no classes: {', '.join(lost[:5])}")
        shown = tuple(name for name, one in zip(splits[0].classes, kept, strict=True) if one)
        splits = tuple(_with_columns(split, shown, kept) for split in splits)
    empty = int((~used[kept]).sum())
    if empty:
        say_once(f"{spec}: {empty} of {len(splits[0].classes)} categories are in no image; they are not judged by")
    return splits[0], splits[1]


def _with_columns(split: Dataset, classes: tuple[str, ...], kept: NDArray[np.bool_]) -> Dataset:
    assert split.tags is not None
    tags = np.ascontiguousarray(split.tags[:, kept])
    return replace(split, classes=classes, tags=tags, fingerprint=_digest(split, classes, tags))


def _instances(folder: Path, words: Sequence[str]) -> Path:
    for word in words:
        if found := sorted(folder.glob(f"instances_{word}*.json")):
            if len(found) > 1:
                raise UsageError(f"{folder} has {' and '.join(path.name for path in found)}; leave one of them there")
            return found[0]
    raise UsageError(f"{folder} has no {' or '.join(f'instances_{word}*.json' for word in words)}; put it there")


def _coco_split(spec: str, root: Path, path: Path) -> tuple[Dataset, set[str]]:
    """A split, and the names of its supercategories as keys are written."""
    try:
        content: Any = json.loads(_read(path))
        files = {foreign.key(image["id"]): foreign.key(image["file_name"]) for image in content["images"]}
        named = {foreign.key(kind["id"]): (kind["id"], foreign.key(kind["name"])) for kind in content["categories"]}
        above = {foreign.key(kind["supercategory"]) for kind in content["categories"] if kind.get("supercategory")}
        above -= {name for _, name in named.values()} & {
            foreign.key(kind["name"]) for kind in content["categories"] if kind.get("supercategory") == kind["name"]
        }
        present = {(foreign.key(mark["image_id"]), foreign.key(mark["category_id"])) for mark in content["annotations"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not an annotation file of COCO ({type(error).__name__}: {error})") from error
    if not files:
        raise UsageError(f"{path} lists no images; give a file that does")
    split = path.stem.removeprefix("instances_")
    places = [root, root / "images", root / split, root / "images" / split]
    first = next(iter(files.values()))
    place = next((place for place in places if (place / first).is_file()), None)
    if place is None:
        looked = ", ".join(str(place / first) for place in places)
        raise UsageError(f"{path}: its images do not exist (looked for {looked}); put them in one of these places")
    for part, ids in (("images", files), ("categories", named)):
        if len(ids) < len(content[part]):
            raise UsageError(f"{path}: an id occurs twice in its {part}; each must occur once")
    # Ids are names; where all are whole numbers they say the order.
    ordered = all(isinstance(one, int) for one, _ in named.values())
    columns = sorted(named, key=lambda one: named[one][0]) if ordered else list(named)
    row, column = ({key: number for number, key in enumerate(keys)} for keys in (files, columns))
    tags = np.zeros((len(row), len(column)), np.int8)
    for image, kind in present:
        if image not in row or kind not in column:
            raise UsageError(f"{path}: an annotation names image {image} or category {kind}, which it does not list")
        tags[row[image], column[kind]] = 1
    found = _with_tags(spec, place, split, list(files.values()), [named[key][1] for key in columns], tags)
    return found, set(escaped(list(above)))


def _csv(spec: str, root: Path) -> tuple[Dataset, Dataset] | None:
    paths = [_table(root, ("train",)), _table(root, VAL_NAMES)]
    if None in paths:
        lone = next((path for path in paths if path), None)
        if lone is None or (root / "train").is_dir() or any((root / f"train{end}").is_file() for end in PACKS):
            return None
        words = "train" if paths[0] is None else " or ".join(VAL_NAMES)
        raise UsageError(f"{root} has {lone.name}, but no {words} with the ending .csv or .tsv; put it beside that one")
    tables = [_labels_of(path) for path in paths if path]
    names = [path.stem for path in paths if path]
    several = any(len(labels) > 1 for table in tables for labels in table.values())
    if several:
        _tell_several(spec, tables)
    else:
        tables = [_without_unlabelled(path, table) for path, table in zip(filter(None, paths), tables, strict=True)]
    classes = class_names([label for labels in tables[0].values() for label in labels])
    unknown = {label for labels in tables[1].values() for label in labels} - set(classes)
    if unknown:
        raise UsageError(f"{paths[1]}: labels that {paths[0]} does not have: {', '.join(sorted(unknown)[:5])}")
    if len(classes) < 2:
        raise UsageError(f"{paths[0]}: fewer than two different labels; give a list with at least two")
    say_once(f"{spec}: {'several labels an image' if several else 'one label an image'}, of {' and '.join(names)}")
    train, val = (
        (_several if several else _one)(spec, root, name, table, classes)
        for name, table in zip(names, tables, strict=True)
    )
    return train, val


def _tell_several(spec: str, tables: Sequence[Mapping[str, list[str]]]) -> None:
    numbers = [len(labels) for table in tables for labels in table.values()]
    none = f", {numbers.count(0):,} have none" if 0 in numbers else ""
    say_once(
        f"{spec}: several labels an image: {sum(number > 1 for number in numbers):,} of {len(numbers):,} have more "
        f"than one{none}"
    )


def _without_unlabelled(path: Path, table: dict[str, list[str]]) -> dict[str, list[str]]:
    """The images with a label, of a table in which none has several."""
    known = {name: labels for name, labels in table.items() if labels}
    if len(known) < len(table):
        first = next(name for name, labels in table.items() if not labels)
        say_once(
            f"{path}: {len(table) - len(known):,} of {len(table):,} images, such as {first}, have no label and are "
            "left out; give them one of their own if that means something"
        )
    return known


def _table(root: Path, words: Iterable[str]) -> Path | None:
    found = find_named(root, names_in(root), [f"{word}{end}" for word in words for end in TABLES])
    return found if found is not None and found.is_file() else None


def _labels_of(path: Path) -> dict[str, list[str]]:
    """Image -> its labels, in the order of the file."""
    names, cells, _ = found_of(path, *read_list(path))
    if not names:
        raise UsageError(f"{path} lists no images; write a header path,label and one image a line")
    if not any(cells):
        raise UsageError(f"{path} has no label; write a column label (or class, or target)")
    found: dict[str, list[str]] = {}
    for name, cell in zip(names, cells, strict=True):
        labels = found.setdefault(name, [])
        labels += [label for part in _SEVERAL.split(cell) if (label := part.strip()) and label not in labels]
    return found


def _one(spec: str, root: Path, name: str, table: Mapping[str, list[str]], classes: Sequence[str]) -> Dataset:
    data = _files(spec, root, name, list(table), [labels[0] for labels in table.values()])
    number = {label: index for index, label in enumerate(classes)}
    targets = np.array([number[labels[0]] for labels in table.values()], np.int32)
    shown = tuple(escaped(classes))
    return replace(data, classes=shown, targets=targets, fingerprint=_digest(data, shown, targets))


def _several(spec: str, root: Path, name: str, table: Mapping[str, list[str]], classes: Sequence[str]) -> Dataset:
    tags = np.array([[kind in labels for kind in classes] for labels in table.values()], np.int8)
    return _with_tags(spec, root, name, list(table), classes, tags)


def _with_tags(
    spec: str, root: Path, name: str, names: Sequence[str], classes: Sequence[str], tags: NDArray[np.int8]
) -> Dataset:
    if not (tags == 1).any():
        raise UsageError(f"{spec}: no image of its split {name} has a label; there is nothing to evaluate by")
    data = _files(spec, root, name, names, [""] * len(names))
    shown = tuple(escaped(classes))
    return replace(data, classes=shown, tags=tags, fingerprint=_digest(data, shown, tags))


def _files(spec: str, root: Path, name: str, names: Sequence[str], labels: Sequence[str]) -> Dataset:
    sizes = [file_size(os.path.join(root, file)) for file in names]  # noqa: PTH118 -- Path objects cost more
    if max(sizes) < 0:
        raise UsageError(
            f"{spec}: none of the {len(names)} images of its split {name} exists, such as {root / names[0]}"
        )
    return of_files(spec, root, name, names, sizes, labels)


def _digest(data: Dataset, classes: Sequence[str], labels: NDArray[np.integer]) -> str:
    """The fingerprint of images and what they are labelled."""
    words = "\0".join((data.fingerprint, *classes)).encode()
    return hashlib.sha256(words + labels.astype("<i4").tobytes()).hexdigest()


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "not text"
        raise UsageError(f"{path}: {why}; it is needed for the labels") from error
