"""PASCAL VOC: a VOCdevkit with one year or several, boxes from its XML files, masks from SegmentationClass."""

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import numpy as np

from ktransfer import files
from ktransfer.data import decoding
from ktransfer.data.dataset import UNKNOWN
from ktransfer.data.folders import file_size
from ktransfer.detection.data import Detection, Objects, objects_of, summary
from ktransfer.detection.masks import read_map
from ktransfer.errors import UsageError
from ktransfer.progress import say_once

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_DATED = re.compile(r"\d{4}_\d{6}")  # the names of images from 2008 on
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


def open_splits(spec: str, folders: list[Path], lists: str = "Main") -> tuple[Detection, Detection]:
    """Training and test split: `trainval` of all years against every `test` that has boxes, else `train` against `val`.

    An image is there once, whatever years list it, and in the test split if it is in both. How many were left out for
    that is said in a line.

    Args:
        lists: "Main" for all images, "Segmentation" for those with masks.

    Raises:
        UsageError: a list or an XML file is missing or broken.
    """
    tested = [
        (year, names) for year in folders if (names := _listed(year, lists, "test")) and _xml(year, names[0]).is_file()
    ]
    learned, evaluated = (
        ("trainval", tested) if tested else ("train", [(year, _listed(year, lists, "val")) for year in folders])
    )
    held = set[str]()
    evaluated = _once(spec, evaluated, held)
    train = _once(spec, [(year, _listed(year, lists, learned)) for year in folders], held)
    if not any(names for _, names in train) or not any(names for _, names in evaluated):
        raise UsageError(
            f"{spec}: {folders[0]}/ImageSets/{lists} lists no images for training or none for testing; it needs "
            "trainval.txt and test.txt, or train.txt and val.txt"
        )
    masks = lists == "Segmentation"
    return read(spec, learned, train, masks), read(spec, "test" if tested else "val", evaluated, masks)


def read(spec: str, split: str, listed: list[tuple[Path, list[str]]], masked: bool = False) -> Detection:
    """The images of some lists, with the twenty classes, or those that are found where there are others.

    Coordinates of VOC count pixels from 1, both ends included: x0 and y0 are lowered by one.

    Args:
        masked: the fingerprint covers the masks too.

    Raises:
        UsageError: an XML file is missing or broken.
    """
    rows = [(year, name) for year, names in listed for name in names]
    trees = [_tree(_xml(year, name)) for year, name in rows]
    names = {_text(one, "name") for tree in trees for one in tree.iter("object")}
    classes = CLASSES if names <= set(CLASSES) else tuple(sorted(names))
    sizes = [(int(_text(tree, "size/width")), int(_text(tree, "size/height"))) for tree in trees]
    counts: dict[str, int] = {}
    objects = tuple(_objects(tree, classes, size, counts) for tree, size in zip(trees, sizes, strict=True))
    places = [year / "JPEGImages" / f"{name}.jpg" for year, name in rows]
    bytes_of = [file_size(str(place)) for place in places]
    if missing := sum(size < 0 for size in bytes_of):
        counts["images that do not exist"] = missing
    if missing == len(places):
        raise UsageError(f"{spec}: none of its images exists, for example {places[0]}; unpack them")
    summary(f"{spec} {split}", counts)
    keys = tuple(f"{year.name}/{name}" for year, name in rows)
    digest = hashlib.sha256(repr((keys, bytes_of, sizes, classes)).encode())
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
        read=lambda row, short_side: decoding.decode(places[row], short_side),
        short_side=lambda row: min(sizes[row]),
        reader=lambda row: partial(decoding.decode, places[row]),
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
    path = year / "ImageSets" / lists / f"{split}.txt"
    names = (
        [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.is_file()
        else []
    )
    wrong = next((name for name in names if "/" in name or "\\" in name or name.startswith(".")), None)
    if wrong is not None:
        raise UsageError(f"{path}: {wrong!r} leads out of the folder; the names in a list of VOC have no folders")
    if len(set(names)) < len(names):
        raise UsageError(f"{path}: lists an image twice; list each once")
    return names


def _xml(year: Path, name: str) -> Path:
    return year / "Annotations" / f"{name}.xml"


def _tree(path: Path) -> ElementTree.Element:
    try:
        if path.stat().st_size > _LARGEST_XML:
            raise UsageError(
                f"{path}: over {_LARGEST_XML:,} bytes; annotations of VOC are smaller; unpack the archive again"
            )
        text = path.read_text(encoding="utf-8")
        if "<!DOCTYPE" in text:
            raise UsageError(
                f"{path}: declares XML entities, which annotations of VOC do not have; unpack the archive again"
            )
        return ElementTree.fromstring(text)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); every listed image needs its annotation") from error


def _text(element: ElementTree.Element, name: str) -> str:
    found = element.findtext(name)
    if not found or not found.strip():
        raise UsageError(
            f"an annotation of VOC ({element.findtext('filename') or element.tag}) lacks {name}; correct it"
        )
    return found.strip()


def _objects(
    tree: ElementTree.Element, classes: tuple[str, ...], size: tuple[int, int], counts: dict[str, int]
) -> Objects:
    found = list(tree.iter("object"))
    try:
        corners = [[float(_text(one, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")] for one in found]
    except ValueError as error:
        raise UsageError(
            f"{tree.findtext('filename')}: a box has a value that is not a number ({error}); correct its annotation"
        ) from error
    return objects_of(
        [(x0 - 1, y0 - 1, x1, y1) for x0, y0, x1, y1 in corners],
        [classes.index(_text(one, "name")) for one in found],
        size,
        counts,
        difficult=[(one.findtext("difficult") or "0").strip() == "1" for one in found],
    )
