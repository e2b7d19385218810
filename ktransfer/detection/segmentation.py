"""Networks that predict the class of every pixel: heads on a trunk, their loss, predictions, and the mean IoU.

Heads: torchvision's FCN and DeepLab on the deepest map, and that of Zoph et al. on a pyramid, whose maps are
enlarged to the finest one and summed before three convolutions (docs/papers.md).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from ktransfer import rng
from ktransfer.detection import canvas, metrics, trunks
from ktransfer.detection.data import Detection
from ktransfer.detection.masks import IGNORE, classes_of_pixels
from ktransfer.detection.trunks import Trunk
from ktransfer.errors import BrokenImage
from ktransfer.progress import bar
from ktransfer.training.batch import Batch, Source

HEADS = {"fcn": "single", "deeplab": "single", "fpn": "p2-p6"}
"""Head -> the neck of its trunk (see `trunks.build`)."""
RATES = (96, 192, 288)  # pixels between the taps of DeepLab's convolutions: its 12, 24, 36 on a map of stride 8
DEPTH = 3  # convolutions behind the sum of a pyramid


class Summed(nn.Sequential):
    """The head on a pyramid: maps (b, c, h, w), the finest first, are enlarged to that one and summed."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Logits at the resolution of the finest map."""
        size = maps[0].shape[-2:]
        coarser = [F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps[1:]]
        x = torch.stack([maps[0], *coarser]).sum(0)
        for module in self:
            x = module(x)
        return x


class Segmenter(nn.Module):
    """A head on a trunk, its prediction enlarged to the canvas: (b, 3, s, s) -> (b, classes + 1, s, s)."""

    def __init__(self, trunk: Trunk, head: nn.Module) -> None:
        super().__init__()
        self.backbone = trunk
        self.classifier = head

    def forward(self, x: Tensor) -> Tensor:
        """Logits; class 0 is the background."""
        found = self.backbone(x)
        maps = [found[name] for name in self.backbone.taps.values()]  # without what a pyramid adds beyond the network
        logits = self.classifier(maps if isinstance(self.classifier, Summed) else maps[-1])
        return F.interpolate(logits.float(), size=x.shape[-2:], mode="bilinear", align_corners=False)


