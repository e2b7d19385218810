"""Features of all images, by all processes: each computes a batch in turn, and the leader gets them in order."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer import distributed
from ktransfer.data.loader import ImageLoader

Take = Callable[[int, NDArray[np.float32], NDArray[np.bool_]], object]
"""First row, (b, d) float32 features with zeros where an image is broken, (b,) bool whether it is not."""


def ordered_map(
    images: ImageLoader, first: int, batch: int, compute: Callable[[Tensor], Tensor], dim: int, take: Take | None
) -> None:
    """Compute the rows from `first` on, `batch` at a time; called by all processes at once, or by the only one.

    The batches are those of one process, so the features are too.

    Args:
        compute: (b, 3, s, s) uint8 images -> (b, dim) features on any device.
        dim: d, numbers an image.
        take: what the leader does with the features, in the order of the rows; None in the others.

    Raises:
        KTransferError: `compute` or `take` failed, in whatever process; PeerFailed in the others.
    """
    parts = [part for part in torch.arange(first, len(images.dataset)).split(batch) if len(part)]
    who, of = distributed.rank(), distributed.world_size()
    own = images.batches(iter(parts[who::of]))
    error: Exception | None = None
    for start in range(0, len(parts), of):
        turn = parts[start : start + of]
        features, valid = np.empty((0, dim), np.float32), np.empty(0, np.bool_)
        try:
            if error is None and who < len(turn):
                _, pixels, known, _ = next(own)
                found = torch.where(known[:, None], compute(pixels).float().cpu(), 0.0)
                features, valid = np.ascontiguousarray(found.numpy()), known.numpy()
        except Exception as failure:
            error = failure
        distributed.agree(error)
        if who:
            if who < len(turn):
                distributed.send(features)
                distributed.send(valid.view(np.uint8))
            continue
        came = [(features, valid)] + [
            (
                distributed.receive(np.empty((len(part), dim), np.float32), other),
                distributed.receive(np.empty(len(part), np.uint8), other).view(np.bool_),
            )
            for other, part in enumerate(turn[1:], 1)
        ]
        try:
            assert take is not None
            for part, (rows, flags) in zip(turn, came, strict=True):
                take(int(part[0]), rows, flags)
        except Exception as failure:  # the others are computing, and are told at the next turn
            error = failure
    distributed.agree(error)
