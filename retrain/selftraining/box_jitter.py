"""Pseudo-boxes that stay where they are when the image is changed a little for the teacher (`--jitter-filter`).

Soft Teacher repeats the regression on jittered boxes (docs/papers.md), for which a detector needs heads
on regions. Here the image is jittered instead, which serves every detector: it is made smaller, and mirrored half the
time, so that nothing leaves the canvas and everything lies differently to the anchors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from ktransfer.detection import canvas, detectors
from ktransfer.detection.canvas import Jitter
from ktransfer.detection.data import Detection
from ktransfer.detection.detectors import Settings
from ktransfer.detection.predictions import Prediction
from ktransfer.progress import bar
from ktransfer.training.batch import Source

VIEWS = 4
SCALES = (0.8, 1.0)
FOUND = 0.5  # least IoU of a box that is found again
EASIER = 0.5  # of the least score: what wavers around it is no box that moves


def without_moving(
    predictions: Mapping[int, Prediction], spread: Mapping[int, Tensor], limit: float
) -> tuple[dict[int, Prediction], int]:
    """The predictions without the boxes whose spread is over the limit, and how many those are."""
    kept = {
        row: Prediction(*(part[spread[row] <= limit] for part in prediction)) if row in spread else prediction
        for row, prediction in predictions.items()
    }
    return kept, sum(len(predictions[row].scores) - len(kept[row].scores) for row in kept)


@torch.no_grad()
def spreads(
    model: nn.Module,
    data: Detection,
    source: Source,
    predictions: Mapping[int, Prediction],
    size: int,
    settings: Settings,
    device: torch.device,
    seed: int,
    batch: int = 16,
) -> dict[int, Tensor]:
    """How far the sides of each box move from view to view, as a share of its size.

    In each view the prediction of the same class that overlaps the box most stands for it. The spread is the standard
    deviation of each side over the box and these, averaged over the four sides, by the mean of width and height;
    infinite where a view has no such prediction.

    Args:
        predictions: of `detect` with these settings.
        source: canvases of `size` pixels.

    Returns:
        Row -> (m,) float32 on the CPU, for the images with boxes.
    """
    model.eval()
    detectors.predicting(model, settings.threshold * EASIER, settings.overlap, settings.most)
    edges, scaled = canvas.extents(data, size).to(device), canvas.factors(data, size).to(device)
    shift, found = detectors.shift(model), dict[int, Tensor]()
    rows = torch.tensor(
        [row for row, prediction in sorted(predictions.items()) if len(prediction.scores)], dtype=torch.int64
    )
    with bar(len(rows), "predict jittered images") as shown:
        for chosen, pixels, valid, _ in source.batches(iter(rows.split(batch))):
            kept, pixels = chosen[valid].to(device), pixels[valid].to(device)
            boxes = [predictions[row].boxes.to(device) * scaled[row] for row in kept.tolist()]
            labels = [predictions[row].labels.to(device) for row in kept.tolist()]
            again: list[list[Tensor]] = [[own] for own in boxes]
            for view in range(VIEWS if len(kept) else 0):
                jitter = canvas.draw_jitter(kept, edges[kept], size, seed, view, SCALES)
                moved = canvas.move_pixels(pixels, jitter)
                limits = jitter.moved_extents()
                prepared = canvas.normalise(moved, limits, model.backbone.how)  # type: ignore[union-attr,arg-type]
                for place, one in enumerate(model(prepared)):
                    # The predictions end at the image's edge, the model's boxes at the canvas': that is no movement.
                    before = _back(one["boxes"].float().minimum(limits[place].repeat(2)), jitter, place)
                    again[place].append(_found(boxes[place], labels[place], before, one["labels"] - shift))
            for row, own, views in zip(kept.tolist(), boxes, again, strict=True):
                sides = torch.stack(views).std(0, correction=0).mean(1)  # NaN where a view is infinite
                found[row] = (2 * sides / (own[:, 2:] - own[:, :2]).sum(1)).nan_to_num(nan=torch.inf).cpu()
            shown.update(len(chosen))
    return found


def _back(boxes: Tensor, jitter: Jitter, place: int) -> Tensor:
    """Boxes (k, 4) of image `place` after the jitter, as they lay before it."""
    x1, y1, x2, y2 = ((boxes + jitter.offset[place].repeat(2)) / jitter.scale[place]).unbind(1)
    width = jitter.extents[place, 0]
    return torch.stack([width - x2, y1, width - x1, y2] if jitter.flip[place] else [x1, y1, x2, y2], dim=1)


def _found(boxes: Tensor, labels: Tensor, others: Tensor, their_labels: Tensor) -> Tensor:
    """(m, 4): of the k others the one of the same class that overlaps each box most, infinite where none does."""
    none = torch.full_like(boxes, torch.inf)
    if not len(others):
        return none
    overlap = box_iou(boxes, others) * (labels[:, None] == their_labels)
    best, place = overlap.max(1)
    return torch.where((best >= FOUND)[:, None], others[place], none)