def build(trunk: Trunk, classes: int, norm: str, seed: int, head: str = "fcn") -> Segmenter:
    """A network for `classes` classes and background.

    Args:
        trunk: with the neck of HEADS.
        seed: the head is a function of it.
        head: a key of HEADS.
    """
    width, outputs = trunk.out_channels, classes + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.torch_seed(seed, f"detection/{head}", 0))
        made: nn.Module
        if head == "fcn":
            made = FCNHead(width, outputs)
        elif head == "deeplab":
            stride = max(trunks.strides(trunk).values())
            made = DeepLabHead(width, outputs, [max(1, rate // stride) for rate in RATES])
        else:
            blocks = [
                (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
                for _ in range(DEPTH)
            ]
            made = Summed(*(layer for block in blocks for layer in block), nn.Conv2d(width, outputs, 1))
        return Segmenter(trunk, trunks.renormed(made, norm))


def segmentation_loss(
    maps: Tensor, extents: Tensor, how: str, seed: int, scales: tuple[float, float] = (1.0, 1.0)
) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """Cross-entropy over all pixels that are not ignored, for `loop.fit`.

    Args:
        maps: (n, size, size) uint8 of `masks.map_canvases`, on any device.
        extents: (n, 2) of `canvas.extents`, on the device.
        how: normalisation, that of the trunk.
        scales: of the jitter; images are always mirrored half the time.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch.rows[batch.valid]
        jitter = canvas.draw_jitter(rows, extents[rows], maps.shape[-1], seed, batch.epoch, scales)
        after = jitter.moved_extents()
        pixels = canvas.normalise(canvas.move_pixels(batch.pixels[batch.valid], jitter), after, how)
        wanted = maps[rows.to(maps.device)].to(pixels.device)[:, None]
        wanted = canvas.move_pixels(wanted, jitter, "nearest").long()
        wanted[~canvas.inside(after, maps.shape[-1])] = IGNORE
        wanted = wanted[:, 0]
        total, right = pixel_loss(model(pixels), wanted)
        count = batch.valid.sum()
        return total, {"pixels_right": right * count, "count": count}

    return loss


def pixel_loss(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the pixels that are not ignored, and the share of them whose class is right.

    Args:
        logits: (b, c, s, s).
        wanted: (b, s, s) int64.
    """
    known = wanted != IGNORE
    # A sum over a count: a batch without a known pixel gives 0 and not NaN.
    total = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum") / known.sum().clamp(min=1)
    return total, ((logits.argmax(1) == wanted) & known).sum() / known.sum().clamp(min=1)


class Confusion(NamedTuple):
    """Of m evaluated images.

    Attributes:
        rows: m rows.
        counts: (m, c, c) int64 pixels, by true class (first) and predicted class.
        broken: row and reason of images whose maps are broken.
    """

    rows: list[int]
    counts: NDArray[np.int64]
    broken: dict[int, str]


@torch.no_grad()
def confusion(
    model: Segmenter,
    data: Detection,
    source: Source,
    size: int,
    device: torch.device,
    batch: int = 16,
    label: str = "segment",
) -> Confusion:
    """Predictions at the images' own size against their maps; ignored pixels and broken images are left out."""
    model.eval()
    edges, classes = canvas.extents(data, size), len(data.classes) + 1
    rows, counts, broken = list[int](), list[NDArray[np.int64]](), dict[int, str]()
    with bar(len(data), label) as shown:
        for chosen, pixels, valid, _ in source.batches(iter(torch.arange(len(data)).split(batch))):
            shown.update(len(chosen))
            kept = chosen[valid]
            if not len(kept):
                continue
            prepared = canvas.normalise(pixels[valid].to(device), edges[kept].to(device), model.backbone.how)
            for row, logits in zip(kept.tolist(), model(prepared), strict=True):
                try:
                    true = torch.from_numpy(classes_of_pixels(data, row).copy())
                except BrokenImage as error:
                    broken[row] = str(error)
                    continue
                width, height = (int(side) for side in edges[row])
                whole = F.interpolate(logits[None, :, :height, :width], size=tuple(true.shape), mode="bilinear")
                rows.append(row)
                counts.append(confusion_matrix(true, whole[0].argmax(0).cpu(), classes))
    return Confusion(rows, np.stack(counts) if counts else np.zeros((0, classes, classes), np.int64), broken)


@torch.no_grad()
def probabilities(model: Segmenter, pixels: Tensor, extents: Tensor, scales: Sequence[float]) -> Tensor:
    """The mean over scales, and over each image and its mirror image, of what the model predicts.

    Args:
        model: in evaluation mode.
        pixels: (b, 3, s, s) uint8 canvases. extents: (b, 2) of their images, whole numbers.
        scales: factors of the canvas's side.

    Returns:
        (b, classes + 1, s, s) float32, over classes and background adding up to 1.
    """
    size = pixels.shape[-1]
    total: Any = 0.0
    for mirrored in (False, True):
        view = canvas.mirror(pixels, extents) if mirrored else pixels
        whole = canvas.normalise(view, extents, model.backbone.how)
        for scale in scales:
            side = max(1, round(size * scale))
            # Cells lie in a map as in training only where the sides differ by whole strides.
            beyond = (size - side) % 32
            small = whole if side == size else F.interpolate(whole, size=(side, side), mode="bilinear", antialias=True)
            logits = model(F.pad(small, (0, beyond, 0, beyond)))[:, :, :side, :side]
            prediction = F.interpolate(logits.softmax(1), size=(size, size), mode="bilinear", align_corners=False)
            total = total + (canvas.mirror(prediction, extents) if mirrored else prediction)
    found: Tensor = total / (2 * len(scales))
    return found


def hard_map(probability: Tensor, extent: tuple[int, int], size: tuple[int, int], threshold: float) -> Tensor:
    """(height, width) uint8 map of one image: the likeliest class of a pixel; ignored where that is too unlikely.

    Args:
        probability: (c, s, s) on its canvas.
        extent: width and height of the image there. size: those of the image itself.
        threshold: the least probability that counts.
    """
    inside = probability[None, :, : extent[1], : extent[0]]
    whole = F.interpolate(inside, size=(size[1], size[0]), mode="bilinear", align_corners=False)[0]
    likely, found = whole.max(0)
    return torch.where(likely >= threshold, found, IGNORE).to(torch.uint8).cpu()


def summary(counts: NDArray[np.int64], names: tuple[str, ...], seed: int) -> dict[str, Any]:
    """mIoU and the share of right pixels, with intervals, and the IoU of each class.

    Args:
        counts: (images, c, c), see `Confusion`. names: of the c classes.
    """
    weights = metrics.resamplings(len(counts), seed)
    resampled = np.tensordot(weights, counts, axes=1)
    shares = intersection_over_union(resampled)
    right = np.trace(resampled, axis1=1, axis2=2) / np.maximum(resampled.sum((1, 2)), 1)
    means = np.nanmean(shares, axis=1)
    return {
        "mIoU": float(means[0]),
        "mIoU_interval": metrics.interval(means),
        "pixels": float(right[0]),
        "pixels_interval": metrics.interval(right),
        "classes": {name: float(value) for name, value in zip(names, shares[0], strict=True) if not np.isnan(value)},
    }


def confusion_matrix(true: Tensor, predicted: Tensor, classes: int) -> NDArray[np.int64]:
    """(classes, classes) int64: pixels by true (first) and predicted class, ignored ones left out."""
    known = true != IGNORE
    codes = true[known].long() * classes + predicted[known].long()
    return np.asarray(torch.bincount(codes, minlength=classes**2).view(classes, classes).numpy())


def intersection_over_union(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., c, c) counts -> (..., c) IoU of each class, NaN of one that is neither there nor predicted."""
    both = np.diagonal(counts, axis1=-2, axis2=-1)
    either = counts.sum(-1) + counts.sum(-2) - both
    return np.asarray(np.where(either > 0, both / np.maximum(either, 1), np.nan))
