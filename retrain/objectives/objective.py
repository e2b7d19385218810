"""The signature of the objectives, and what they are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ktransfer.artifacts.centroids import Centroids
from ktransfer.artifacts.features import Features, mean_row

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Known:
    """What is known of each of the n images of a data set, in their order.

    Attributes:
        labels: (n, views) int64, pseudo-labels (or classes) by each clustering; -1 where there is none.
        features: the teacher's, None where the objective does not need them.
        places: (n,) int64, the row of each image in `features`, -1 where it has none.
        centroids: those of the run, None where the objective does not need them.
        seed: of what is drawn.
        names: what people called the labels; none where nobody did.
    """

    labels: Tensor
    features: Features | None = None
    places: Tensor | None = None
    centroids: Centroids | None = None
    seed: int = 0
    names: tuple[str, ...] = ()

    def rows(self) -> Tensor:
        """The images of which there is something to learn, int64."""
        known = self.labels[:, 0] >= 0 if self.places is None else self.places >= 0
        return torch.nonzero(known)[:, 0]


class Objective(NamedTuple):
    """What a network learns.

    Attributes:
        outputs: how many numbers its last layer gives in training.
        kept: how many of them, from the first, it keeps when it is done.
        task: what those then are: "pseudo-labels", or "features".
        loss: (outputs (b, outputs), rows of the images (b,) int64) -> mean loss, and sums over them for the log.
    """

    outputs: int
    kept: int
    task: str
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Sums]]


class Vectors:
    """The teacher's features of images, around the mean of all and of length 1.

    On a GPU they are held in its memory where a quarter of what is free suffices; else the file is read batch by batch.
    """

    def __init__(self, known: Known, device: torch.device) -> None:
        assert known.features is not None and known.places is not None
        self.features, self.places, self.device = known.features, known.places, device
        self.mean = torch.from_numpy(mean_row(known.features)).to(device)
        self.held: Tensor | None = None
        if device.type == "cuda" and self.features.rows.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
            self.held = torch.from_numpy(np.array(self.features.rows)).to(device)
            self.places = self.places.to(device)

    def __call__(self, rows: Tensor) -> Tensor:
        """(b,) int64 images of the data -> (b, d) float32, on the device."""
        return nn.functional.normalize(self.raw(rows) - self.mean, dim=1)

    def raw(self, rows: Tensor) -> Tensor:
        """The same as they are in the file."""
        if self.held is not None:
            return self.held[self.places[rows]].float()
        return self.stored(self.places[rows.cpu()])

    def stored(self, places: Tensor) -> Tensor:
        """(b, d) float32 rows of the file, on the device."""
        return torch.from_numpy(self.features.rows[places.numpy()].astype(np.float32)).to(self.device)
