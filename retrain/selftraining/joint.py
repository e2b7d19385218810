"""Joint training: a detector learns the labelled images while its trunk also learns to classify others.

After Zoph et al. (docs/papers.md), in the setting of self-training: half of each batch are labelled
images, half such as have a class of their own instead of pseudo-boxes, both augmented equally, and the two losses are
weighed as those of a student. Where the classifier sits is not known: here it is one linear layer on the mean of the
trunk's deepest map. It is thrown away at the end; what is written is a detector like the teacher.

With self-training at once (`both`), the other half has pseudo-boxes and a class each, and with L_h, L_p, L_c the losses
on labelled boxes, pseudo-boxes and classes, mean() their moving averages and weight a,

    L = (L_h + a * mean(L_h) / mean(L_p) * L_p + a * mean(L_h) / mean(L_c) * L_c) / (1 + 2 * a)
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import rng
from ktransfer.config import chosen
from ktransfer.data.dataset import UNKNOWN, Dataset
from ktransfer.data.loader import readable
from ktransfer.detection import canvas, detectors
from ktransfer.detection.data import subset
from ktransfer.detection.losses import truth
from ktransfer.detection.sheet import draw_augmented
from ktransfer.detection.strengths import Boxed, augment
from ktransfer.errors import StageError, UsageError
from ktransfer.training import loop
from ktransfer.training.batch import Batch, Loss

from ..config import SelftrainConfig
from . import boxes, early_stopping, student
from .parts import SHEET, Data, Work, begun, finish, left_out
from .student import Student, Weighing

NAME, SELF, BOTH = "joint", "self", "both"
SHOWN = 4  # images of either kind on the sheet


class Joint(Student):
    """A student whose trunk also classifies images: with `classify` (b, 3, s, s) -> logits (b, classes)."""

    def __init__(
        self, detector: nn.Module, classes: int, seed: int, average: nn.Module | None = None, decay: float = 0.0
    ) -> None:
        super().__init__(detector, average, decay)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(rng.torch_seed(seed, "selftrain/classifier", 0))
            self.classifier = nn.Linear(self.eval()._pooled(torch.zeros(1, 3, 64, 64)).shape[1], classes)
        self.train()

    def forward(self, *given: Any, classify: bool = False) -> Any:
        """What the detector says in training, or the classes."""
        return self.classifier(self._pooled(*given)) if classify else self.detector(*given)

    def _pooled(self, pixels: Tensor) -> Tensor:
        """(b, channels) the mean of the trunk's deepest map."""
        trunk: Any = self.detector.backbone
        found: Tensor = trunk.body(pixels)
        return found.mean((2, 3))


