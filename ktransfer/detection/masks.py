"""Masks: outlines as pixels, the class of every pixel of an image, and these on canvases.

In a map of classes 0 is background, class i of the data i + 1, and 255 is ignored.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ktransfer import files
from ktransfer.data.loader import available_bytes
from ktransfer.detection import canvas, geometry
from ktransfer.detection.data import Detection, Objects, Outline
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.images import decoding
from ktransfer.progress import track

IGNORE = 255
_SAMPLES = 8  # each way in a pixel: Pillow fills what a polygon touches, a pixel shall be what it mostly covers
_BAND = 2**25  # samples drawn at once: those of a photo's largest object would take a gigabyte


def filled(outline: Outline, size: tuple[int, int], scale: float = 1.0) -> NDArray[np.bool_]:
    """(height, width) bool: the pixels of which an outline covers at least half.

    Args:
        outline: polygons (even-odd each, together their union) or COCO's run lengths.
        size: width and height of the result.
        scale: the outline is enlarged by this before.
    """
    width, height = size
    if isinstance(outline, dict):
        mask = Image.fromarray(decoded(outline))
        return np.asarray(mask.resize(size, Image.Resampling.NEAREST), np.bool_)
    found = np.zeros((height, width), np.bool_)
    polygons = [np.reshape(polygon, (-1, 2)) * scale for polygon in outline or []]
    if not polygons:
        return found
    points = np.concatenate(polygons)
    left, top = np.floor(points.min(0)).clip(0, size).astype(int).tolist()
    right, bottom = np.ceil(points.max(0)).clip(0, size).astype(int).tolist()
    if right > left and bottom > top:
        corners = [np.floor((polygon - (left, top)) * _SAMPLES) for polygon in polygons]
        high = max(1, _BAND // (_SAMPLES**2 * (right - left)))
        for upper in range(top, bottom, high):
            lower = min(upper + high, bottom)
            fine = Image.new("L", ((right - left) * _SAMPLES, (lower - upper) * _SAMPLES))
            draw = ImageDraw.Draw(fine)
            for one in corners:
                draw.polygon((one - (0, (upper - top) * _SAMPLES)).ravel().tolist(), fill=255)
            found[upper:lower, left:right] = np.asarray(fine.reduce(_SAMPLES)) >= 128
    return found


def decoded(lengths: dict[str, Any]) -> NDArray[np.bool_]:
    """(height, width) bool of COCO's run lengths, by columns, plain or packed into characters.

    Raises:
        ValueError: they do not fill the image.
    """
    height, width = lengths["size"]
    counts = lengths["counts"]
    runs = _unpacked(counts) if isinstance(counts, str | bytes) else [int(count) for count in counts]
    if sum(runs) != height * width or min(runs) < 0:
        raise ValueError(f"run lengths of {sum(runs)} pixels for {height} x {width}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.asarray(flat.reshape(width, height).T)


def encoded(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run lengths of a (height, width) mask, packed into characters; `decoded` is the way back."""
    flat = np.concatenate([[False], mask.T.ravel(), [True]])
    runs = np.diff(np.concatenate([[0], np.flatnonzero(flat[1:-1] != flat[:-2]), [mask.size]])).tolist()
    return {"size": [int(side) for side in mask.shape], "counts": _packed(runs)}


def classes_of_pixels(data: Detection, row: int) -> NDArray[np.uint8]:
    """(height, width) uint8 map of an image, from its own file or from its outlines, smaller objects on top.

    Crowds are ignored, and so is the box of an object without outline.

    Raises:
        BrokenImage: its file cannot be read, or has another size.
    """
    width, height = (int(side) for side in data.sizes[row])
    if data.label_map is not None:
        found = data.label_map(row)
        if found.shape != (height, width):
            raise BrokenImage(f"its map of classes is {found.shape[1]} x {found.shape[0]}, not {width} x {height}")
        return found
    return drawn(data.objects[row], (width, height))


