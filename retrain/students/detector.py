"""A detector or segmenter to be used: objects of one image, or of many as COCO's json and as drawings."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ktransfer import files
from ktransfer.data.dataset import UNKNOWN, Dataset
from ktransfer.data.loader import ImageLoader
from ktransfer.detection import canvas, masks, predictions, segmentation
from ktransfer.detection.data import Detection, Outline
from ktransfer.detection.frames import OBEY
from ktransfer.detection.predictions import Prediction
from ktransfer.detection.saved import Described
from ktransfer.errors import BrokenImage
from ktransfer.progress import bar

from ..selftraining import boxes
from .classifier import pixels_of

DRAWN = 0.5
"""Lowest score of what is drawn, where none is given."""


class Seen(NamedTuple):
    """What is in one image, m objects, the most certain first; of a segmenter one a class.

    Attributes:
        boxes: (m, 4) float32, x0 y0 x1 y1 in pixels of the image.
        scores: (m,) float32; of a segmenter the mean probability of the pixels.
        labels: names of the classes.
        masks: (m, height, width) bool, None of a detector without masks.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: tuple[str, ...]
    masks: NDArray[np.bool_] | None


class Named(NamedTuple):
    """The classes of a detector, as COCO's json numbers them."""

    classes: tuple[str, ...]
    category_ids: tuple[int | float | str, ...]


