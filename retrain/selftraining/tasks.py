"""What self-training is about, by `--task`: each is a module of this room with the same few names in it (`Task`)."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer.data.loader import ImageLoader
from ktransfer.detection.data import Detection
from ktransfer.detection.frames import OBEY
from ktransfer.errors import UsageError
from ktransfer.training.batch import Loss

from ..config import SelftrainConfig
from . import detecting, instances, joint, segmenting
from .parts import Shown
from .student import Weighing


class Task(Protocol):
    """Names of each module.

    NECKS: kind of network -> neck of its trunk. THINGS: what pseudo-labels are counted in, one and several. EVALUATED:
    settings that stand beside the scores.
    """

    NECKS: dict[str, str]
    THINGS: tuple[str, str]
    EVALUATED: tuple[str, ...]

    def kind(self, config: SelftrainConfig) -> str:
        """A key of NECKS."""

    def check(self, config: SelftrainConfig, labelled: int, other: int) -> None:
        """Find settings that are not for this task, or not for so many images."""

    def open_data(self, spec: str, exif: str = OBEY) -> tuple[Detection, Detection]:
        """Training and test part, of images as `exif` says (frames.py)."""

    def read(
        self, path: Path, other: Detection, labelled: Detection, config: SelftrainConfig
    ) -> tuple[Detection, NDArray[np.int64]]:
        """`other` with the pseudo-labels of a file, and the rows that it lists."""

    def count(self, data: Detection, row: int) -> NDArray[np.int64]:
        """(classes,) things of each class in an image."""

    def known(self, data: Detection, config: SelftrainConfig, device: torch.device) -> tuple[Any, dict[int, str]]:
        """The labels on canvases, as `losses` takes them, and row and reason of those that are broken."""

    def losses(
        self, known: Any, how: str, strength: str, seed: int, weighing: Weighing | None = None, split: int = 0, /
    ) -> Loss:
        """The loss of a teacher, or, with `weighing`, that of a student whose rows from `split` on are pseudo."""

    def draw(
        self, path: Path, data: Detection, known: Any, source: ImageLoader, strength: str, seed: int, rows: Tensor
    ) -> None:
        """The sheet of augmented images."""

    def label(self, path: Path, shown: Shown, rows: Tensor, about: dict[str, Any]) -> dict[str, int]:
        """Write what a teacher sees in (n,) rows; returns how much of what there is."""

    def evaluate(self, shown: Shown, label: str) -> dict[str, Any]:
        """Measures of the test part, NAME_interval beside each that tables show."""


RETINANET = ("focal_alpha", "focal_gamma", "huber_delta", "huber_weight")
BOXES = ("detector", "patience", "held_out", "jitter_filter", "soft_nms", *RETINANET)
STRANGE = {
    "detect": ("head", "scales"),
    "segment": (*BOXES, "anchor", "test_threshold"),
    "instance": (*BOXES, "head", "scales"),
}
"""Task -> settings that it does not read."""
OF_PSEUDO = ("pseudo", "threshold", "rounds", "adaptive", "jitter_filter", "empty")


def suited(config: SelftrainConfig) -> None:
    """Raise UsageError where a setting is given that the task, the detector or the methods would not read."""
    usual, methods = SelftrainConfig(), joint.methods(config)
    strange = [(name, f"--task {config.task}") for name in STRANGE[config.task]]
    if config.detector != "retinanet":
        strange += [(name, f"--detector {config.detector}") for name in RETINANET]
    if joint.SELF not in methods:
        strange += [(name, "--methods joint alone") for name in OF_PSEUDO]
    if config.task == "segment" and config.head != "fpn":
        strange.append(("channels", f"--head {config.head}"))
    if config.balance == "plain":
        strange.append(("decay", "--balance plain"))
    if not config.patience:
        strange.append(("held_out", "trainings without --patience"))
        if config.ids:  # which are chosen already; a share of 1 keeps the mix
            strange.append(("stratified", "--ids without --patience"))
    for name, where in strange:
        if getattr(config, name) != getattr(usual, name):
            raise UsageError(f"--{name.replace('_', '-')}: is not for {where}; leave it out")
    for name in (joint.NAME, joint.BOTH):
        if name in methods and config.task != "detect":
            raise UsageError(f"--methods {name}: is not for --task {config.task}; leave it out")


TASKS: dict[str, Task] = {"detect": detecting, "segment": segmenting, "instance": instances}
