"""Networks that tell the class of every pixel: an FCN on a trunk, its loss, and the mean IoU that it reaches."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from ktransfer import rng
from ktransfer.detection import canvas, trunks
from ktransfer.detection.data import Detection
from ktransfer.detection.masks import IGNORE, classes_of_pixels
from ktransfer.detection.trunks import Trunk
from ktransfer.errors import BrokenPicture
from ktransfer.progress import bar
from ktransfer.training.loop import Batch, Source


class Segmenter(nn.Module):
    """An FCN: torchvision's head on the deepest map, enlarged to the canvas: (b, 3, s, s) -> (b, classes + 1, s, s)."""

    def __init__(self, trunk: Trunk, head: nn.Module) -> None:
        super().__init__()
        self.backbone = trunk
        self.classifier = head

    def forward(self, x: Tensor) -> Tensor:
        """Logits; class 0 is the background."""
        maps = list(self.backbone(x).values())[-1]
        return F.interpolate(self.classifier(maps).float(), size=x.shape[-2:], mode="bilinear", align_corners=False)


def build(trunk: Trunk, classes: int, norm: str, seed: int) -> Segmenter:
    """An FCN for `classes` classes and background; its head is a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.torch_seed(seed, "detection/fcn", 0))
        return Segmenter(trunk, trunks.renormed(FCNHead(trunk.out_channels, classes + 1), norm))


def segmentation_loss(
    maps: Tensor, extents: Tensor, how: str, seed: int, scales: tuple[float, float] = (1.0, 1.0)
) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """Cross-entropy over all pixels that are not ignored, for `loop.fit`.

    Args:
        maps: (n, size, size) uint8 of `masks.map_canvases`, on any device.
        extents: (n, 2) of `canvas.extents`, on the device.
        how: normalisation, that of the trunk.
        scales: of the jitter; pictures are always mirrored half the time.
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
        logits = model(pixels)
        known = wanted != IGNORE
        # A sum over a count: a batch without a known pixel gives 0 and not NaN.
        total = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum") / known.sum().clamp(min=1)
        right = ((logits.argmax(1) == wanted) & known).sum() / known.sum().clamp(min=1)
        count = batch.valid.sum()
        return total, {"pixels_right": right * count, "count": count}

    return loss


class Confusion(NamedTuple):
    """Of m judged pictures.

    Attributes:
        rows: m rows.
        counts: (m, c, c) int64 pixels, by true class (first) and answered class.
        broken: row and reason of pictures whose maps are broken.
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
    """Answers at the pictures' own size against their maps; ignored pixels and broken pictures are left out."""
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
                except BrokenPicture as error:
                    broken[row] = str(error)
                    continue
                width, height = (int(side) for side in edges[row])
                whole = F.interpolate(logits[None, :, :height, :width], size=tuple(true.shape), mode="bilinear")
                rows.append(row)
                counts.append(confusion_matrix(true, whole[0].argmax(0).cpu(), classes))
    return Confusion(rows, np.stack(counts) if counts else np.zeros((0, classes, classes), np.int64), broken)


def confusion_matrix(true: Tensor, answered: Tensor, classes: int) -> NDArray[np.int64]:
    """(classes, classes) int64: pixels by true (first) and answered class, ignored ones left out."""
    known = true != IGNORE
    codes = true[known].long() * classes + answered[known].long()
    return np.asarray(torch.bincount(codes, minlength=classes**2).view(classes, classes).numpy())


def intersection_over_union(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., c, c) counts -> (..., c) IoU of each class, NaN of one that is neither there nor answered."""
    both = np.diagonal(counts, axis1=-2, axis2=-1)
    either = counts.sum(-1) + counts.sum(-2) - both
    return np.asarray(np.where(either > 0, both / np.maximum(either, 1), np.nan))
