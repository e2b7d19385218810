"""Segmentation from the network's trunk: how well the class of every pixel is predicted after training on masks.

Protocol `segment/2`, after the FCN transfer of the paper (docs/papers.md: its settings are not known), made
short. torchvision's FCN head, fresh, on the deepest map of the arm's convolutions, enlarged bilinearly; no skips.
`--head deeplab` puts torchvision's DeepLab there, `--head fpn` a pyramid on C2..C5 whose maps are summed. Masks
are those of a VOCdevkit, or are drawn from COCO's polygons (smaller objects on top; crowds, padding and what has a box
alone are ignored), classes and background. Canvases, `--jitter`, mirroring, the columns `frozen` and `full`, SGD and
schedule as in `detect`; cross-entropy over all known pixels. The weights at the end are evaluated: nothing is chosen by
the test split, which is read once. mIoU is the mean over background and classes that are there or predicted, from one
confusion matrix over all test images at their own size; `pixels` the share of right ones. Intervals: 1.96
deviations over 200 resamplings of the test images.
"""

from pathlib import Path
from typing import Any

import torch

from ktransfer.data.dataset import check_broken
from ktransfer.data.loader import ImageLoader, readable
from ktransfer.detection import canvas, masks, segmentation
from ktransfer.detection.data import Detection
from ktransfer.detection.frames import OBEY
from ktransfer.detection.losses import check_batches
from ktransfer.detection.opening import open_detection
from ktransfer.errors import StageError
from ktransfer.networks import Network

from ..arms import Arm
from ..config import EvalConfig
from ..enough import masked
from ..result import Result
from .detect import by_column, columns, look, scales, train_column, trunk_of

PROTOCOL = "segment/2"
TITLE = "segmentation"
enough = masked
MEASURES = {"mIoU": "mIoU %", "pixels": "pixels right %"}
NOTE = "{counts}canvas and schedule stand in its json."


def open_data(spec: str, exif: str = OBEY) -> tuple[Detection, Detection]:
    """Training and test split with masks."""
    return open_detection(spec, masks=True, exif=exif)


def check(evaluated: list[Network], splits: tuple[Detection, Detection], config: EvalConfig, run: Path) -> None:
    """Find wrong options, data without masks, networks that are no trunks, and maps that do not fit into memory.

    Raises:
        UsageError: one line.
    """
    scales(config)
    columns(config)
    check_batches(config, config.batch)
    look(splits, config, True)
    for split in splits:
        masks.need_masks(split)
    masks.need_memory(f"--canvas {config.canvas}", len(splits[0]), config.canvas)
    for network in evaluated:
        for column in columns(config):
            trunk_of(Arm("", network, None), column, segmentation.HEADS[config.head], config)


def evaluate(
    arm: Arm, splits: tuple[Detection, Detection], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """What heads on one network's trunk reach, frozen and full."""
    sources = [canvas.canvases(split, config.canvas, config.workers, config.cache_images, device) for split in splits]
    rows = readable(sources[0], torch.arange(len(splits[0])), config.max_broken)
    maps, unmapped = masks.map_canvases(splits[0], config.canvas)
    check_broken(sources[0].broken | unmapped, len(splits[0]), config.max_broken, splits[0])

    def make(column: str, place: Path) -> tuple[dict[str, Any], dict[int, str]]:
        return _column(arm, column, splits, sources, rows, maps, config, place, device)

    return by_column(arm, splits, config, folder, sources[0].broken | unmapped, make)


def _column(
    arm: Arm,
    column: str,
    splits: tuple[Detection, Detection],
    sources: list[ImageLoader],
    rows: torch.Tensor,
    maps: torch.Tensor,
    config: EvalConfig,
    folder: Path,
    device: torch.device,
) -> tuple[dict[str, Any], dict[int, str]]:
    """Train one head and evaluate it: its scores, and the broken images and masks of the test split."""
    train, test = splits
    trunk = trunk_of(arm, column, segmentation.HEADS[config.head], config)
    model = segmentation.build(trunk, len(train.classes), config.norm, config.seed, config.head)
    edges = canvas.extents(train, config.canvas).to(device)
    label = f"segment {arm.name} {column}"
    loss = segmentation.segmentation_loss(maps, edges, trunk.how, config.seed, scales(config))
    train_column(model, loss, sources[0], rows, config, folder, device, label)
    found = segmentation.confusion(model, test, sources[1], config.canvas, device, label=label)
    broken = sources[1].broken | found.broken
    check_broken(broken, len(test), config.max_broken, test)
    if not found.counts.sum():
        raise StageError(f"{test.spec}: no pixel of the test split has a class; check its masks")
    return segmentation.summary(found.counts, ("background", *test.classes), config.seed), broken
