"""PASCAL VOC: a VOCdevkit with one year or several, boxes from its XML files, masks from SegmentationClass."""

import hashlib
import os
import re
import xml.etree.ElementTree as ElementTree  # see _tree  # nosec B405
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from ktransfer import files
from ktransfer.data import foreign
from ktransfer.data.dataset import UNKNOWN
from ktransfer.data.folders import ENDINGS, file_size
from ktransfer.detection import frames
from ktransfer.detection.data import Detection, Objects, add, objects_of, parted, summary
from ktransfer.detection.masks import read_map
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.images import decoding
from ktransfer.progress import say_once

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_DATED = re.compile(r"\d{4}_\d{6}")  # the names of images from 2008 on
_FLAGGED = re.compile(r"(.*\S)\s+(?:-1|0|1)")  # a line of the lists of one class
_DECLARED = re.compile(rb"\s*<\?xml[^>]*encoding\s*=\s*[\"']([\w.:-]+)[\"']")
_LARGEST_XML = 10_000_000  # bytes; no entity of a document is expanded beyond what it weighs


def years(root: Path) -> list[Path]:
    """The folders VOC2007, VOC2012, ... of a VOCdevkit, of the folder that holds it, or the folder itself."""
    for place in (root, root / "VOCdevkit"):
        if (place / "ImageSets" / "Main").is_dir():
            return [place]
        found = sorted(one for one in place.glob("VOC[0-9]*") if (one / "ImageSets" / "Main").is_dir())
        if found:
            return found
    return []


def open_splits(
    spec: str, folders: list[Path], lists: str = "Main", turned: bool = True
) -> tuple[Detection, Detection]:
    """Training and test split: `trainval` of all years against every `test` that has boxes, else `train` against `val`.

    Of `train` and `trainval` the one that is there, where the other is not. Without `test` and `val` a fifth of the
    images is the test split, and a line says so. An image is there once, whatever years list it, and in the test split
    if it is in both. How many were left out for that is said in a line.

    Args:
        lists: "Main" for all images, "Segmentation" for those with masks.
        turned: the boxes are for images as their EXIF turns them; else for images as they are stored.

    Raises:
        UsageError: a list or an XML file is missing or broken.
    """
    tested = [
        (year, names) for year in folders if (names := _listed(year, lists, "test")) and _xml(year, names[0]).is_file()
    ]
    evaluated = tested or [(year, names) for year in folders if (names := _listed(year, lists, "val"))]
    listed = {split: [(year, _listed(year, lists, split)) for year in folders] for split in ("trainval", "train")}
    learned = next(
        (split for split in (listed if tested else reversed(listed)) if any(names for _, names in listed[split])), ""
    )
    if not learned:
        raise UsageError(
            f"{spec}: {folders[0]}/ImageSets/{lists} lists no images for training; it needs trainval.txt and test.txt, "
            "train.txt and val.txt, or one of them alone"
        )
    masks, held = lists == "Segmentation", set[str]()
    evaluated = _once(spec, evaluated, held)
    train = _once(spec, listed[learned], held)
    if not any(names for _, names in train):
        raise UsageError(f"{spec}: all images of {learned}.txt are test images too; list others for training")
    found = read(spec, learned, train, masks, turned)
    if not evaluated:
        say_once(f"{spec}: no test.txt or val.txt: a fifth of {learned}.txt, drawn with seed 0, is the test split")
        return parted(found)
    return found, read(spec, "test" if tested else "val", evaluated, masks, turned)


