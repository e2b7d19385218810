"""The student's loss: human and pseudo-boxes in one batch, weighed against each other.

With the plain sum of both losses the paper's training was unstable; it normalises by moving averages. The formula here
is a recollection of its Appendix B, which could not be read (docs/papers.md): with L_h, L_p the two
losses, mean() their moving averages, without gradient, and weight a,

    L = (L_h + a * mean(L_h) / mean(L_p) * L_p) / (1 + a)
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktransfer.detection import canvas, detectors
from ktransfer.detection.data import Detection
from ktransfer.detection.losses import Truth
from ktransfer.detection.masks import classes_of_pixels
from ktransfer.detection.strengths import Boxed, augment
from ktransfer.training import loop
from ktransfer.training.batch import Batch

from ..config import SelftrainConfig

BALANCES = ("normalised", "plain")


class Weighing(NamedTuple):
    """How the two losses are added.

    Attributes:
        balance: "normalised" as above, or "plain": L_h + a * L_p.
        alpha: a.
        decay: of the moving averages, whose start is no part of them: at step 0 they are the losses themselves.
    """

    balance: str
    alpha: float
    decay: float


class Student(nn.Module):
    """A detector or segmenter, what its training remembers, the moving averages, and its own average if wanted.

    Its buffers are in the checkpoint, so that an interrupted training goes on exactly.
    """

    human: Tensor
    pseudo: Tensor
    weight: Tensor
    steps: Tensor

    def __init__(self, detector: nn.Module, average: nn.Module | None = None, decay: float = 0.0) -> None:
        """A student; `average` begins as the same detector, and `decay` is that of following it."""
        super().__init__()
        self.detector = detector
        self.average = average
        self.decay = decay
        if average is not None:
            average.requires_grad_(False)
        for name in ("human", "pseudo", "weight", "steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def forward(self, *given: Any) -> Any:
        """What the detector says in training: what is compiled where the student is."""
        return self.detector(*given)

    def train(self, mode: bool = True) -> "Student":
        """The average never trains."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    @torch.no_grad()
    def remember(self, human: Tensor, pseudo: Tensor, decay: float) -> Tensor:
        """Take two losses into the moving averages; returns mean(L_h) / mean(L_p)."""
        self.human.mul_(decay).add_((1 - decay) * human.detach().double())
        self.pseudo.mul_(decay).add_((1 - decay) * pseudo.detach().double())
        self.weight.mul_(decay).add_(1 - decay)
        return (self.human / self.pseudo.clamp(min=1e-12 * self.weight)).float()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the detector; batch norm's statistics are taken as they are.

        At step n by min(decay, (1 + n) / (10 + n)): a short training would else be averaged with its fresh weights.
        """
        assert self.average is not None
        towards = 1 - ((1 + self.steps) / (10 + self.steps)).clamp(max=self.decay)
        self.steps += 1
        for own, now in zip(self.average.parameters(), self.detector.parameters(), strict=True):
            own.lerp_(now, towards.to(own.dtype))
        for mine, theirs in zip(self.average.buffers(), self.detector.buffers(), strict=True):
            mine.copy_(theirs)

    def evaluated(self) -> nn.Module:
        """What `--patience` evaluates and keeps: the average where there is one."""
        return self.detector if self.average is None else self.average

    def result(self) -> nn.Module:
        """The detector that the training is for; to be called once, at its end: the average takes the last step in."""
        if self.average is None:
            return self.detector
        self.follow()
        return self.average


def joined(human: Detection, pseudo: Detection) -> Detection:
    """Both data sets as one; rows from len(human) on are those of `pseudo`."""
    split = len(human)

    def either(row: int) -> tuple[Detection, int]:
        return (human, row) if row < split else (pseudo, row - split)

    def read(row: int, short_side: int | None) -> NDArray[np.uint8]:
        data, place = either(row)
        return data.read(place, short_side)

    return replace(
        human,
        keys=human.keys + pseudo.keys,
        targets=np.concatenate([human.targets, pseudo.targets]),
        read=read,
        short_side=None,
        reader=None,
        sizes=np.concatenate([human.sizes, pseudo.sizes]),
        objects=human.objects + pseudo.objects,
        ids=tuple(range(1, split + len(pseudo) + 1)),
        label_map=None if pseudo.label_map is None else lambda row: classes_of_pixels(*either(row)),
    )


def batches(human: Tensor, pseudo: Tensor, batch: int, seed: int, epoch: int) -> Tensor:
    """(steps, 2 * batch) int64: in each step `batch` human rows and as many pseudo rows in turns.

    An epoch is a pass over the human rows; the pseudo rows go on where the epoch before left them, in passes of their
    own, each in its own order.
    """
    own = loop.epoch_batches(human, batch, seed, epoch)
    steps, width = own.shape
    places = torch.arange(epoch * steps * width, (epoch + 1) * steps * width)
    passes, within = places // len(pseudo), places % len(pseudo)
    other = torch.empty_like(places)
    for number in passes.unique().tolist():
        order = loop.epoch_batches(pseudo, 1, seed ^ 0x5EED, number).flatten()
        chosen = passes == number
        other[chosen] = order[within[chosen]]
    return torch.stack([own, other.view(steps, width)], dim=2).flatten(1)


def passes(config: SelftrainConfig, rows: Tensor, student: bool) -> int:
    """How many passes a training makes over its (n,) labelled rows: by `--samples`, or by `--epochs`."""
    if student and config.student_epochs:
        return config.student_epochs
    return math.ceil(config.samples / loop.epoch_batches(rows, config.batch, 0, 0).numel()) or config.epochs


def losses(
    truth: Truth, how: str, strength: str, seed: int, weighing: Weighing | None = None, split: int = 0
) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of a teacher, or, with `weighing`, that of a student, for `loop.fit`.

    Args:
        truth: the boxes, of both parts where there are two.
        how: normalisation of the images.
        strength: of the augmentation (`strengths.STRENGTHS`).
        split: rows from here on have pseudo-boxes.
    """
    filled = _filled(truth)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        student = detectors.plain(model)
        detector = student.detector if isinstance(student, Student) else student
        rows = batch.rows[batch.valid]
        given = Boxed(batch.pixels[batch.valid], truth.extents[rows], *(part[rows] for part in filled[:2]))
        moved, _ = augment(given, strength, rows, seed, batch.epoch, partial(canvas.normalise, how=how))
        pixels = moved.pixels
        labels = filled[2][rows] + detectors.shift(detector)
        targets = [
            {"boxes": boxes[kept], "labels": label[kept]}
            for boxes, kept, label in zip(moved.boxes, moved.kept, labels, strict=True)
        ]
        mine = rows < split
        return objects_loss(model, pixels, targets, moved.kept.sum(1), "boxes", mine, weighing, batch.valid.sum())

    return loss


