"""What `--patience` evaluates on: some of the labelled training images, from which no training of the run learns."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktransfer.detection import metrics
from ktransfer.detection.data import Detection, fraction, save_ids
from ktransfer.detection.detectors import Settings
from ktransfer.detection.predictions import detect
from ktransfer.errors import StageError, UsageError
from ktransfer.training.batch import Source
from ktransfer.training.stopping import Stopping

from ..config import SelftrainConfig
from .student import Student

IDS = "held-out.ids.json"
MEASURE = "held_out_AP"


def rows(labelled: Detection, config: SelftrainConfig) -> NDArray[np.int64]:
    """The rows of the labelled images that are held out, the same for teacher and students; none without patience.

    Raises:
        UsageError: there is no box in them, or none in the others.
    """
    if not config.patience:
        return np.zeros(0, np.int64)
    held = fraction(labelled, config.held_out, config.seed, config.stratified)
    others = np.setdiff1d(np.arange(len(labelled)), held)
    for own, what in ((held, "held-out"), (others, "other")):
        if not any((~labelled.objects[row].crowd).any() for row in own.tolist()):
            raise UsageError(
                f"--patience: no box among the {len(own)} {what} ones of {len(labelled)} labelled images; "
                "change --held-out, give more labelled images, or leave --patience out"
            )
    return held


def divided(good: Tensor, held: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Those of (n,) labelled rows that are learned from, and those that evaluate."""
    evaluating = torch.isin(good, torch.from_numpy(held))
    return good[~evaluating], good[evaluating]


def stopping(
    model: nn.Module,
    labelled: Detection,
    source: Source,
    evaluating: Tensor,
    config: SelftrainConfig,
    device: torch.device,
    folder: Path,
) -> Stopping | None:
    """COCO's average precision on the `evaluating` rows after each pass; their ids go to `folder`; None without
    patience.

    Args:
        model: a detector, or a `Student`, whose average is evaluated where there is one.
        source: canvases whose first rows are those of `labelled`.

    Raises:
        StageError: nothing is to be found in the images that can be read.
    """
    if not config.patience:
        return None
    if not any((~(one.crowd | one.difficult)).any() for one in (labelled.objects[row] for row in evaluating.tolist())):
        raise StageError(
            "--patience: no box in the held-out images that can be read; repair them, or change --held-out"
        )
    save_ids(folder / IDS, labelled, evaluating.numpy())
    settings = Settings(config.detector)

    def evaluate(model: nn.Module) -> dict[str, float]:
        predictions = detect(model, labelled, source, evaluating, config.size, settings, device, label="held out")
        found = metrics.coco_scores(labelled, predictions)
        return {MEASURE: found["AP"], "held_out_AP50": found["AP50"]}

    return Stopping(model.evaluated() if isinstance(model, Student) else model, evaluate, MEASURE, config.patience)


def result(model: nn.Module, early: Stopping | None) -> nn.Module:
    """The detector that a training was for, when it has ended."""
    if early:
        return early.network
    return model.result() if isinstance(model, Student) else model


def facts(early: Stopping | None, evaluating: Tensor) -> dict[str, Any]:
    """What the step's record says of it."""
    if early is None:
        return {}
    return {
        "held-out": len(evaluating),
        "passes": early.evaluated,
        "best pass": early.best_epoch,
        "held-out AP": round(early.best, 6),
    }
