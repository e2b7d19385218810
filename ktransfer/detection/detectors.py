"""Detectors from torchvision's parts: RetinaNet, Faster R-CNN, Mask R-CNN, on canvases.

RetinaNet's constants are those of docs/papers.md: 9 anchors, focal loss of alpha 0.25 and gamma 1.5,
Huber loss of delta 0.1 and weight 50, both divided by the number of positives of the whole batch, and one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign, sigmoid_focal_loss

from ktransfer import rng
from ktransfer.detection import trunks
from ktransfer.detection.trunks import Trunk

DETECTORS = ("retinanet", "fasterrcnn", "maskrcnn")
RATIOS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Settings:
    """What a detector is besides its trunk, and how it predicts.

    Those of `focal_*`, `huber_*` and `matched` are of RetinaNet alone; `proposals`, `sampled` and `width` (numbers of
    the fully connected layers) of the others. `anchor` times the stride of a map is the side of its smallest anchors.
    `threshold` is the least score of a prediction, `overlap` the IoU over which NMS drops one, `most` the most
    predictions in an image. `soft` > 0 is the sigma of soft-NMS, which then takes the place of NMS.
    """

    kind: str = "retinanet"
    norm: str = "gn"
    anchor: float = 4.0
    focal_alpha: float = 0.25
    focal_gamma: float = 1.5
    huber_delta: float = 0.1
    huber_weight: float = 50.0
    matched: float = 0.5
    proposals: int = 1000
    sampled: int = 256
    width: int = 1024
    threshold: float = 0.05
    overlap: float = 0.5
    most: int = 100
    candidates: int = 1000
    soft: float = 0.0


class Prepared(nn.Module):
    """In place of torchvision's resizing and normalising: canvases are that already, (b, 3, size, size) float32."""

    def forward(self, images: Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        """The images as torchvision's detectors hand them on."""
        return ImageList(images, [(images.shape[-2], images.shape[-1])] * len(images)), targets

    def postprocess(self, result: Any, image_shapes: Any, original_sizes: Any) -> Any:
        """Nothing: boxes stay in pixels of the canvas, masks (28 x 28) in their boxes."""
        return result


class FocalHead(RetinaNetHead):  # type: ignore[misc]
    """torchvision's head with the losses of the head of this file: sums over the batch, one normaliser."""

    def __init__(self, channels: int, anchors: int, classes: int, settings: Settings) -> None:
        norm = trunks.head_norm(settings.norm)
        super().__init__(channels, anchors, classes, norm_layer=norm)
        self.settings = settings

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched: list[Tensor],
    ) -> dict[str, Tensor]:
        """The two losses, and `positives`, how many anchors were matched (without gradient).

        Args:
            targets: for each image `boxes` (m, 4), `labels` (m,).
            head_outputs: `cls_logits` (b, a, classes), `bbox_regression` (b, a, 4).
            anchors: b of (a, 4).
            matched: b of (a,) int64: the box of each anchor, or negative.
        """
        logits, offsets = (head_outputs[name].float() for name in ("cls_logits", "bbox_regression"))
        wanted = torch.zeros_like(logits)
        boxes: list[Tensor] = []
        for place, (target, found) in enumerate(zip(targets, matched, strict=True)):
            positive = (found >= 0).nonzero().flatten()
            wanted[place, positive, target["labels"][found[positive]]] = 1.0
            coder = self.regression_head.box_coder
            offset = coder.encode_single(target["boxes"][found[positive]], anchors[place][positive])
            boxes.append(
                F.huber_loss(offsets[place, positive], offset, reduction="sum", delta=self.settings.huber_delta)
            )
        ignored = torch.stack(matched) == self.classification_head.BETWEEN_THRESHOLDS
        focal = sigmoid_focal_loss(logits, wanted, self.settings.focal_alpha, self.settings.focal_gamma)
        positives = (torch.stack(matched) >= 0).sum()
        normaliser = positives + 1.0
        return {
            "classification": focal.masked_fill(ignored[..., None], 0.0).sum() / normaliser,
            # delta is about the mean of the offsets, and the mean is over the four of them.
            "boxes": self.settings.huber_weight * torch.stack(boxes).sum() / (4 * normaliser),
            "positives": positives.detach(),
        }