def drawn(objects: Objects, size: tuple[int, int]) -> NDArray[np.uint8]:
    """(height, width) uint8 map of some objects."""
    found = np.zeros((size[1], size[0]), np.uint8)
    for place in np.argsort(-objects.areas, kind="stable").tolist():
        left, top, right, bottom = objects.boxes[place]
        window = np.s_[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
        outline = objects.outlines[place]
        try:
            inside = filled(outline, size)
        except (TypeError, ValueError) as error:
            raise BrokenImage(f"an outline of it is broken: {error}") from error
        if outline is None:
            inside[window] = True
        found[inside] = IGNORE if objects.crowd[place] or outline is None else objects.labels[place] + 1
    return found


def map_canvases(data: Detection, size: int) -> tuple[Tensor, dict[int, str]]:
    """The maps of all images, laid out as their canvases are, padding ignored.

    Returns:
        (n, size, size) uint8, and row and reason of the maps that are broken: these are ignored wholly.
    """
    broken: dict[int, str] = {}
    found = torch.full((len(data), size, size), IGNORE, dtype=torch.uint8)
    for row in track(range(len(data)), len(data), f"read masks of {data.name}"):
        width, height = (int(side) for side in canvas.extent((int(data.sizes[row, 0]), int(data.sizes[row, 1])), size))
        try:
            whole = Image.fromarray(classes_of_pixels(data, row))
        except BrokenImage as error:
            broken[row] = str(error)
            continue
        small = np.array(whole.resize((width, height), Image.Resampling.NEAREST))
        found[row, :height, :width] = torch.from_numpy(small)
    return found, broken


def read_map(path: Path) -> NDArray[np.uint8]:
    """(height, width) uint8 of a palette PNG: 0 background, classes from 1, 255 ignored.

    Raises:
        BrokenImage: it cannot be read, or has no palette.
    """
    try:
        return decoding.of_file(path, _numbers)
    except BrokenImage as error:
        raise BrokenImage(f"{path.name}: {error}") from error


def _numbers(image: Image.Image, _: object) -> NDArray[np.uint8]:
    if image.format != "PNG" or image.mode != "P":
        raise BrokenImage("no palette image of classes")
    return np.asarray(image)


def save_map(path: Path, found: NDArray[np.uint8]) -> None:
    """Write a (height, width) map as a PNG of VOC's kind: numbers of classes behind a palette."""
    image = Image.fromarray(found)
    image.putpalette(colours().ravel().tolist())  # which makes it an image of numbers
    files.write_whole(path, lambda part: image.save(part, format="PNG"))


def colours() -> NDArray[np.uint8]:
    """(256, 3) uint8, the colours of VOC's masks: a number's bits in turns to red, green, blue, the low ones first."""
    numbers = np.arange(256)
    found = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        found[:, bit % 3] |= (numbers >> bit & 1).astype(np.uint8) << (7 - bit // 3)
    return found


def moved(maps: Tensor, moves: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Maps that follow their images; padding, and what comes from beyond the image, is ignored.

    Args:
        maps: (b, s, s) uint8. moves: (b, 2, 3) of `strengths.augment`.
        before, after: (b, 2), width and height of the images on their canvases.

    Returns:
        (b, s, s) uint8.
    """
    found = geometry.move_pixels(maps[:, None], moves, before, "nearest", IGNORE)
    return torch.where(canvas.inside(after, maps.shape[-1]), found, IGNORE)[:, 0]


def need_memory(flag: str, images: int, size: int) -> None:
    """Raise UsageError where the maps of so many canvases do not fit into half of the free memory.

    Args:
        flag: what makes them so large, such as "--canvas 320".
    """
    needed, free = images * size**2, available_bytes()
    if needed > free // 2:
        raise UsageError(
            f"{flag}: the masks of {images:,} images take {needed / 1e9:.1f} GB of memory, of which "
            f"{free / 1e9:.1f} GB are free; give a smaller size"
        )


def need_masks(data: Detection) -> None:
    """Raise UsageError where the data has neither maps nor outlines, or more classes than a map has numbers."""
    if len(data.classes) >= IGNORE:
        raise UsageError(f"{data.spec}: {len(data.classes)} categories; a map of classes holds at most {IGNORE - 1}")
    outlines = (outline for one in data.objects for outline in one.outlines)
    if data.label_map is None and not any(outline is not None for outline in outlines):
        raise UsageError(f"{data.spec}: its objects have only boxes; segment needs outlines or maps of classes")


def _packed(runs: list[int]) -> str:
    """The characters that `_unpacked` reads."""
    codes: list[int] = []
    for place, run in enumerate(runs):
        value, more = run - (runs[place - 2] if place > 2 else 0), True
        while more:
            code, value = value & 0x1F, value >> 5
            more = value != (-1 if code & 0x10 else 0)
            codes.append(code + 0x20 * more + 48)
    return bytes(codes).decode()


def _unpacked(packed: str | bytes) -> list[int]:
    """Run lengths from COCO's characters: 5 bits each, low ones first, one for more; from the 4th on differences."""
    codes = packed.encode() if isinstance(packed, str) else packed
    runs: list[int] = []
    place = 0
    while place < len(codes):
        value, shift, more = 0, 0, True
        while more:
            if place == len(codes):
                raise ValueError("packed run lengths end within a number")
            code = codes[place] - 48
            value |= (code & 0x1F) << shift
            more, place, shift = bool(code & 0x20), place + 1, shift + 5
            if not more and code & 0x10:
                value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
