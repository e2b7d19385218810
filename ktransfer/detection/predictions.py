"""What a detector predicts: boxes, scores and labels of each image, after NMS or soft-NMS."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_iou

from ktransfer.detection import canvas, detectors
from ktransfer.detection.data import Detection, Outline, subset
from ktransfer.detection.detectors import Settings
from ktransfer.detection.masks import encoded
from ktransfer.progress import bar
from ktransfer.training.batch import Source

# Soft-NMS looks at so many of the best predictions of an image.
SOFT_CANDIDATES = 1000


class Prediction(NamedTuple):
    """Of one image, best first: boxes (m, 4) float32 in its own pixels, scores (m,) float32, labels (m,) int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def soft_nms(boxes: Tensor, scores: Tensor, sigma: float, threshold: float) -> tuple[Tensor, Tensor]:
    """Gaussian soft-NMS (Bodla et al., 2017) of boxes of one class.

    Again and again the best box left is taken, and the scores of the others are multiplied by exp(-IoU^2 / sigma).

    Args:
        boxes: (m, 4). scores: (m,).
        threshold: boxes whose score falls below are dropped.

    Returns:
        (k,) int64 the boxes in the order in which they are taken, and their (k,) scores.
    """
    decay = torch.exp(-box_iou(boxes, boxes).square() / sigma)
    left = scores.clone()
    order: list[Tensor] = []
    values: list[Tensor] = []
    for _ in range(len(scores)):
        value, best = left.max(0)
        if value < threshold:
            break
        order.append(best)
        values.append(value)
        left = left * decay[best]
        left[best] = -1.0
    if not order:
        return torch.empty(0, dtype=torch.int64, device=boxes.device), scores[:0]
    return torch.stack(order), torch.stack(values)


@torch.no_grad()
def detect(
    model: nn.Module,
    data: Detection,
    source: Source,
    rows: Tensor,
    size: int,
    settings: Settings,
    device: torch.device,
    batch: int = 16,
    label: str = "detect",
    outlines: dict[int, Sequence[Outline]] | None = None,
) -> dict[int, Prediction]:
    """What the detector finds in the images of (n,) rows, with scores of at least `settings.threshold`.

    Args:
        source: canvases of `size` pixels of that data.
        outlines: where a Mask R-CNN puts its masks, row -> one for each prediction; not with soft-NMS.

    Returns:
        Row -> prediction, on the CPU; broken images are left out.
    """
    assert outlines is None or not settings.soft
    model.eval()
    overlap, most = (1.0, SOFT_CANDIDATES) if settings.soft else (settings.overlap, settings.most)
    detectors.predicting(model, settings.threshold, overlap, most)
    own, place = subset(data, rows.numpy()), {row: place for place, row in enumerate(rows.tolist())}
    edges, scaled = canvas.extents(own, size).to(device), canvas.factors(own, size).to(device)
    shift, found = detectors.shift(model), dict[int, Prediction]()
    with bar(len(rows), label) as shown:
        for chosen, pixels, valid, _ in source.batches(iter(rows.split(batch))):
            kept = chosen[valid].tolist()
            shown.update(len(chosen))
            if not kept:
                continue
            sides = edges[[place[row] for row in kept]]
            prepared = canvas.normalise(pixels[valid].to(device), sides, model.backbone.how)  # type: ignore[union-attr,arg-type]
            for row, one in zip(kept, model(prepared), strict=True):
                width, height = edges[place[row]]
                boxes = torch.stack(
                    [
                        side.clamp(min=0, max=float(edge))
                        for side, edge in zip(
                            one["boxes"].float().unbind(1), (width, height, width, height), strict=True
                        )
                    ],
                    dim=1,
                )
                prediction = Prediction(boxes / scaled[place[row]], one["scores"].float(), one["labels"] - shift)
                if settings.soft:
                    prediction = _softened(prediction, settings)
                wide = (prediction.boxes[:, 2:] > prediction.boxes[:, :2]).all(1)
                found[row] = Prediction(*(part[wide].cpu() for part in prediction))
                if outlines is not None:
                    outlines[row] = _pasted(one["masks"][wide].cpu(), found[row].boxes, data.sizes[row].tolist())
    return found


def _pasted(masks: Tensor, boxes: Tensor, size: list[int]) -> list[Outline]:
    """(m, 1, 28, 28) probabilities in (m, 4) boxes as run lengths of the image of `size`, width and height."""
    found: list[Outline] = []
    for mask, box in zip(masks[:, None], boxes[:, None], strict=True):
        whole = paste_masks_in_image(mask, box, (size[1], size[0]))
        found.append(encoded((whole[0, 0] >= 0.5).numpy()))
    return found


def _softened(prediction: Prediction, settings: Settings) -> Prediction:
    """Soft-NMS class by class, then the best of all."""
    parts: list[Prediction] = []
    for label in prediction.labels.unique().tolist():
        own = (prediction.labels == label).nonzero().flatten()
        order, values = soft_nms(prediction.boxes[own], prediction.scores[own], settings.soft, settings.threshold)
        parts.append(Prediction(prediction.boxes[own[order]], values, prediction.labels[own[order]]))
    if not parts:
        return prediction
    whole = Prediction(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    best = whole.scores.argsort(descending=True, stable=True)[: settings.most]
    return Prediction(*(part[best] for part in whole))
