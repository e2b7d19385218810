"""Detection from the network's trunk: how well boxes are found after training on a labelled set.

Protocol `detect/2`, after the detection of the paper and of the transfer studies (docs/papers.md),
made short. Faster R-CNN (`--detector retinanet` for the other) on the arm's convolutions, heads
random; AlexNet and VGG-16 with one map by default, `--neck p2-p6` or `p3-p7` puts a pyramid on any trunk. Images lie
on squares of `--canvas` pixels, the long side resized, the rest padded; in training they are scaled by a factor drawn
from `--jitter`, cropped, mirrored half the time; at test they are seen once, or with `--test-scales` at several scales
and mirrored. Columns (`--trunk`): `frozen`, the trunk stays as it is, batch norms with it; `partial`, the layers of
`--freeze` do; `full`, all learns. SGD with momentum, one learning rate for all (`--lr`), the weights at the end:
nothing is chosen by the test split, which is read once. Scores from `--threshold` on, NMS at IoU 0.5, at most 100
boxes an image. AP, AP50, AP75 by COCO's rules (faster-coco-eval), VOC07 by the 11-point rule; intervals: 1.96
deviations over 200 resamplings of the test images. Crowd boxes are neither learned nor counted, VOC's difficult ones
learned alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktransfer import files, networks
from ktransfer.config import chosen
from ktransfer.data.dataset import check_broken
from ktransfer.data.loader import ImageLoader, readable
from ktransfer.detection import canvas, detectors, losses, metrics, trunks
from ktransfer.detection.data import Detection
from ktransfer.detection.detectors import Settings
from ktransfer.detection.frames import OBEY
from ktransfer.detection.opening import open_detection
from ktransfer.detection.scales import detect_at
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.number_list import number_list
from ktransfer.training import loop
from ktransfer.training.batch import Loss
from ktransfer.training.options import LoopOptions, TrainOptions

from ..arms import Arm
from ..config import EvalConfig
from ..enough import boxed
from ..result import Result, broken_lines, result_of

PROTOCOL = "detect/2"
TITLE = "detection"
MEASURES = {"AP": "AP %", "AP50": "AP50 %", "AP75": "AP75 %", "VOC07": "VOC07 mAP %"}
NOTE = "{counts}detector, canvas, schedule and least score stand in its json."
enough = boxed
COLUMNS = ("frozen", "partial", "full")
SAMPLED = 64  # boxes of an image that the heads of Faster R-CNN learn from, as in Fast R-CNN
PROPOSALS = 300


def open_data(spec: str, exif: str = OBEY) -> tuple[Detection, Detection]:
    """Training and test split with boxes."""
    return open_detection(spec, exif=exif)


def check(evaluated: list[Network], splits: tuple[Detection, Detection], config: EvalConfig, run: Path) -> None:
    """Find a missing extra, wrong options, and networks that are no trunks of detectors.

    Raises:
        UsageError: one line.
    """
    metrics.need_extra()
    scales(config)
    test_scales(config)
    columns(config)
    losses.check_batches(config, config.batch)
    look(splits, config)
    for network in evaluated:
        for column in columns(config):
            trunk_of(Arm("", network, None), column, neck(network, config), config)


def evaluate(
    arm: Arm, splits: tuple[Detection, Detection], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """What detectors on one network's trunk reach, frozen and full."""
    sources = [canvas.canvases(split, config.canvas, config.workers, config.cache_images, device) for split in splits]
    rows = readable(sources[0], torch.arange(len(splits[0])), config.max_broken)

    def make(column: str, place: Path) -> tuple[dict[str, Any], dict[int, str]]:
        return _column(arm, column, splits, sources, rows, config, place, device)

    return by_column(arm, splits, config, folder, sources[0].broken, make)


def by_column(
    arm: Arm,
    splits: tuple[Detection, Detection],
    config: EvalConfig,
    folder: Path,
    broken: Mapping[int, str],
    make: Callable[[str, Path], tuple[dict[str, Any], dict[int, str]]],
) -> Result:
    """The columns of `--trunk`, each from its file where it was made before an interruption.

    Args:
        broken: row and reason of the training images that cannot be read.
        make: column and a folder for it -> its scores, and the broken images of the test split.
    """
    scores: dict[str, dict[str, Any]] = {}
    lines = dict.fromkeys(broken_lines(splits[0], broken))
    for column in columns(config):
        kept = folder / f"{column}.json"
        if not kept.is_file():
            found, wrong = make(column, folder / column)
            files.write_json(kept, {"scores": found, "broken": broken_lines(splits[1], wrong)})
        held = files.read_json(kept)
        scores[column] = held["scores"]
        lines |= dict.fromkeys(held["broken"])
    return result_of(arm.network, scores, list(lines))


