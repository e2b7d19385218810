"""Self-training of segmenters (`--task segment`), see `tasks.Task`: labels are masks, the class of every pixel.

After Zoph et al. (docs/papers.md). Pseudo-masks are palette PNGs with the numbers of VOC's, in a folder
beside the JSON file that lists them:

    {"info": {...}, "classes": ["cow", ...],
     "images": [{"file_name": "1.jpg", "width": 640, "height": 480, "mask": "pseudo/0000000.png", "sha256": "..."}]}

`mask` is relative to the JSON file and leads to nothing outside of its folder. In a mask 0 is background, i the i-th
of `classes`, 255 is ignored. Of files of others `classes`, `file_name` and `mask` are read, and a `sha256`.
"""

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktransfer import files
from ktransfer.data.dataset import check_broken
from ktransfer.data.loader import ImageLoader
from ktransfer.detection import canvas, detectors, masks, segmentation
from ktransfer.detection.data import Detection
from ktransfer.detection.frames import OBEY
from ktransfer.detection.masks import IGNORE
from ktransfer.detection.opening import open_detection
from ktransfer.detection.sheet import draw_augmented
from ktransfer.detection.strengths import augment, boxless
from ktransfer.errors import BrokenImage, StageError, UsageError, refuse_machine
from ktransfer.number_list import number_list
from ktransfer.progress import bar, track
from ktransfer.training.batch import Batch, Loss

from ..config import SelftrainConfig
from . import boxes
from .parts import Shown
from .student import Student, Weighing, weighed

NECKS = segmentation.HEADS
THINGS = "pixel of a class", "pixels"
EVALUATED: tuple[str, ...] = ()
AT_ONCE = 4  # images that the teacher looks at together: at 1.75 times their size they are large


class Known(NamedTuple):
    """Masks on canvases: `maps` (n, size, size) uint8 on the CPU, `extents` (n, 2) float32 on the device."""

    maps: Tensor
    extents: Tensor


def kind(config: SelftrainConfig) -> str:
    """The head."""
    return config.head


def check(config: SelftrainConfig, labelled: int, other: int) -> None:
    """Find settings that masks do not have, and masks that do not fit into memory.

    Raises:
        UsageError: one line.
    """
    scales(config)
    if config.adaptive:
        raise UsageError("--adaptive: counts boxes, which --task segment does not have; leave it out")
    if config.head == "deeplab" and config.norm == "bn" and min(labelled, other) < 2:
        raise UsageError("--head deeplab: batch norm needs two images, and there is one; give --norm gn")
    masks.need_memory(f"--size {config.size}", labelled + other, config.size)


def scales(config: SelftrainConfig) -> list[float]:
    """The numbers of `--scales`.

    Raises:
        UsageError: they are none, or not from 0.25 to 4.
    """
    return number_list("--scales", config.scales, 0.25, 4, "0.5,1,1.5")


def open_data(spec: str, exif: str = OBEY) -> tuple[Detection, Detection]:
    """Training and test split with masks."""
    parts = open_detection(spec, masks=True, exif=exif)
    for part in parts:
        masks.need_masks(part)
    return parts


