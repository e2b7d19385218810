"""Images with boxes: COCO files, VOCdevkit and `scenes:` as one record."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import files, rng
from ktransfer.data import foreign
from ktransfer.data.dataset import UNKNOWN, Dataset
from ktransfer.errors import UsageError, refuse_machine
from ktransfer.progress import say_once

SPLIT = 0.2  # of the images of data that has one part
Outline = list[list[float]] | dict[str, Any] | None
"""Flat polygons x, y, x, y, ... in pixels; COCO's run lengths {"size": [h, w], "counts": ...}; None: not known."""


class Objects(NamedTuple):
    """What is in one image, m objects in the order of the file.

    Attributes:
        boxes: (m, 4) float32, x0 y0 x1 y1 in pixels of the image, 0 its left or upper edge; inside it, never empty.
        labels: (m,) int64, indices into `classes`.
        crowd: (m,) bool, a box around many (COCO): not learned, not counted as missed.
        difficult: (m,) bool (VOC): learned, not counted as missed.
        areas: (m,) float32 pixels: the file's own, else those of the boxes.
        outlines: m of them.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    areas: NDArray[np.float32]
    outlines: tuple[Outline, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Detection(Dataset):
    """A `Dataset` whose images have objects; row i is the same image in all of its fields.

    `sizes` is (n, 2) int32, width and height as the file states them; `objects` n; `ids` those of the images and
    `category_ids` those of `classes` in the file, names with which nothing is computed; `label_map(row)` reads the
    class of every pixel where the data has such images (see masks.py); `counts` says what was found on reading, in
    words for people. `targets` are unknown.
    """

    sizes: NDArray[np.int32]
    objects: tuple[Objects, ...]
    ids: tuple[int | float | str, ...]
    category_ids: tuple[int | float | str, ...]
    label_map: Callable[[int], NDArray[np.uint8]] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


def subset(data: Detection, rows: NDArray[np.int64]) -> Detection:
    """The images of (m,) `rows` in that order, with a fingerprint of their own."""
    places = rows.tolist()
    digest = hashlib.sha256(f"{data.fingerprint} {places}".encode()).hexdigest()
    return replace(
        data,
        keys=tuple(data.keys[row] for row in places),
        targets=data.targets[rows],
        fingerprint=digest,
        read=lambda row, short_side: data.read(places[row], short_side),
        short_side=None if data.short_side is None else lambda row: data.short_side(places[row]),  # type: ignore[misc]
        reader=None if data.reader is None else lambda row: data.reader(places[row]),  # type: ignore[misc]
        sizes=data.sizes[rows],
        objects=tuple(data.objects[row] for row in places),
        ids=tuple(data.ids[row] for row in places),
        label_map=None if data.label_map is None else lambda row: data.label_map(places[row]),  # type: ignore[misc]
    )


def fraction(data: Detection, share: float, seed: int, stratified: bool = False) -> NDArray[np.int64]:
    """Rows of a share of the images, in row order: round(share * n) of them, at least 1, none twice.

    The smaller of two shares is part of the larger one (with the same seed). `stratified` keeps the mix of classes:
    images are put in order by their rarest class, at random within it, and taken at even steps.

    Args:
        share: 0 < share <= 1.
    """
    count = max(1, round(share * len(data)))
    order = rng.words(seed, "detection/fraction", 0, torch.arange(len(data)), 1)[:, 0].argsort(stable=True).numpy()
    if stratified:
        order = _spread(data, order)
    return np.sort(order[:count])


def parted(whole: Detection) -> tuple[Detection, Detection]:
    """The training and the test split of data that has one part; the test split is a fifth of it, drawn with seed 0."""
    test = fraction(whole, SPLIT, 0)
    return subset(whole, np.setdiff1d(np.arange(len(whole)), test)), subset(whole, test)


def with_classes(data: Detection, classes: tuple[str, ...], category_ids: tuple[int | float | str, ...]) -> Detection:
    """The same images with their classes in another order, or beside others; each class is known by its name.

    Classes of the data that are not among `classes` have no box.
    """
    number = {name: place for place, name in enumerate(classes)}
    moved = np.array([number.get(name, UNKNOWN) for name in data.classes], np.int64)
    objects = tuple(one._replace(labels=moved[one.labels]) for one in data.objects)
    return replace(data, classes=classes, category_ids=category_ids, objects=objects)


def save_ids(path: Path, data: Detection, rows: NDArray[np.int64]) -> None:
    """Write the ids of the images of `rows` as a JSON list."""
    files.write_json(path, [data.ids[row] for row in rows.tolist()])


def load_ids(path: Path, data: Detection) -> NDArray[np.int64]:
    """The rows of a list that `save_ids` or another program wrote.

    Raises:
        UsageError: no JSON list, an id twice, or one that the data does not have.
    """
    try:
        listed = files.read_json(path)
    except (OSError, ValueError) as error:
        refuse_machine(path, error)
        raise UsageError(f"{path}: not a JSON list of image ids ({error})") from error
    known = {foreign.key(one): row for row, one in enumerate(data.ids)}
    try:
        keys = [foreign.key(one) for one in listed] if isinstance(listed, list) else []
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON list of image ids ({error}); write it like [17, 42]") from error
    if not keys:
        raise UsageError(f"{path}: not a JSON list of image ids; write it like [17, 42]")
    unknown = [one for one in keys if one not in known]
    if unknown or len(set(keys)) < len(keys):
        which = f"{unknown[0]} is not an image of {data.spec}" if unknown else "it lists an image twice"
        raise UsageError(f"{path}: {which}; list ids of that data, each once")
    return np.array([known[one] for one in keys], np.int64)


def objects_of(
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    size: tuple[int, int],
    counts: dict[str, int],
    crowd: Sequence[bool] | None = None,
    difficult: Sequence[bool] | None = None,
    areas: Sequence[float | None] | None = None,
    outlines: Sequence[Outline] = (),
) -> Objects:
    """The objects of an image of `size` (width, height); what is clipped or dropped is added to `counts`.

    Args:
        boxes: m of x0, y0, x1, y1 in pixels; those that reach over the edge are clipped, and those that then have no
            width or height, or are not finite, dropped.
    """
    count = len(boxes)
    given = np.asarray(boxes, np.float64).reshape(count, 4)
    finite = np.isfinite(given).all(axis=1)
    whole = finite & (given[:, 2:] > given[:, :2]).all(axis=1)
    clipped = given.clip(0, [*size, *size])
    kept = whole & (clipped[:, 2:].astype(np.float32) > clipped[:, :2].astype(np.float32)).all(axis=1)
    add(counts, "boxes", int(kept.sum()))
    add(counts, "boxes without width or height, dropped", int((~whole).sum()))
    add(counts, "boxes wholly outside of their image, dropped", int((whole & ~kept).sum()))
    # COCO rounds to hundredths: less than that over the edge is no finding.
    over = (np.abs(clipped - given) > 0.011).any(axis=1) & kept
    add(counts, "boxes over the edge of their image, clipped", int(over.sum()))
    inside = (clipped[:, 2] - clipped[:, 0]) * (clipped[:, 3] - clipped[:, 1])
    own = [box if area is None else area for box, area in zip(inside, areas or [None] * count, strict=True)]
    found = Objects(
        boxes=clipped[kept].astype(np.float32),
        labels=np.asarray(labels, np.int64)[kept],
        crowd=np.asarray(crowd or [False] * count, np.bool_)[kept],
        difficult=np.asarray(difficult or [False] * count, np.bool_)[kept],
        areas=np.asarray(own, np.float32)[kept],
        outlines=tuple(outlines[place] if outlines else None for place in np.flatnonzero(kept).tolist()),
    )
    add(counts, "crowd boxes", int(found.crowd.sum()))
    add(counts, "difficult boxes", int(found.difficult.sum()))
    add(counts, "images", 1)
    add(counts, "images without a box", int(not kept.any()))
    return found


def summary(path: Path | str, counts: Mapping[str, int]) -> None:
    """Say once what was found on reading."""
    say_once(f"{path}: {', '.join(f'{number:,} {words}' for words, number in counts.items())}")


def add(counts: dict[str, int], words: str, number: int) -> None:
    """Count what was found on reading; nothing is not mentioned."""
    if number:
        counts[words] = counts.get(words, 0) + number


def _spread(data: Detection, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) `order` such that every beginning of it has about the mix of classes of the whole."""
    times = np.bincount(np.concatenate([one.labels for one in data.objects]), minlength=len(data.classes))
    rarest = np.array([min(one.labels, key=lambda label: times[label], default=UNKNOWN) for one in data.objects])
    place = np.empty(len(data))
    for group in np.unique(rarest):
        members = order[rarest[order] == group]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(place[order], kind="stable")]


def boxes_of(data: Detection, crowd: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Boxes (m, 4) float32 and labels (m,) int64 of each image as tensors, without the crowd boxes unless asked."""
    chosen = [slice(None) if crowd else ~one.crowd for one in data.objects]
    return [
        (torch.from_numpy(one.boxes[keep]), torch.from_numpy(one.labels[keep]))
        for one, keep in zip(data.objects, chosen, strict=True)
    ]
