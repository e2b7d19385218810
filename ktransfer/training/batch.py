"""What a training step is made of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Images of one step: `rows` (b,) int64, `pixels` (b, 3, s, s) uint8, `valid` (b,) bool, all on the device.

    `whole` says that all of them are valid, so that the device need not be asked, which would make it wait.
    """

    rows: Tensor
    pixels: Tensor
    valid: Tensor
    epoch: int
    whole: bool = False

    @property
    def kept(self) -> Tensor | slice:
        """What chooses the valid ones out of anything with b rows."""
        return slice(None) if self.whole else self.valid


class Source(Protocol):
    """What batches are read from: images, or anything that hands out rows in the same way."""

    def batches(self, rows: Iterable[Tensor], /) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """(b,) rows -> those rows, their content (b, ...), (b,) valid, and the seconds that the caller waited."""


class Loss(Protocol):
    """(model, batch) -> the loss, and sums over the batch for the log; `count` is what the others are divided by."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
