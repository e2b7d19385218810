"""Self-training of Mask R-CNN (`--task instance`), see `tasks.Task`: labels are objects with a mask each.

Pseudo-labels are a COCO file of boxes whose masks are run lengths. A training is shown masks, and boxes around what is
left of them after the augmentation.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import masks_to_boxes

from ktransfer.data.dataset import check_broken
from ktransfer.data.loader import ImageLoader
from ktransfer.detection import canvas, geometry, masks, metrics
from ktransfer.detection.data import Detection, Outline, subset
from ktransfer.detection.frames import OBEY
from ktransfer.detection.predictions import detect
from ktransfer.detection.sheet import draw_augmented
from ktransfer.detection.strengths import augment, boxless
from ktransfer.errors import UsageError
from ktransfer.training.batch import Batch, Loss

from ..config import SelftrainConfig
from . import boxes, detecting
from .detecting import AT_ONCE, Labels, in_parts
from .detecting import count as count
from .parts import Shown
from .student import Weighing, objects_loss

NECKS = {"maskrcnn": "p2-p6"}
THINGS = "object", "objects"
EVALUATED: tuple[str, ...] = ("test_threshold",)


class Known(NamedTuple):
    """The images' objects, and width and height of each on its canvas, (n, 2) float32 on the device."""

    data: Detection
    size: int
    extents: Tensor


def kind(config: SelftrainConfig) -> str:
    """The only one."""
    return "maskrcnn"


def check(config: SelftrainConfig, labelled: int, other: int) -> None:
    """Nothing more can be wrong."""


def open_data(spec: str, exif: str = OBEY) -> tuple[Detection, Detection]:
    """Training and test split with an outline of every object.

    Raises:
        UsageError: the extra is missing, or an outline.
    """
    parts = detecting.open_data(spec, exif)
    for part in parts:
        need_outlines(part)
    return parts


def need_outlines(data: Detection) -> None:
    """Raise UsageError where an object has no outline, or run lengths that are broken or of another image's size."""
    for row, one in enumerate(data.objects):
        if tuple(data.sizes[row].tolist()) == boxes.UNREADABLE:
            continue
        for outline, crowd in zip(one.outlines, one.crowd.tolist(), strict=True):
            if crowd:
                continue
            if outline is None:
                raise UsageError(
                    f"{data.spec}: {data.keys[row]} has an object without outline; --task instance needs outlines of "
                    "all objects"
                )
            try:
                if isinstance(outline, dict):
                    stated = data.sizes[row, ::-1].tolist()
                    if outline["size"] != stated and stated != [boxes.ANY, boxes.ANY]:
                        raise ValueError(f"of {outline['size']} pixels, high and wide, in an image of {stated}")
                    masks.decoded(outline)
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{data.spec}: {data.keys[row]} has a broken outline ({error}); correct it") from error


def read(
    path: Path, other: Detection, labelled: Detection, config: SelftrainConfig
) -> tuple[Detection, NDArray[np.int64]]:
    """`other` with the pseudo-objects that reach the threshold, see `boxes.read`; each has its mask."""
    found, listed = detecting.read(path, other, labelled, config)
    need_outlines(replace(found, spec=str(path)))
    return found, listed


def known(data: Detection, config: SelftrainConfig, device: torch.device) -> tuple[Known, dict[int, str]]:
    """The objects; none is broken."""
    return Known(data, config.size, canvas.extents(data, config.size).to(device)), {}


def losses(known: Known, how: str, strength: str, seed: int, weighing: Weighing | None = None, split: int = 0) -> Loss:
    """As `student.losses`, with masks.

    Args:
        how: normalisation of the images.
        strength: of the augmentation (`strengths.STRENGTHS`).
        split: rows from here on have pseudo-objects.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rows, count = batch.rows[batch.valid], batch.valid.sum()
        given = boxless(batch.pixels[batch.valid], known.extents[rows])
        moved, moves = augment(given, strength, rows, seed, batch.epoch)
        pixels = canvas.normalise(moved.pixels, moved.extents, how)
        targets = [
            target(known, row, moves[place : place + 1], moved.extents[place : place + 1])
            for place, row in enumerate(rows.tolist())
        ]
        objects = torch.tensor([len(one["labels"]) for one in targets], device=rows.device)
        return objects_loss(model, pixels, targets, objects, "objects", rows < split, weighing, count)

    return loss


def target(known: Known, row: int, moves: Tensor, after: Tensor) -> dict[str, Tensor]:
    """What is to be found in one augmented image; what was moved out of it is dropped, and so are crowds.

    Args:
        moves: (1, 2, 3) of `strengths.augment`. after: (1, 2), width and height of the image after it.

    Returns:
        masks (m, size, size) uint8, boxes (m, 4) around them, labels (m,) from 1.
    """
    one, size, before = known.data.objects[row], known.size, known.extents[row : row + 1]
    kept = np.flatnonzero(~one.crowd)
    if not len(kept):
        nothing = torch.zeros(0, size, size, dtype=torch.uint8, device=moves.device)
        return {"masks": nothing, "boxes": moves.new_zeros(0, 4), "labels": nothing[:, 0, 0].long()}
    scale = size / int(known.data.sizes[row].max())
    drawn = np.zeros((len(kept), 1, size, size), np.uint8)
    width, height = (int(side) for side in before[0])
    for place, number in enumerate(kept.tolist()):
        drawn[place, 0, :height, :width] = masks.filled(one.outlines[number], (width, height), scale)
    whole = torch.from_numpy(drawn).to(moves.device)
    found = geometry.move_pixels(whole, moves.expand(len(kept), -1, -1), before.expand(len(kept), -1), "nearest", 0)
    found = (found * canvas.inside(after, size))[:, 0]
    there = (found > 0).flatten(1).any(1)
    around = masks_to_boxes(found[there])
    around[:, 2:] += 1  # the last pixel is in the box
    labels = torch.from_numpy(one.labels[kept]).to(moves.device)[there] + 1
    return {"masks": found[there], "boxes": around, "labels": labels}


def draw(
    path: Path, data: Detection, known: Known, source: ImageLoader, strength: str, seed: int, rows: Tensor
) -> None:
    """Images with their masks, plain and augmented."""
    maps, _ = masks.map_canvases(subset(data, rows.numpy()), known.size)
    draw_augmented(path, data, source, strength, seed, rows, maps)


def label(path: Path, shown: Shown, rows: Tensor, about: dict[str, Any]) -> dict[str, int]:
    """Write the objects that a teacher sees, with scores from the threshold on."""
    model, described, data, source, config, device = shown
    settings = replace(described.settings, threshold=config.threshold)

    def label_part(chosen: Tensor, words: str) -> Labels:
        outlines = dict[int, Sequence[Outline]]()
        found = detect(model, data, source, chosen, described.size, settings, device, AT_ONCE, words, outlines)
        return found, outlines, {"images": len(found), "objects": sum(len(one.scores) for one in found.values())}

    return in_parts(path, shown, rows, about, label_part)


def evaluate(shown: Shown, label: str) -> dict[str, Any]:
    """Average precision of masks and of boxes."""
    model, described, test, source, config, device = shown
    settings, outlines = replace(described.settings, threshold=config.test_threshold), dict[int, Sequence[Outline]]()
    rows = torch.arange(len(test))
    found = detect(model, test, source, rows, described.size, settings, device, label=label, outlines=outlines)
    check_broken(source.broken, len(rows), config.max_broken, test)
    return metrics.mask_scores(test, found, outlines, config.seed) | metrics.scores(test, found, config.seed)