def neck(network: Network, config: EvalConfig) -> str:
    """`--neck`, or where it is left open: one map for AlexNet and VGG, pyramids for others and for RetinaNet."""
    if config.neck != "auto":
        return config.neck
    if config.detector == "retinanet":
        return "p3-p7"
    return "single" if network.arch in networks.TRUNKS else "p2-p6"


def scales(config: EvalConfig) -> tuple[float, float]:
    """The range of `--jitter`.

    Raises:
        UsageError: not two positive numbers, the lower first.
    """
    found = number_list("--jitter", config.jitter, 0.05, 10, "0.8,1.2")
    if len(found) != 2 or found[0] > found[1]:
        raise UsageError(f"--jitter {config.jitter}: must be two numbers, the smaller first, such as 0.8,1.2")
    return found[0], found[1]


def look(splits: tuple[Detection, Detection], config: EvalConfig, outlines: bool = False) -> None:
    """Say which objects are too small for `--canvas`; UsageError where all are."""
    flag, size = f"--canvas {config.canvas}", config.canvas
    canvas.look(flag, splits[0], size, "training", scales(config)[1], outlines)
    canvas.look(flag, splits[1], size, "test", None, outlines)


def test_scales(config: EvalConfig) -> list[float]:
    """The factors of `--test-scales`.

    Raises:
        UsageError: they are not positive numbers.
    """
    return number_list("--test-scales", config.test_scales, 0.2, 5, "0.75,1,1.25")


def columns(config: EvalConfig) -> list[str]:
    """The columns of `--trunk`.

    Raises:
        UsageError: an unknown one, or `partial` and `--freeze` are not given together.
    """
    found = chosen("--trunk", config.trunk, COLUMNS, "column")
    if ("partial" in found) != (config.freeze is not None):
        raise UsageError("--trunk partial and --freeze LAYERS go together: give both or neither")
    return found


def trunk_of(arm: Arm, column: str, neck: str, config: EvalConfig) -> trunks.Trunk:
    """The trunk of one column of `--trunk`."""
    trunk = trunks.build(arm.network, arm.weights, neck, config.norm, config.seed)
    if column == "frozen":
        trunk.freeze()
    elif column == "partial":
        trunk.freeze([name.strip() for name in str(config.freeze).split(",")])
    return trunk


def train_column(
    model: nn.Module,
    loss: Loss,
    source: ImageLoader,
    rows: torch.Tensor,
    config: EvalConfig,
    folder: Path,
    device: torch.device,
    label: str,
) -> None:
    """Train what stands in one column of `--trunk`, in place, on (n,) rows of the training split."""
    options = TrainOptions(lr=config.lr, **{field.name: getattr(config, field.name) for field in fields(LoopOptions)})
    batches = partial(loop.epoch_batches, rows, config.batch, config.seed)
    loop.fit(model, loss, source, batches, options, folder, device, label)


def _column(
    arm: Arm,
    column: str,
    splits: tuple[Detection, Detection],
    sources: list[ImageLoader],
    rows: torch.Tensor,
    config: EvalConfig,
    folder: Path,
    device: torch.device,
) -> tuple[dict[str, Any], dict[int, str]]:
    """Train one detector and evaluate it: its scores, and the broken images of the test split."""
    train, test = splits
    trunk = trunk_of(arm, column, neck(arm.network, config), config)
    settings = Settings(config.detector, config.norm, sampled=SAMPLED, proposals=PROPOSALS, threshold=config.threshold)
    model = detectors.build(trunk, len(train.classes), config.canvas, settings, config.seed)
    loss = losses.detection_loss(losses.truth(train, config.canvas, device), trunk.how, config.seed, scales(config))
    label = f"detect {arm.name} {column}"
    train_column(model, loss, sources[0], rows, config, folder, device, label)
    everything = torch.arange(len(test))
    at = test_scales(config)
    found, broken = detect_at(model, test, sources[1], everything, config.canvas, settings, device, at, label)
    check_broken(broken, len(test), config.max_broken, test)
    about = {"threshold": config.threshold, "neck": neck(arm.network, config)}
    return metrics.scores(test, found, config.seed) | about, broken