def read(
    spec: str, split: str, listed: list[tuple[Path, list[str]]], masked: bool = False, turned: bool = True
) -> Detection:
    """The images of some lists, with the twenty classes, or those that are found where there are others.

    Coordinates of VOC count pixels from 1, both ends included: x0 and y0 are lowered by one. A width or height that is
    stated as 0 is taken from the image.

    Args:
        masked: the fingerprint covers the masks too.
        turned: as for `open_splits`.

    Raises:
        UsageError: an XML file is missing or broken.
    """
    rows = [(year, name) for year, names in listed for name in names]
    xmls = [_xml(year, name) for year, name in rows]
    trees = [_tree(path) for path in xmls]
    names = {_text(path, one, "name") for path, tree in zip(xmls, trees, strict=True) for one in tree.iter("object")}
    classes = CLASSES if names <= set(CLASSES) else tuple(sorted(names))
    places = _images(rows, trees)
    counts: dict[str, int] = {}
    sizes = [_size(path, tree, place, counts, turned) for path, tree, place in zip(xmls, trees, places, strict=True)]
    objects = tuple(
        _objects(path, tree, classes, size, counts) for path, tree, size in zip(xmls, trees, sizes, strict=True)
    )
    bytes_of = [file_size(str(place)) for place in places]
    missing = sum(size < 0 for size in bytes_of)
    add(counts, "images that do not exist", missing)
    if missing == len(places):
        raise UsageError(f"{spec}: none of its images exists, for example {places[0]}; unpack them")
    summary(f"{spec} {split}", counts)
    keys = tuple(f"{year.name}/{name}" for year, name in rows)
    frames.look(f"{spec} {split}", keys, places, sizes, turned)
    digest = hashlib.sha256(repr((keys, bytes_of, sizes, classes)).encode() + frames.mark(turned))
    for one in objects:
        for array in one[:5]:
            digest.update(np.ascontiguousarray(array).tobytes())
    masks = [year / "SegmentationClass" / f"{name}.png" for year, name in rows]
    for mask in masks if masked else []:
        digest.update(files.sha256(mask).encode() if mask.is_file() else b"missing")
    return Detection(
        spec=spec,
        name=f"voc-{split}",
        keys=keys,
        targets=np.full(len(keys), UNKNOWN, np.int32),
        classes=classes,
        fingerprint=digest.hexdigest(),
        read=lambda row, short_side: decoding.decode(places[row], short_side, turned),
        short_side=lambda row: min(sizes[row]),
        reader=lambda row: partial(decoding.decode, places[row], turned=turned),
        sizes=np.array(sizes, np.int32),
        objects=objects,
        ids=keys,
        category_ids=tuple(range(1, len(classes) + 1)),
        label_map=lambda row: read_map(masks[row]),
        counts=counts,
    )


def _once(spec: str, listed: list[tuple[Path, list[str]]], held: set[str]) -> list[tuple[Path, list[str]]]:
    """The lists without the images that are `held`, to which the others are added.

    VOC2012 lists images of other years under names of their own: 2007_000032 is 000032 of VOC2007.
    """
    found: list[tuple[Path, list[str]]] = []
    dropped = 0
    for year, names in listed:
        own = {name: name if _DATED.fullmatch(name) else f"{year.name.removeprefix('VOC')}_{name}" for name in names}
        found.append((year, [name for name in names if own[name] not in held]))
        dropped += len(names) - len(found[-1][1])
        held.update(own.values())
    if dropped:
        say_once(f"{spec}: {dropped:,} images left out that the test split or another year lists too")
    return found


def _listed(year: Path, lists: str, split: str) -> list[str]:
    """The names in a list: below `Annotations`, without ending; those of one class have -1, 0 or 1 behind them."""
    path = year / "ImageSets" / lists / f"{split}.txt"
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); write one name a line, in UTF-8") from error
    names = [_name(path, year, line.strip()) for line in lines if line.strip()]
    if len(set(names)) < len(names):
        raise UsageError(f"{path}: lists an image twice; list each once")
    return names


def _name(path: Path, year: Path, line: str) -> str:
    parts = PurePosixPath(line).parts
    if line.startswith("/") or "\\" in line or "\0" in line or any(part.startswith(".") for part in parts):
        raise UsageError(f"{path}: {line!r} leads out of the folder; names must be relative and stay inside")
    line = str(PurePosixPath(line))
    flagged = _FLAGGED.fullmatch(line)
    if flagged and not _xml(year, line).is_file():
        line = flagged[1]
    stem, ending = os.path.splitext(line)  # noqa: PTH122 -- of a name with folders
    return stem if ending.lower() in (*ENDINGS, ".xml") and not _xml(year, line).is_file() else line


def _xml(year: Path, name: str) -> Path:
    return year / "Annotations" / f"{name}.xml"