def read(
    path: Path, other: Detection, labelled: Detection, config: SelftrainConfig
) -> tuple[Detection, NDArray[np.int64]]:
    """`other` with the masks that a file lists; images are found by their name, classes by theirs.

    Raises:
        UsageError: no such file, or images, classes or masks that are not there or lie outside of its folder.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig"))
        listed = {str(one["file_name"]): (str(one["mask"]), one.get("sha256")) for one in held["images"]}
        names = [str(name) for name in held["classes"]]
    except (OSError, ValueError, RecursionError) as error:
        refuse_machine(path, error)
        raise UsageError(f"{path}: cannot be read as JSON ({error}); give a list of masks") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: lacks {error}; a list of masks has classes, and images with file_name, mask"
        ) from error
    place = {key: row for row, key in enumerate(other.keys)}
    for what, known_names, wanted in (("images", listed, place), ("classes", names, other.classes)):
        strange = [name for name in known_names if name not in wanted]
        if strange:
            raise UsageError(
                f"{path}: {len(strange)} of its {what} are not those of {other.spec}, such as {strange[0]}; give the "
                "file that was made for these images"
            )
    if len(set(names)) < len(names):
        raise UsageError(f"{path}: names a class twice; name each once")
    root = path.parent.resolve()
    for name, _ in listed.values():
        try:
            within = not PurePosixPath(name).is_absolute() and (root / name).resolve().is_relative_to(root)
            there = within and (root / name).is_file()
        except (OSError, ValueError) as error:  # too long, or with characters that no name has
            raise UsageError(f"{path}: its mask {name[:40]!r} is not a file name ({error}); correct it") from error
        if not within:
            raise UsageError(f"{path}: its mask {name} lies outside of its folder; put masks beside it or below")
        if not there:
            raise UsageError(f"{path}: its mask {name} is missing; make it again")
    numbers = np.full(256, -1)
    numbers[0], numbers[IGNORE] = 0, IGNORE
    numbers[1 : len(names) + 1] = [other.classes.index(name) + 1 for name in names]

    def label_map(row: int) -> NDArray[np.uint8]:
        name, digest = listed[other.keys[row]]
        if tuple(other.sizes[row].tolist()) == boxes.UNREADABLE:  # the image itself is broken, and counted as that
            return np.full((1, 1), IGNORE, np.uint8)
        try:
            found = masks.read_map(root / name)
        except BrokenImage as error:
            raise StageError(f"{path}: {error}; make this mask again") from error
        size = int(other.sizes[row, 0]), int(other.sizes[row, 1])
        if digest is not None and files.sha256(root / name) != digest:
            raise StageError(f"{path}: its mask {name} was changed afterwards; make it again with --overwrite")
        if found.shape != size[::-1] or (numbers[found] < 0).any():
            raise StageError(
                f"{path}: its mask {name} must have {size[0]} x {size[1]} pixels and the numbers of {len(names)} "
                "classes; make it again"
            )
        return np.asarray(numbers[found], np.uint8)

    return replace(other, label_map=label_map), np.array(sorted(place[key] for key in listed), np.int64)


def count(data: Detection, row: int) -> NDArray[np.int64]:
    """(classes,) pixels of each class in an image, background left out; none where its own mask is broken."""
    try:
        found = masks.classes_of_pixels(data, row)
    except BrokenImage:
        return np.zeros(len(data.classes), np.int64)
    return np.bincount(found.ravel(), minlength=256)[1 : len(data.classes) + 1]


def known(data: Detection, config: SelftrainConfig, device: torch.device) -> tuple[Known, dict[int, str]]:
    """The masks on canvases, and row and reason of the broken ones, which are ignored wholly."""
    maps, broken = masks.map_canvases(data, config.size)
    return Known(maps, canvas.extents(data, config.size).to(device)), broken


def losses(known: Known, how: str, strength: str, seed: int, weighing: Weighing | None = None, split: int = 0) -> Loss:
    """Cross-entropy over the pixels that are not ignored, each half of a student's batch by its own pixels.

    Args:
        how: normalisation of the images.
        strength: of the augmentation (`strengths.STRENGTHS`); masks follow it.
        split: rows from here on have pseudo-masks.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rows, count = batch.rows[batch.valid], batch.valid.sum()
        given = boxless(batch.pixels[batch.valid], known.extents[rows])
        moved, moves = augment(given, strength, rows, seed, batch.epoch)
        pixels = canvas.normalise(moved.pixels, moved.extents, how)
        maps = known.maps[rows.to(known.maps.device)].to(pixels.device)
        wanted = masks.moved(maps, moves, given.extents, moved.extents).long()
        if weighing is None:
            value, right = segmentation.pixel_loss(model(pixels), wanted)
            return value, {"pixels_right": right * count, "count": count}
        student = detectors.plain(model)
        assert isinstance(student, Student)
        halves = {"human": rows < split, "pseudo": rows >= split}
        found = {name: _half(model, pixels[mine], wanted[mine]) for name, mine in halves.items()}
        value, sums = weighed(student, [part for part, _ in found.values()], weighing, count)
        sums |= {f"{name}_right": right * count for name, (_, right) in found.items()}
        known_share = (wanted[halves["pseudo"]] != IGNORE).float().mean().nan_to_num()
        return value, sums | {"pseudo_known": known_share * count, "count": count}

    return loss