class Both(Joint):
    """A student that learns pseudo-boxes and classes at once."""

    told: Tensor

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.register_buffer("told", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def remember_told(self, told: Tensor, decay: float) -> Tensor:
        """Take a loss on classes into its moving average, after `remember`; returns mean(L_h) / mean(L_c)."""
        self.told.mul_(decay).add_((1 - decay) * told.detach().double())
        return (self.human / self.told.clamp(min=1e-12 * self.weight)).float()


def methods(config: SelftrainConfig) -> list[str]:
    """What `--methods` lists.

    Raises:
        UsageError: something else, or `both` without `self`.
    """
    found = chosen("--methods", config.methods, (SELF, NAME, BOTH), "method")
    if BOTH in found and SELF not in found:
        raise UsageError(f"--methods {config.methods}: both needs the pseudo-boxes of self; give self,both")
    return found


def check(config: SelftrainConfig, others: Dataset) -> None:
    """Find images without classes where these are to be learned.

    Raises:
        UsageError: one line.
    """
    wanted = [name for name in (NAME, BOTH) if name in methods(config)]
    if not wanted:
        return
    if len(np.unique(others.targets[others.targets != UNKNOWN])) < 2:
        named = f"{config.unlabelled}: has" if config.unlabelled else "selftrain: the images without boxes have"
        raise UsageError(
            f"{named} no classes for --methods {wanted[0]}; name images in class folders with --unlabelled"
        )


def classes(data: Data) -> dict[str, str]:
    """The hash of the classes that are learned: a list can give its images others."""
    held = data.unlabelled
    return {"classes": hashlib.sha256(held.targets.tobytes() + repr(held.classes).encode()).hexdigest()}


def train(run: Path, work: Work) -> Path:
    """The training, as a step of selftrain; the path of its detector.

    Raises:
        StageError: none of the images of either kind can be read.
    """
    config, data, device = work.config, work.data, work.device
    with begun(run, work, NAME, work.beginning(), [NAME, f"{NAME}.ids.json"]) as step:
        folder, weights = step.folder / NAME, step.folder / NAME / "model.safetensors"
        if step.done:
            return weights
        targets, split, seed = data.unlabelled.targets, len(data.labelled), config.seed + 1
        listed = np.setdiff1d(np.flatnonzero(targets != UNKNOWN), left_out(config, data, NAME))
        images = student.joined(data.labelled, subset(boxes.without_boxes(data.unlabelled, data.labelled), listed))
        source = canvas.canvases(images, config.size, config.workers, config.cache_images, device)
        good = readable(source, torch.arange(len(images)), config.max_broken)
        rows, added = good[good < split], good[good >= split]
        rows, evaluating = early_stopping.divided(rows, early_stopping.rows(data.labelled, config))
        if not len(rows) or not len(added):
            raise StageError(f"{NAME}: none of the images with {'classes' if len(rows) else 'boxes'} can be read")
        config = replace(config, epochs=student.passes(config, rows, True))
        average = work.new_detector() if config.ema else None
        model = Joint(work.new_detector(), len(data.unlabelled.classes), config.seed, average, config.ema)
        draw_augmented(folder / SHEET, images, source, config.augment, seed, torch.cat([rows[:SHOWN], added[:SHOWN]]))
        known, how = truth(images, config.size, device), work.detector.network.normalise
        loss = losses(
            student.losses(known, how, config.augment, seed),
            known.extents,
            torch.from_numpy(targets[listed]).long().to(device),
            how,
            config.augment,
            seed,
            Weighing(config.balance, config.alpha, config.decay),
        )
        batches = partial(student.batches, rows, added, config.batch, seed)
        early = early_stopping.stopping(model, data.labelled, source, evaluating, config, device, folder)
        loop.fit(model, loss, source, batches, config, folder, device, NAME, early)
        facts = {"labelled": split, "of a class": len(listed), "classes": len(data.unlabelled.classes)}
        facts |= early_stopping.facts(early, evaluating)
        finish(step, NAME, data, images, source.broken, model, work.detector, early, facts)
        return weights


def losses(own: Loss, extents: Tensor, labels: Tensor, how: str, strength: str, seed: int, weighing: Weighing) -> Loss:
    """The loss of a joint training, for `loop.fit`.

    Args:
        own: that of the labelled images.
        extents: (n, 2) float32 of all images on their canvases, the labelled ones first.
        labels: (m,) int64, the classes of the last m of them.
        how: normalisation of the images.
        strength: of the augmentation (`strengths.STRENGTHS`).
    """
    split = len(extents) - len(labels)
    classified = _classified(extents, labels, how, strength, seed)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        joint = detectors.plain(model)
        assert isinstance(joint, Joint)
        human, other = batch.valid & (batch.rows < split), batch.valid & (batch.rows >= split)
        located = told = right = boxes_met = extents.new_zeros(())  # of a half of which nothing could be read
        if human.any():
            located, sums = own(model, replace(batch, valid=human, whole=False))
            boxes_met = sums["boxes"]
        if other.any():
            told, right = classified(model, batch, other)
        count = batch.valid.sum()
        value, found = student.weighed(joint, [located, told], weighing, count)
        shown = {"human_loss": found["human_loss"], "class_loss": found["pseudo_loss"], "ratio": found["ratio"]}
        return value, shown | {"class_right": right * count, "human_boxes": 2 * boxes_met, "count": count}

    return loss


def losses_of_both(
    own: Loss, extents: Tensor, labels: Tensor, how: str, strength: str, seed: int, weighing: Weighing
) -> Loss:
    """The loss of a training on pseudo-boxes and classes at once, for `loop.fit`.

    Args:
        own: that of a student, of labelled and pseudo-boxes, weighed; the others as of `losses`, where a label below 0
            is not known and not learned.
    """
    split = len(extents) - len(labels)
    classified = _classified(extents, labels, how, strength, seed)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        both = detectors.plain(model)
        assert isinstance(both, Both)
        value, sums = own(model, batch)
        other = batch.valid & (batch.rows >= split)
        other[other.clone()] = labels[batch.rows[other] - split] >= 0
        told = right = extents.new_zeros(())
        if other.any():
            told, right = classified(model, batch, other)
        ratio, normalised = both.remember_told(told, weighing.decay), weighing.balance == "normalised"
        if normalised:
            value = value * (1 + weighing.alpha) / (1 + 2 * weighing.alpha)
        share = weighing.alpha * ratio / (1 + 2 * weighing.alpha) if normalised else weighing.alpha
        count = sums["count"]
        return value + share * told, sums | {"class_loss": told.detach() * count, "class_right": right * count}

    return loss


def _classified(
    extents: Tensor, labels: Tensor, how: str, strength: str, seed: int
) -> Callable[[nn.Module, Batch, Tensor], tuple[Tensor, Tensor]]:
    """The loss on the classes of the (b,) chosen images of a batch, and the share of right answers."""
    split = len(extents) - len(labels)

    def classified(model: nn.Module, batch: Batch, other: Tensor) -> tuple[Tensor, Tensor]:
        rows = batch.rows[other]
        nothing = extents.new_zeros(len(rows), 1, 4)
        given = Boxed(batch.pixels[other], extents[rows], nothing, nothing[..., 0] > 0)
        moved, _ = augment(given, strength, rows, seed, batch.epoch, partial(canvas.normalise, how=how))
        logits = model(moved.pixels, classify=True).float()
        wanted = labels[rows - split]
        return F.cross_entropy(logits, wanted), (logits.argmax(1) == wanted).float().mean()

    return classified