def objects_loss(
    model: nn.Module,
    pixels: Tensor,
    targets: list[dict[str, Tensor]],
    numbers: Tensor,
    noun: str,
    mine: Tensor,
    weighing: Weighing | None,
    count: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a detector, and sums for the log.

    Args:
        model: a `Student`, perhaps compiled, where there is a `weighing`.
        targets: of each of (b, 3, size, size) pixels what is to be found, and (b,) `numbers` of that, called `noun`.
        mine: (b,) the human images.
        count: of the images.
    """
    if weighing is None:
        return total(model, pixels, targets), {noun: numbers.sum(), "count": count}
    student = detectors.plain(model)
    assert isinstance(student, Student)
    value, sums = weighed(student, halves(model, pixels, targets, mine), weighing, count)
    sums |= {f"human_{noun}": 2 * numbers[mine].sum(), f"pseudo_{noun}": 2 * numbers[~mine].sum()}
    return value, sums | {"count": count}


def weighed(
    student: Student, parts: list[Tensor], weighing: Weighing, count: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The human and the pseudo loss as one, and sums for the log; both averages of the student go on."""
    ratio = student.remember(parts[0], parts[1], weighing.decay)
    if weighing.balance == "plain":
        ratio = torch.ones_like(ratio)
    value = parts[0] + weighing.alpha * ratio * parts[1]
    if weighing.balance == "normalised":
        value = value / (1 + weighing.alpha)
    if student.average is not None:
        student.follow()
    sums = {"human_loss": parts[0].detach() * count, "pseudo_loss": parts[1].detach() * count}
    return value, sums | {"ratio": ratio * count}


def _filled(truth: Truth) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes of all images in one tensor (n, m, 4), which of them are there (n, m), and their labels (n, m)."""
    most = max(1, *(len(boxes) for boxes in truth.boxes))
    device = truth.extents.device
    boxes = torch.zeros(len(truth.boxes), most, 4, device=device)
    kept = torch.zeros(len(truth.boxes), most, dtype=torch.bool, device=device)
    labels = torch.zeros(len(truth.boxes), most, dtype=torch.int64, device=device)
    for row, (own, label) in enumerate(zip(truth.boxes, truth.labels, strict=True)):
        boxes[row, : len(own)], kept[row, : len(own)], labels[row, : len(own)] = own, True, label
    return boxes, kept, labels


def total(model: nn.Module, pixels: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    """The sum of a detector's losses."""
    return _total(model, pixels, targets)[0]


def halves(model: nn.Module, pixels: Tensor, targets: list[dict[str, Tensor]], mine: Tensor) -> list[Tensor]:
    """The losses of the human images, (b,) `mine`, and of the others; 0 where there are none of them.

    RetinaNet's is a sum over anchors divided by the number of positive ones: here by those of the whole batch. Divided
    by its own, a half that happens to have none would for one step weigh a hundred times as much as any other, which
    ended trainings.
    """
    found: list[tuple[Tensor, Tensor | None]] = []
    for which in (mine, ~mine):
        chosen = [target for target, there in zip(targets, which.tolist(), strict=True) if there]
        found.append(_total(model, pixels[which], chosen) if chosen else (pixels.new_zeros(()), None))
    positives = sum(own for _, own in found if own is not None)
    return [part if own is None else part * (own + 1.0) / (positives + 1.0) for part, own in found]


def _total(model: nn.Module, pixels: Tensor, targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor | None]:
    found = model(pixels, targets)
    positives = found.pop("positives", None)
    return torch.stack(list(found.values())).sum(), positives
