"""Detectors and segmenters as one function from pixels to what is meant, as exporters trace them: RetinaNet with its
non-maximum suppression inside, segmenters with their normalisation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import nms

from ktransfer.detection import canvas
from ktransfer.detection.detectors import Settings

Best = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(m,), k -> the k largest numbers, in that order, and their places."""


def topk(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As torch has it; which of equal numbers comes first is open."""
    best, places = values.topk(count)
    return best, places


def first_of_equals(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same, the lower place first where numbers are equal, as in ONNX."""
    best, places = values.sort(descending=True, stable=True)
    return best[:count], places[:count]


class RetinaGraph(nn.Module):
    """A RetinaNet on one canvas, which computes what `predictions.detect` does by torchvision's own class.

    Its parts are separate, so that what another library makes of each can be compared: two that differ in the last
    digit of a score may choose different boxes of a crowd, and both are right.
    """

    anchors: Tensor

    def __init__(self, model: Any, size: int, settings: Settings) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.settings = settings
        x = torch.zeros(1, 3, size, size)
        with torch.no_grad():
            maps = list(model.backbone(x).values())
            found = model.anchor_generator(ImageList(x, [(size, size)]), maps)[0]
        per = model.anchor_generator.num_anchors_per_location()
        self.counts = [one.shape[-2] * one.shape[-1] * number for one, number in zip(maps, per, strict=True)]
        self.register_buffer("anchors", found)
        self.eval()

    def forward(
        self, image: Tensor, extent: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What is found, and all that it was chosen from.

        Args:
            image: (1, 3, size, size) uint8.
            extent: (1, 2) int64, width and height of what is image.
            threshold: () float32, scores above it count.

        Returns:
            Of `chosen` boxes, scores and labels, of `candidates` boxes and logits.
        """
        boxes, logits = self.candidates(image, extent)
        return *self.chosen(boxes, logits, extent, threshold), boxes, logits

    def candidates(self, image: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        """(a, 4) x0 y0 x1 y1 in pixels of the canvas, and (a, classes) logits, of all anchors."""
        x = canvas.normalise(image, extent.float(), self.model.backbone.how)
        found = self.model.head(list(self.model.backbone(x).values()))
        boxes: Tensor = self.model.box_coder.decode_single(found["bbox_regression"][0].float(), self.anchors)
        return boxes.clamp(0, self.size), found["cls_logits"][0].float()

    def chosen(
        self, boxes: Tensor, logits: Tensor, extent: Tensor, threshold: Tensor, best: Best = topk
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(m, 4) boxes, (m,) scores and (m,) int64 labels from 0, the most certain first."""
        places, scores, labels = list[Tensor](), list[Tensor](), list[Tensor]()
        start = 0
        for count in self.counts:  # the best of each map, as torchvision takes them
            own = logits[start : start + count].flatten()
            score, place = best(own, min(self.settings.candidates, own.numel()))
            places.append(start + place // logits.shape[1])
            labels.append(place % logits.shape[1])
            scores.append(score.sigmoid())
            start += count
        place, score, label = torch.cat(places), torch.cat(scores), torch.cat(labels)
        above = (score > threshold).nonzero().flatten()
        box, score, label = boxes[place[above]], score[above], label[above]
        # Boxes of different classes are moved apart, so that none drops one of another class.
        kept = nms(box + (label.float() * (self.size + 1.0))[:, None], score, self.settings.overlap)
        kept = kept[: self.settings.most]
        box, score, label = box[kept], score[kept], label[kept]
        box = torch.minimum(box, extent.float().repeat(1, 2))
        wide = (box[:, 2:] > box[:, :2]).all(1).nonzero().flatten()
        return box[wide], score[wide], label[wide]


class SegmenterGraph(nn.Module):
    """A segmenter with its normalisation inside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, image: Tensor, extent: Tensor) -> Tensor:
        """(batch, 3, size, size) uint8, (batch, 2) int64 -> (batch, classes + 1, size, size) float32 logits."""
        logits: Tensor = self.model(canvas.normalise(image, extent.float(), self.model.backbone.how))
        return logits
