"""The loss of detectors for the training loop: rows of the data become jittered images and targets."""

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from ktransfer.detection import canvas, detectors
from ktransfer.detection.canvas import Jitter
from ktransfer.detection.data import Detection, boxes_of
from ktransfer.detection.masks import filled
from ktransfer.errors import UsageError
from ktransfer.training.batch import Batch
from ktransfer.training.options import LoopOptions

Target = dict[str, Tensor]


class Truth(NamedTuple):
    """The boxes of a data set on its canvases, on the device.

    Attributes:
        boxes: n of (m, 4) float32, x0 y0 x1 y1 in pixels of the canvas; crowds are left out.
        labels: n of (m,) int64, indices of classes.
        extents: (n, 2) float32.
        size: side of the canvas.
        outlines: n of m polygons each, in pixels of the canvas; None where no masks are learned.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    extents: Tensor
    size: int
    outlines: list[list[list[Tensor]]] | None = None


def check_batches(options: LoopOptions, images: int) -> None:
    """Find what would divide a batch of so many images: its loss is normalised by what is in all of it.

    Raises:
        UsageError: one line.
    """
    if 0 < options.micro_batch < images:
        raise UsageError(
            f"--micro-batch {options.micro_batch}: this loss is normalised over all {images} images of a step, "
            "which cannot be divided; leave it out, and give a smaller --batch if memory runs out"
        )


def truth(data: Detection, size: int, device: torch.device, masks: bool = False) -> Truth:
    """What a training on canvases of `size` pixels learns.

    Args:
        masks: with the outlines, for a Mask R-CNN.

    Raises:
        UsageError: masks are wanted, and an object has no polygons.
    """
    scaled = canvas.factors(data, size)
    outlines = _outlines(data, scaled) if masks else None
    pairs = boxes_of(data)
    boxes = [(boxes * factor).to(device) for (boxes, _), factor in zip(pairs, scaled, strict=True)]
    return Truth(
        boxes, [labels.to(device) for _, labels in pairs], canvas.extents(data, size).to(device), size, outlines
    )


def targets(truth: Truth, rows: Tensor, jitter: Jitter, shift: int) -> list[Target]:
    """Boxes (m, 4) and labels (m,), plus `shift`, of (b,) rows after the jitter; what a crop leaves out is dropped.

    With outlines also masks (m, size, size) uint8.
    """
    found: list[Target] = []
    for place, row in enumerate(rows.tolist()):
        moved, left = canvas.move_boxes(truth.boxes[row], jitter, place)
        target = {"boxes": moved[left], "labels": truth.labels[row][left] + shift}
        if truth.outlines is not None:
            kept = [truth.outlines[row][number] for number in left.nonzero().flatten().tolist()]
            target["masks"] = _masks(kept, jitter, place).to(moved.device)
        found.append(target)
    return found


def detection_loss(
    truth: Truth, how: str, seed: int, scales: tuple[float, float] = (1.0, 1.0)
) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """The sum of a detector's losses, for `loop.fit`.

    Args:
        how: normalisation, that of the trunk.
        scales: of the jitter; images are always mirrored half the time.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch.rows[batch.valid]
        jitter = canvas.draw_jitter(rows, truth.extents[rows], truth.size, seed, batch.epoch, scales)
        pixels = canvas.move_pixels(batch.pixels[batch.valid], jitter)
        pixels = canvas.normalise(pixels, jitter.moved_extents(), how)
        found = model(pixels, targets(truth, rows, jitter, detectors.shift(model)))
        positives = found.pop("positives", None)
        total = torch.stack(list(found.values())).sum()
        count = batch.valid.sum()
        sums = {name: value.detach() * count for name, value in found.items()}
        if positives is not None:
            sums["positives"] = positives.float()
        return total, sums | {"count": count}

    return loss


def _outlines(data: Detection, factors: Tensor) -> list[list[list[Tensor]]]:
    """The polygons of all objects but crowds, (k, 2) float32 each, in pixels of the canvas."""
    found: list[list[list[Tensor]]] = []
    for row, one in enumerate(data.objects):
        kept = [outline for outline, crowd in zip(one.outlines, one.crowd, strict=True) if not crowd]
        if any(not isinstance(outline, list) for outline in kept):
            raise UsageError(
                f"{data.spec}: {data.keys[row]} has an object without polygons; masks need polygons of all objects"
            )
        polygons = [cast(list[list[float]], outline) for outline in kept]
        found.append([[torch.tensor(one).view(-1, 2) * factors[row, :2] for one in outline] for outline in polygons])
    return found


def _masks(outlines: list[list[Tensor]], jitter: Jitter, place: int) -> Tensor:
    """(m, size, size) uint8 of outlines after the jitter."""
    moves = Jitter(jitter.scale.cpu(), jitter.offset.cpu(), jitter.flip.cpu(), jitter.extents.cpu(), jitter.size)
    size = (jitter.size, jitter.size)
    drawn = [
        filled([canvas.move_points(polygon, moves, place).flatten().tolist() for polygon in outline], size)
        for outline in outlines
    ]
    return torch.from_numpy(np.stack(drawn) if drawn else np.zeros((0, *size), np.bool_)).to(torch.uint8)