def draw(
    path: Path, data: Detection, known: Known, source: ImageLoader, strength: str, seed: int, rows: Tensor
) -> None:
    """Images with their masks, plain and augmented."""
    draw_augmented(path, data, source, strength, seed, rows, known.maps[rows])


@torch.no_grad()
def label(path: Path, shown: Shown, rows: Tensor, about: dict[str, Any]) -> dict[str, int]:
    """Write the masks that a teacher sees, of the images' own size; groups that lie there already are kept.

    A group of which a mask is missing is looked at as a whole: by another one its last digits would not be the same.
    A mask is named by its row, so that no name of an image can lead out of the folder.
    """
    model, described, data, source, config, device = shown
    assert isinstance(model, segmentation.Segmenter)
    folder, size = path.with_suffix(""), described.size
    edges = canvas.extents(data, size).to(device)
    masked = {row: folder / f"{row:07d}.png" for row in rows.tolist()}
    missing = [group for group in rows.split(AT_ONCE) if not all(masked[row].is_file() for row in group.tolist())]
    model.eval()
    with bar(len(rows), f"predict {path.stem}", done=len(rows) - sum(map(len, missing))) as progress:
        for chosen, pixels, valid, _ in source.batches(iter(missing)):
            progress.update(len(chosen))
            kept = chosen[valid]
            if not len(kept):
                continue
            extents = edges[kept.to(device)]
            predictions = segmentation.probabilities(model, pixels[valid].to(device), extents, scales(config))
            for row, prediction, (width, height) in zip(
                kept.tolist(), predictions, extents.int().tolist(), strict=True
            ):
                whole = int(data.sizes[row, 0]), int(data.sizes[row, 1])
                found = segmentation.hard_map(prediction, (width, height), whole, config.threshold)
                masks.save_map(masked[row], found.numpy())
    check_broken(source.broken, len(rows), config.max_broken, data)
    listed = [
        {
            "file_name": data.keys[row],
            "width": int(data.sizes[row, 0]),
            "height": int(data.sizes[row, 1]),
            "mask": f"{folder.name}/{place.name}",
            "sha256": files.sha256(place),
        }
        for row, place in track(masked.items(), len(masked), "check masks")
        if row not in source.broken
    ]
    files.write_json(path, {"info": about | {"scales": scales(config)}, "classes": data.classes, "images": listed})
    return {"images": len(listed), "masks": len(listed)}


def evaluate(shown: Shown, label: str) -> dict[str, Any]:
    """Mean IoU and the share of right pixels, each image at its own size, once and as it is."""
    model, described, test, source, config, device = shown
    assert isinstance(model, segmentation.Segmenter)
    found = segmentation.confusion(model, test, source, described.size, device, label=label)
    check_broken(source.broken | found.broken, len(test), config.max_broken, test)
    if not found.counts.sum():
        raise StageError(f"{test.spec}: no pixel of the test split has a class; check its masks")
    return segmentation.summary(found.counts, ("background", *test.classes), config.seed)


def _half(model: nn.Module, pixels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and share of right pixels of one half; nothing where none of it could be read."""
    if not len(pixels):
        return pixels.new_zeros(()), pixels.new_zeros(())
    return segmentation.pixel_loss(model(pixels), wanted)