def _images(rows: list[tuple[Path, str]], trees: list[ElementTree.Element]) -> list[Path]:
    """Where the images lie: NAME.jpg, else NAME with another ending, else what the annotation names."""
    held: dict[Path, dict[str, str]] = {}
    found: list[Path] = []
    for (year, name), tree in zip(rows, trees, strict=True):
        usual = year / "JPEGImages" / f"{name}.jpg"
        if usual.parent not in held:
            held[usual.parent] = _by_stem(usual.parent)
        there = held[usual.parent]
        named = PurePosixPath((tree.findtext("filename") or "").strip().replace("\\", "/")).name
        other = there.get(usual.name.removesuffix(".jpg")) or (named if named in there.values() else None)
        found.append(usual.with_name(other) if other else usual)
    return found


def _by_stem(folder: Path) -> dict[str, str]:
    """Name without ending -> the image of that name; of several the one that ends in .jpg."""
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder) if folder.is_dir() else []):  # noqa: PTH208 -- names alone
        stem, ending = os.path.splitext(name)  # noqa: PTH122
        if ending == ".jpg" or (ending.lower() in ENDINGS and stem not in found):
            found[stem] = name
    return found


def _tree(path: Path) -> ElementTree.Element:
    try:
        if path.stat().st_size > _LARGEST_XML:
            raise UsageError(
                f"{path}: over {_LARGEST_XML:,} bytes; annotations of VOC are smaller; unpack the archive again"
            )
        text = _decoded(path.read_bytes())
        if "<!DOCTYPE" in text:
            raise UsageError(
                f"{path}: declares XML entities, which annotations of VOC do not have; unpack the archive again"
            )
        return ElementTree.fromstring(text)  # of limited size, without entities  # nosec B314
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); every listed image needs its annotation") from error


def _decoded(content: bytes) -> str:
    """The text of an XML file in the encoding that it declares, which Python knows more of than its parser does."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    declared = _DECLARED.match(content)
    name = declared[1].decode("ascii") if declared else "utf-8"
    return content.decode("utf-8-sig" if name.lower() in ("utf-8", "utf8") else name)


def _text(path: Path, element: ElementTree.Element, name: str) -> str:
    found = element.findtext(name)
    if not found or not found.strip():
        raise UsageError(f"{path}: its {element.tag} lacks {name}; correct it")
    return found.strip()


def _number(path: Path, element: ElementTree.Element, name: str) -> float:
    try:
        return foreign.number(_text(path, element, name))
    except ValueError as error:
        raise UsageError(f"{path}: the {name} of its {element.tag} is not a number ({error}); correct it") from error


def _size(path: Path, tree: ElementTree.Element, place: Path, counts: dict[str, int], turned: bool) -> tuple[int, int]:
    """Width and height as they are stated, or those of the image where one of them is stated as 0."""
    width, height = (_number(path, tree, f"size/{side}") for side in ("width", "height"))
    if min(width, height) < 0 or max(width, height) >= 2**31 or width % 1 or height % 1:
        raise UsageError(f"{path}: {width:g} x {height:g} pixels is no size of an image; correct it")
    if width and height:
        return int(width), int(height)
    try:
        found = frames.sides(place, turned)
    except BrokenImage as error:
        raise UsageError(
            f"{path}: states {width:g} x {height:g} pixels, and its image cannot be read ({error}); correct it"
        ) from error
    add(counts, "sizes of 0, taken from the images", 1)
    return found


def _objects(
    path: Path, tree: ElementTree.Element, classes: tuple[str, ...], size: tuple[int, int], counts: dict[str, int]
) -> Objects:
    found = list(tree.iter("object"))
    corners = [[_number(path, one, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")] for one in found]
    try:
        difficult = [foreign.flag(one.findtext("difficult")) for one in found]
    except ValueError as error:
        raise UsageError(f"{path}: the difficult of its object: {error}; correct it") from error
    return objects_of(
        [(x0 - 1, y0 - 1, x1, y1) for x0, y0, x1, y1 in corners],
        [classes.index(_text(path, one, "name")) for one in found],
        size,
        counts,
        difficult=difficult,
    )
