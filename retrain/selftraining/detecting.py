"""Self-training of detectors (`--task detect`), see `tasks.Task`: labels are boxes, pseudo-labels a COCO file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer.data.dataset import check_broken
from ktransfer.data.loader import ImageLoader
from ktransfer.detection import losses as truths
from ktransfer.detection import metrics
from ktransfer.detection.data import Detection, Outline
from ktransfer.detection.frames import OBEY
from ktransfer.detection.losses import Truth
from ktransfer.detection.opening import open_detection
from ktransfer.detection.predictions import Prediction, detect
from ktransfer.detection.sheet import draw_augmented
from ktransfer.files import read_json

from ..config import SelftrainConfig
from . import box_jitter, boxes
from .parts import PARTS, Shown
from .student import losses as losses

NECKS = {"retinanet": "p3-p7", "fasterrcnn": "p2-p6"}
THINGS = "box", "boxes"
EVALUATED: tuple[str, ...] = ("test_threshold",)
AT_ONCE = 16  # images that the teacher looks at together
PART = 256 * AT_ONCE  # images whose predictions are kept together
Labels = tuple[Mapping[int, Prediction], Mapping[int, Sequence[Outline]] | None, dict[str, int]]
"""Row -> prediction, row -> outlines where there are some, and how much of what there is."""


def kind(config: SelftrainConfig) -> str:
    """The detector."""
    return config.detector


def check(config: SelftrainConfig, labelled: int, other: int) -> None:
    """Nothing more can be wrong."""


def open_data(spec: str, exif: str = OBEY) -> tuple[Detection, Detection]:
    """Training and test split with boxes; UsageError with the install line where the extra is missing."""
    metrics.need_extra()
    return open_detection(spec, exif=exif)


def read(
    path: Path, other: Detection, labelled: Detection, config: SelftrainConfig
) -> tuple[Detection, NDArray[np.int64]]:
    """`other` with the pseudo-boxes that reach the threshold, see `boxes.read`."""
    threshold: float | NDArray[np.float64] = config.threshold
    if config.adaptive:
        threshold = boxes.adaptive_thresholds(labelled, path, other, config.threshold)
    return boxes.read(path, other, threshold)


def count(data: Detection, row: int) -> NDArray[np.int64]:
    """(classes,) boxes of each class in an image."""
    return np.array(boxes.count((data.objects[row],), len(data.classes)), np.int64)


def known(data: Detection, config: SelftrainConfig, device: torch.device) -> tuple[Truth, dict[int, str]]:
    """The boxes on canvases; none is broken."""
    return truths.truth(data, config.size, device), {}


def draw(
    path: Path, data: Detection, known: Truth, source: ImageLoader, strength: str, seed: int, rows: Tensor
) -> None:
    """Images with their boxes, plain and augmented."""
    draw_augmented(path, data, source, strength, seed, rows)


def label(path: Path, shown: Shown, rows: Tensor, about: dict[str, Any]) -> dict[str, int]:
    """Write the boxes that a teacher sees, with scores from the threshold on."""
    model, described, data, source, config, device = shown
    settings = replace(described.settings, threshold=config.threshold, soft=config.soft_nms)

    def label_part(chosen: Tensor, words: str) -> Labels:
        found = detect(model, data, source, chosen, described.size, settings, device, AT_ONCE, label=words)
        facts = {"images": len(found)}
        if config.jitter_filter:
            spread = box_jitter.spreads(model, data, source, found, described.size, settings, device, config.seed)
            found, facts["boxes that move, left out"] = box_jitter.without_moving(found, spread, config.jitter_filter)
        return found, None, facts | {"boxes": sum(len(prediction.scores) for prediction in found.values())}

    if config.jitter_filter:
        about = about | {"jitter_filter": config.jitter_filter}
    return in_parts(path, shown, rows, about, label_part)


def in_parts(
    path: Path, shown: Shown, rows: Tensor, about: dict[str, Any], label_part: Callable[[Tensor, str], Labels]
) -> dict[str, int]:
    """Write what `label_part` finds in (n,) rows by `boxes.write`: part by part, which are joined at the end.

    Parts that lie there already are kept, so that a labelling that was killed goes on.
    """
    data, source, chunks = shown.data, shown.source, rows.split(PART)
    parts = [path.with_suffix(PARTS) / f"{number:06d}.json" for number in range(len(chunks))]
    for number, (part, chosen) in enumerate(zip(parts, chunks, strict=True), 1):
        if part.is_file():
            listed = {one["id"] for one in read_json(part)["images"]}
            lost = [row for row in chosen.tolist() if data.ids[row] not in listed]
            for _ in source.batches(iter(torch.tensor(lost, dtype=torch.int64).split(AT_ONCE))):
                pass  # the source now knows why these could not be read
            continue
        found, outlines, facts = label_part(
            chosen, f"predict {path.stem}, {number} of {len(parts)}" if len(parts) > 1 else f"predict {path.stem}"
        )
        boxes.write(part, data, found, facts, outlines)
    check_broken(source.broken, len(rows), shown.config.max_broken, data)
    return boxes.join(path, parts, about)


def evaluate(shown: Shown, label: str) -> dict[str, Any]:
    """Average precision."""
    model, described, test, source, config, device = shown
    predicting = replace(described.settings, threshold=config.test_threshold, soft=config.soft_nms)
    rows = torch.arange(len(test))
    found = detect(model, test, source, rows, described.size, predicting, device, label=label)
    check_broken(source.broken, len(rows), config.max_broken, test)
    return metrics.scores(test, found, config.seed)