def build(trunk: Trunk, classes: int, size: int, settings: Settings, seed: int) -> nn.Module:
    """A detector on canvases of `size` pixels; its heads are a function of the seed.

    In training mode (pixels, targets) -> losses by name, in evaluation mode (pixels) -> for each image `boxes` (m, 4)
    in pixels of the canvas, `scores`, `labels`, and `masks` (m, 1, 28, 28) of a Mask R-CNN. Labels count from 0 for
    RetinaNet and from 1 for the others (see `shift`); losses.py and predictions.py know that.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.torch_seed(seed, "detection/head", 0))
        made = (
            _retinanet(trunk, classes, settings)
            if settings.kind == "retinanet"
            else _rcnn(trunk, classes, size, settings)
        )
    made.transform = Prepared()
    return made


def shift(model: nn.Module) -> int:
    """What a detector, compiled or not, adds to the index of a class: its background is class 0, or it has none."""
    return 0 if isinstance(plain(model), RetinaNet) else 1


def plain(model: nn.Module) -> nn.Module:
    """The module itself, where it is wrapped by torch.compile."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def anchors(strides: Iterable[int], settings: Settings, octaves: int) -> AnchorGenerator:
    """For each map `octaves` sizes, 2^(i / octaves) * anchor * stride, in three ratios."""
    sizes = tuple(tuple(settings.anchor * stride * 2 ** (i / octaves) for i in range(octaves)) for stride in strides)
    return AnchorGenerator(sizes, (RATIOS,) * len(sizes))


def predicting(model: nn.Module, threshold: float, overlap: float, most: int) -> None:
    """Set from which score on a detector predicts, over which IoU its NMS drops (1: nothing), and the most
    predictions."""
    place: Any = model if isinstance(model, RetinaNet) else cast(Any, model).roi_heads
    place.score_thresh, place.nms_thresh, place.detections_per_img = threshold, overlap, most


def _retinanet(trunk: Trunk, classes: int, settings: Settings) -> nn.Module:
    generator = anchors(trunks.strides(trunk).values(), settings, 3)
    head = FocalHead(trunk.out_channels, generator.num_anchors_per_location()[0], classes, settings)
    made: nn.Module = RetinaNet(
        trunk,
        classes,
        anchor_generator=generator,
        head=head,
        score_thresh=settings.threshold,
        nms_thresh=settings.overlap,
        detections_per_img=settings.most,
        fg_iou_thresh=settings.matched,
        bg_iou_thresh=settings.matched,
        topk_candidates=settings.candidates,
    )
    return made


def _rcnn(trunk: Trunk, classes: int, size: int, settings: Settings) -> nn.Module:
    strides = trunks.strides(trunk)
    single = len(strides) == 1
    if single:
        # One map serves all objects: an eighth of the canvas to the whole of it.
        sizes = tuple(size * share for share in (0.125, 0.25, 0.5, 1.0))
        generator = AnchorGenerator((sizes,), (RATIOS,))
    else:
        generator = anchors(strides.values(), settings, 1)
    # Maps that a pyramid adds beyond those of the network propose, but nothing is pooled from them.
    pool = partial(MultiScaleRoIAlign, list(trunk.taps.values()), sampling_ratio=2)
    norm = trunks.head_norm(settings.norm) if settings.norm == "gn" else None
    head: nn.Module
    if norm is None:
        head = TwoMLPHead(trunk.out_channels * 49, settings.width)
    else:
        head = FastRCNNConvFCHead((trunk.out_channels, 7, 7), [256] * 4, [settings.width], norm)
    shared: dict[str, Any] = {
        "rpn_anchor_generator": generator,
        "box_roi_pool": pool(output_size=7),
        "box_head": head,
        "box_predictor": FastRCNNPredictor(settings.width, classes + 1),
        "rpn_pre_nms_top_n_train": 2 * settings.proposals,
        "rpn_pre_nms_top_n_test": settings.proposals,
        "rpn_post_nms_top_n_train": settings.proposals,
        "rpn_post_nms_top_n_test": settings.proposals,
        "box_batch_size_per_image": settings.sampled,
        "box_score_thresh": settings.threshold,
        "box_nms_thresh": settings.overlap,
        "box_detections_per_img": settings.most,
    }
    if settings.kind == "fasterrcnn":
        faster: nn.Module = FasterRCNN(trunk, **shared)
        return faster
    masked: nn.Module = MaskRCNN(
        trunk,
        mask_roi_pool=pool(output_size=14),
        mask_head=MaskRCNNHeads(trunk.out_channels, (256,) * 4, 1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(256, 256, classes + 1),
        **shared,
    )
    return masked
