"""What `--patience` judges by: some of the labelled training pictures, from which no training of the run learns."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktransfer.detection import metrics
from ktransfer.detection.answers import detect
from ktransfer.detection.data import Detection, fraction, save_ids
from ktransfer.detection.detectors import Settings
from ktransfer.errors import StageError, UsageError
from ktransfer.training.batch import Source
from ktransfer.training.stopping import Stopping

from ..config import SelftrainConfig
from .student import Student

IDS = "held-out.ids.json"
MEASURE = "held_out_AP"


def rows(labelled: Detection, config: SelftrainConfig) -> NDArray[np.int64]:
    """The rows of the labelled pictures that are held out, the same for teacher and students; none without patience.

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
                f"--patience: no box among the {len(own)} {what} ones of {len(labelled)} labelled pictures; "
                "change --held-out, give more labelled pictures, or leave --patience away"
            )
    return held


def divided(good: Tensor, held: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Those of (n,) labelled rows that are learned from, and those that judge."""
    judging = torch.isin(good, torch.from_numpy(held))
    return good[~judging], good[judging]


def stopping(
    model: nn.Module,
    labelled: Detection,
    source: Source,
    judging: Tensor,
    config: SelftrainConfig,
    device: torch.device,
    folder: Path,
) -> Stopping | None:
    """COCO's average precision on the `judging` rows after each pass; their ids go to `folder`; None without patience.

    Args:
        model: a detector, or a `Student`, whose average is judged where there is one.
        source: canvases whose first rows are those of `labelled`.

    Raises:
        StageError: nothing is to be found in the pictures that can be read.
    """
    if not config.patience:
        return None
    if not any((~(one.crowd | one.difficult)).any() for one in (labelled.objects[row] for row in judging.tolist())):
        raise StageError("--patience: no box in the held-out pictures that can be read; mend them or change --held-out")
    save_ids(folder / IDS, labelled, judging.numpy())
    settings = Settings(config.detector)

    def judge(model: nn.Module) -> dict[str, float]:
        answers = detect(model, labelled, source, judging, config.size, settings, device, label="held out")
        found = metrics.coco_scores(labelled, answers)
        return {MEASURE: found["AP"], "held_out_AP50": found["AP50"]}

    return Stopping(model.judged() if isinstance(model, Student) else model, judge, MEASURE, config.patience)


def result(model: nn.Module, early: Stopping | None) -> nn.Module:
    """The detector that a training was for, when it has ended."""
    if early:
        return early.network
    return model.result() if isinstance(model, Student) else model


def facts(early: Stopping | None, judging: Tensor) -> dict[str, Any]:
    """What the step's record says of it."""
    if early is None:
        return {}
    return {
        "held-out": len(judging),
        "passes": early.judged,
        "best pass": early.best_epoch,
        "held-out AP": round(early.best, 6),
    }
