"""A detector asked at several scales: each image larger, smaller and mirrored, all predictions merged by NMS."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ktransfer.data.loader import ImageLoader
from ktransfer.detection import canvas
from ktransfer.detection.data import Detection
from ktransfer.detection.detectors import Settings
from ktransfer.detection.predictions import Prediction, detect
from ktransfer.training.batch import Source

STRIDE = 32  # sides are multiples of it, so that cells lie in a map as in training


class Mirrored:
    """Canvases whose images are mirrored in their places, read as `ImageLoader` are.

    Args:
        extents: (n, 2) of the images on their canvases, whole numbers (`canvas.extents`).
    """

    def __init__(self, source: ImageLoader, extents: Tensor) -> None:
        self.source, self.extents = source, extents

    def batches(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """See `ImageLoader.batches`."""
        for chosen, pixels, valid, wait in self.source.batches(rows):
            yield chosen, canvas.mirror(pixels, self.extents[chosen].to(pixels.device)), valid, wait


def sides(size: int, scales: Sequence[float]) -> list[int]:
    """The sides of the canvases in pixels, each once, for factors of `size`: whole strides, but for `size` itself."""
    found = [size if scale == 1 else max(1, round(size * scale / STRIDE)) * STRIDE for scale in scales]
    return list(dict.fromkeys(found))


def detect_at(
    model: nn.Module,
    data: Detection,
    source: ImageLoader,
    rows: Tensor,
    size: int,
    settings: Settings,
    device: torch.device,
    scales: Sequence[float],
    label: str = "detect",
) -> tuple[dict[int, Prediction], dict[int, str]]:
    """As `predictions.detect`, over all scales and their mirror images; of (1.0,) alone that itself, nothing mirrored.

    Of boxes of one class that overlap by more than `settings.overlap` the one of the highest score stays, whatever its
    view; then the best `settings.most` of an image. No score is averaged.

    Args:
        source: canvases of `size` pixels; those of other sizes are read anew from its images.

    Returns:
        Row -> prediction, and row -> reason of the broken images, whatever canvas they were wanted for.
    """
    if tuple(scales) == (1.0,):
        return detect(model, data, source, rows, size, settings, device, label=label), source.broken
    every: dict[int, list[Prediction]] = {}
    broken: dict[int, str] = {}
    for side in sides(size, scales):
        own = source if side == size else canvas.canvases(data, side, source.workers, source.cache, source.device)
        views: tuple[Source, ...] = (own, Mirrored(own, canvas.extents(data, side)))
        for mirrored, view in enumerate(views):
            name = f"{label} at {side}{', mirrored' if mirrored else ''}"
            for row, prediction in detect(model, data, view, rows, side, settings, device, label=name).items():
                every.setdefault(row, []).append(
                    _mirrored(prediction, float(data.sizes[row, 0])) if mirrored else prediction
                )
        broken |= own.broken
    return {row: _merged(found, settings) for row, found in every.items()}, broken


def _mirrored(prediction: Prediction, width: float) -> Prediction:
    left, top, right, bottom = prediction.boxes.unbind(1)
    return prediction._replace(boxes=torch.stack([width - right, top, width - left, bottom], dim=1))


def _merged(found: list[Prediction], settings: Settings) -> Prediction:
    whole = Prediction(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    kept = batched_nms(whole.boxes, whole.scores, whole.labels, settings.overlap)[: settings.most]
    return Prediction(*(part[kept] for part in whole))
