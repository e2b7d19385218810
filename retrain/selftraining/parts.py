"""What the trainings of a self-training share: its images, those that must not be learned from, and their files."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader
from ktransfer.detection import canvas, saved
from ktransfer.detection.data import Detection, save_ids, subset
from ktransfer.detection.saved import Described
from ktransfer.plan import PlannedStep
from ktransfer.progress import say
from ktransfer.run import Step, begin, changes, input_hash
from ktransfer.training import checkpoint
from ktransfer.training.stopping import Stopping

from ..config import SelftrainConfig
from . import boxes, early_stopping

STAGE = "selftrain"
SHEET = "augmented.png"
PARTS = ".parts"  # ending of the folder of what a labelling has so far


class Data(NamedTuple):
    """The images of a self-training: with boxes, without, and those that evaluate."""

    labelled: Detection
    unlabelled: Dataset
    test: Detection


class Work(NamedTuple):
    """What all steps of a self-training share.

    Attributes:
        steps: those that were planned, by name.
        detector: what each training makes.
        init: the weights that its backbone begins with, maybe still to be made; None for random ones.
        foreign: whether those were made elsewhere.
    """

    config: SelftrainConfig
    data: Data
    device: torch.device
    steps: dict[str, PlannedStep]
    detector: Described
    init: Path | None
    foreign: bool

    def new_detector(self) -> nn.Module:
        """The detector before it learns."""
        return saved.make(self.detector, self.config.seed, self.init, self.foreign)

    def beginning(self) -> dict[str, str]:
        """The hash of the weights that the backbone begins with, by now made."""
        return {"init": input_hash(self.init)} if self.init else {}


def begun(run: Path, work: Work, name: str, inputs: dict[str, str], outputs: list[str]) -> AbstractContextManager[Step]:
    """A step, opened.

    Args:
        inputs: those that were not known when it was planned.
    """
    step = work.steps[name]
    inputs = step.inputs | inputs
    again = step.cheap and bool(changes(run, STAGE, name, step.settings, inputs))
    return begin(run, STAGE, name, step.settings, inputs, outputs, again, str(work.device))


class Shown(NamedTuple):
    """A trained network and the images that it is shown, on canvases of its own size."""

    model: nn.Module
    described: Described
    data: Detection
    source: ImageLoader
    config: SelftrainConfig
    device: torch.device


def show(weights: Path, data: Detection, config: SelftrainConfig, device: torch.device) -> Shown:
    """Show images, each once, to the network of a file."""
    model, described = saved.load(weights)
    source = canvas.canvases(data, described.size, config.workers, cache="off")
    return Shown(model.to(device), described, data, source, config, device)


def tested(data: Data, name: str) -> NDArray[np.int64]:
    """The unlabelled images that the test split has too: they must not be learned from."""
    found = boxes.shared(data.unlabelled, data.test)
    if len(found):
        say(f"{name}: {len(found)} of the unlabelled images are in the test split too, and are left out")
    return found


def held_out(config: SelftrainConfig, data: Data, name: str) -> NDArray[np.int64]:
    """The unlabelled images that are held out too: pseudo-labels or classes would teach these as well."""
    held = early_stopping.rows(data.labelled, config)
    found = boxes.shared(data.unlabelled, subset(data.labelled, held)) if len(held) else held
    if len(found):
        say(f"{name}: {len(found)} of the unlabelled images are held out, and are left out")
    return found


def left_out(config: SelftrainConfig, data: Data, name: str) -> NDArray[np.int64]:
    """The rows of `tested` and of `held_out`."""
    return np.union1d(tested(data, name), held_out(config, data, name))


def finish(
    step: Step,
    name: str,
    data: Data,
    images: Detection,
    broken: Mapping[int, str],
    model: nn.Module,
    described: Described,
    early: Stopping | None,
    facts: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights of a training that has ended, the ids of its labelled images, and its record.

    Args:
        images: all that were learned from. broken: row and reason of some of them.
        early: what may have stopped the training.
        facts: of the record, and said. more: of the record alone.
    """
    folder, ids = step.folder / name, step.folder / f"{name}.ids.json"
    weights = folder / "model.safetensors"
    saved.save(weights, early_stopping.result(model, early), described)
    save_ids(ids, data.labelled, np.arange(len(data.labelled)))
    made = [weights, folder / SHEET, ids, *folder.glob(early_stopping.IDS)]
    reasons = [f"{images.keys[row]}: {reason}" for row, reason in broken.items()]
    step.finish(made, broken=reasons, result={**facts, **(more or {})})
    checkpoint.remove(folder)
    say(f"{name}: done; {', '.join(f'{number} {what}' for what, number in facts.items())}; {weights}")