class Detector:
    """A trained detector, instance segmenter or segmenter (`described.settings.kind`) on a device."""

    def __init__(self, model: nn.Module, described: Described, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.described = described
        self.device = device
        self.segments = described.settings.kind in segmentation.HEADS
        self.masked = self.segments or described.settings.kind == "maskrcnn"

    def predict(self, image: "str | Path | Image.Image | NDArray[np.uint8]") -> Seen:
        """The objects of one image.

        Args:
            image: a file, an image of Pillow, or (height, width, 3) uint8 RGB.

        Raises:
            BrokenImage: it cannot be read.
            UsageError: it is an array of another shape or type.
        """
        pixels = pixels_of(image, None, self.described.exif == OBEY)  # whole, as boxes are in its pixels
        data = self.opened(
            Dataset("image", "image", ("image",), np.array([UNKNOWN], np.int32), (), "", lambda *_: pixels)
        )
        found, outlines = self.see(canvas.canvases(data, self.described.size, 1, cache="off"), data, 1)
        one = found[0]
        names = tuple(self.described.classes[label] for label in one.labels.tolist())
        shapes = None if outlines is None else np.array([masks.decoded(mask) for mask in _lengths(outlines[0])], bool)
        if shapes is not None and not len(shapes):
            shapes = np.zeros((0, *pixels.shape[:2]), bool)
        return Seen(one.boxes.numpy(), one.scores.numpy(), names, shapes)

    def opened(self, data: Dataset) -> Detection:
        """Images as detectors take them, with the classes of this one."""
        classes = self.described.classes
        return boxes.without_boxes(data, Named(classes, tuple(range(1, len(classes) + 1))))

    def see(
        self, source: ImageLoader, data: Detection, batch: int
    ) -> tuple[dict[int, Prediction], dict[int, Sequence[Outline]] | None]:
        """Row -> objects, and their masks where the network has some; broken images are left out."""
        outlines: dict[int, Sequence[Outline]] | None = {} if self.masked else None
        if outlines is not None and self.segments:
            return _segment(self, source, data, batch, outlines), outlines
        rows, made = torch.arange(len(data)), self.described
        size, settings = made.size, made.settings
        found = predictions.detect(
            self.model, data, source, rows, size, settings, self.device, batch, "predict", outlines
        )
        return found, outlines

    def logits(self, pixels: Tensor, sides: Tensor) -> Tensor:
        """Those of a segmenter: (b, 3, s, s) uint8 canvases, (b, 2) float32 extents -> (b, classes + 1, s, s)."""
        found: Tensor = self.model(canvas.normalise(pixels, sides, self.model.backbone.how))  # type: ignore[union-attr,arg-type]
        return found


def write(
    detector: Detector,
    images: Dataset,
    out: Path,
    draw: Path | None,
    threshold: float | None,
    batch: int,
    workers: int,
) -> dict[int, str]:
    """Write COCO's json of all images and, into the folder `draw`, each with its objects.

    Args:
        threshold: lowest score; if not given, the detector's own, and `DRAWN` for the drawings.

    Returns:
        Row -> reason of the images that are broken.
    """
    data = detector.opened(images)
    source = canvas.canvases(data, detector.described.size, workers, cache="off", device=detector.device)
    found, outlines = detector.see(source, data, batch)
    if threshold is not None:
        found, outlines = _above(found, outlines, threshold)
    boxes.write(out, data, found, {"description": "predicted by ktransfer"}, outlines)
    if draw is not None:
        found, outlines = _above(found, outlines, DRAWN if threshold is None else threshold)
        _draw_all(draw, data, found, outlines)
    return source.broken


@torch.no_grad()
def _segment(
    detector: Detector, source: ImageLoader, data: Detection, batch: int, outlines: dict[int, Sequence[Outline]]
) -> dict[int, Prediction]:
    """One object for each class that some pixel has, in the order of their scores."""
    found: dict[int, Prediction] = {}
    edges = canvas.extents(data, detector.described.size)
    with bar(len(data), "predict") as shown:
        for chosen, pixels, valid, _ in source.batches(iter(torch.arange(len(data)).split(batch))):
            shown.update(len(chosen))
            kept = chosen[valid]
            if not len(kept):
                continue
            sides = edges[kept].to(detector.device)
            canvases = pixels[valid.to(pixels.device)].to(detector.device)
            found_logits = detector.logits(canvases, sides)
            for row, logits in zip(kept.tolist(), found_logits, strict=True):
                width, height = (int(side) for side in edges[row])
                size = (int(data.sizes[row, 1]), int(data.sizes[row, 0]))
                whole = F.interpolate(logits[None, :, :height, :width], size=size, mode="bilinear")[0]
                found[row], outlines[row] = regions(whole.softmax(0).cpu())
    return found


def regions(probability: Tensor) -> tuple[Prediction, list[Outline]]:
    """The pixels of each class as one object with its box, its mean probability and its mask.

    Args:
        probability: (classes + 1, height, width); class 0 is the background.
    """
    likely, label = probability.max(0)
    parts: list[tuple[float, int, list[float], Outline]] = []
    for number in label.unique().tolist():
        if number:
            mask = label == number
            down, across = mask.nonzero().unbind(1)
            box = [int(across.min()), int(down.min()), int(across.max()) + 1, int(down.max()) + 1]
            parts.append(
                (float(likely[mask].mean()), number - 1, [float(side) for side in box], masks.encoded(mask.numpy()))
            )
    parts.sort(key=lambda part: -part[0])
    prediction = Prediction(
        torch.tensor([part[2] for part in parts]).view(-1, 4),
        torch.tensor([part[0] for part in parts]),
        torch.tensor([part[1] for part in parts], dtype=torch.int64),
    )
    return prediction, [part[3] for part in parts]


def _above(
    found: dict[int, Prediction], outlines: dict[int, Sequence[Outline]] | None, threshold: float
) -> tuple[dict[int, Prediction], dict[int, Sequence[Outline]] | None]:
    kept = {row: one.scores >= threshold for row, one in found.items()}
    chosen = {row: Prediction(*(part[kept[row]] for part in one)) for row, one in found.items()}
    if outlines is None:
        return chosen, None
    return chosen, {
        row: [own[place] for place in kept[row].nonzero().flatten().tolist()] for row, own in outlines.items()
    }


def _draw_all(
    folder: Path, data: Detection, found: dict[int, Prediction], outlines: dict[int, Sequence[Outline]] | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with bar(len(found), "draw") as shown:
        for row, one in found.items():
            shown.update(1)
            try:
                pixels = torch.from_numpy(data.read(row, None).copy()).permute(2, 0, 1)
            except BrokenImage:  # it was whole a moment ago
                continue
            image = to_pil_image(drawing(pixels, one, data.classes, None if outlines is None else outlines[row]))
            # Numbered, as keys of a list may lead anywhere.
            path = folder / f"{row:06d}-{Path(data.keys[row]).stem[:60]}.png"
            files.write_whole(path, partial(image.save, format="PNG"))


def drawing(pixels: Tensor, one: Prediction, classes: tuple[str, ...], outlines: Sequence[Outline] | None) -> Tensor:
    """(3, height, width) uint8 with masks, boxes, names and scores over it."""
    if not len(one.scores):
        return pixels
    colours = [tuple(int(part) for part in masks.colours()[label + 1]) for label in one.labels.tolist()]
    if outlines is not None:
        shapes = torch.from_numpy(np.array([masks.decoded(mask) for mask in _lengths(outlines)], bool))
        pixels = draw_segmentation_masks(pixels, shapes, alpha=0.5, colors=colours)
    names = [
        f"{classes[label]} {score:.2f}" for label, score in zip(one.labels.tolist(), one.scores.tolist(), strict=True)
    ]
    width = max(1, min(pixels.shape[1:]) // 160)
    drawn: Tensor = draw_bounding_boxes(pixels, one.boxes, labels=names, colors=colours, width=width)
    return drawn


def _lengths(outlines: Sequence[Outline]) -> list[dict[str, object]]:
    """Those of predictions are run lengths, all of them."""
    return [mask for mask in outlines if isinstance(mask, dict)]
