"""Rotation: which way up is an image? (Gidaris, Singh and Komodakis, ICLR 2018.)

As released: short side 256, a random square of 224 (7/8), mirrored half the time, all four rotations of every image
in the same batch, fixed mean and deviation. Quarter turns move pixels and compute none, so no trace of interpolation
gives the rotation away.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ktransfer import networks, rng
from ktransfer.errors import UsageError

from .tiles import gather

TURNS = 4


@dataclass(frozen=True)
class RotationConfig:
    """How images are cut before they are turned: `tile` is the side of the square; 0 takes 7/8 of the image's."""

    tile: int = 0

    def side(self, size: int) -> int:
        """Side of the square in images of size x size.

        Raises:
            UsageError: it is larger than the image.
        """
        if self.tile > size:
            raise UsageError(
                f"tile {self.tile} is larger than the images of {size} pixels: take a tile of at most {size}"
            )
        return self.tile or 7 * size // 8


class Rotations(NamedTuple):
    """The four rotations of each of b images, one after the other.

    Attributes:
        tiles: (4 b, 1, 3, t, t) float32, as the network sees them.
        label: (4 b,) int64, quarter turns to the left, 0..3.
        corner: (b, 2) int64, upper left pixel (y, x) of the square.
        mirrored: (b,) bool.
    """

    tiles: Tensor
    label: Tensor
    corner: Tensor
    mirrored: Tensor


def make_rotations(pixels: Tensor, rows: Tensor, config: RotationConfig, seed: int, epoch: int) -> Rotations:
    """Cut a square out of each image, mirror it half the time, and turn it in all four ways.

    What becomes of an image depends on (seed, epoch, row) and the image alone, not on the rest of the batch.

    Args:
        pixels: (b, 3, S, S) uint8, RGB.
        rows: (b,) int64, rows of `pixels` in their dataset.
        config: how to cut.
        seed: 0 <= seed < 2**32.
        epoch: 0 <= epoch < 2**32.

    Raises:
        UsageError: the square is larger than the images.
    """
    size = pixels.shape[-1]
    side = config.side(size)
    corner = rng.integers(seed, "pretext/rotation/crop", epoch, rows, 2, size - side + 1)
    mirrored = rng.integers(seed, "pretext/rotation/mirror", epoch, rows, 1, 2)[:, 0].bool()
    image = torch.arange(len(pixels), device=pixels.device)[:, None]
    square = gather(pixels, image, corner[:, None, None].expand(-1, 1, 3, 2), side)[:, 0]
    square = torch.where(mirrored[:, None, None, None], square.flip(-1), square)
    turned = torch.stack([square.rot90(turns, (2, 3)) for turns in range(TURNS)], dim=1).flatten(0, 1)
    label = torch.arange(TURNS, device=pixels.device).repeat(len(pixels))
    return Rotations(networks.normalise(turned, "imagenet")[:, None], label, corner, mirrored)
