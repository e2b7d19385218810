"""Context: where does one patch of an image lie beside another? (Doersch, Gupta and Efros, ICCV 2015.)

As released: patches of 96 pixels in a grid with gaps of 48 that starts at random, each moved by at most 7 pixels in
each direction, in images of 150,000 to 450,000 pixels; of each patch one colour channel is kept (lenses shift red and
blue against green towards the border of an image, which would show where a patch comes from), less its mean, and the
others become noise of half a grey level; each patch is scaled by its own deviation. The paper's other remedy against
lenses is to project green against magenta away. Not done: blurring a third of the patches, resizing images at random.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ktransfer import rng
from ktransfer.errors import UsageError
from ktransfer.training.device import constant

from .tiles import PROJECTED, drop_colours, gather, normalise, recolour

PLACES = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))
"""Label -> row and column of the second patch in a grid of 3x3 whose middle is the first one."""

COLOURS = ("dropped", "projected")
PATCH, GAP, JITTER = 96, 48, 7  # the paper's, in pixels; only their ratios are used


@dataclass(frozen=True)
class ContextConfig:
    """How patches are cut.

    Attributes:
        tile: side of a patch in pixels; 0 takes 2/9 of the image's, which makes the image what one of 432x432
            (187,000 pixels) is to patches of 96.
        colour: "dropped" keeps one channel of each patch, "projected" takes green against magenta out of both.
    """

    tile: int = 0
    colour: str = "dropped"

    def __post_init__(self) -> None:
        """Raise UsageError for a value out of range."""
        if self.tile < 0:
            raise UsageError(f"tile {self.tile}: give its side in pixels, or 0 for 2/9 of the image's")
        if self.colour not in COLOURS:
            raise UsageError(f"colour {self.colour!r}: choose one of {', '.join(COLOURS)}")

    def geometry(self, size: int) -> tuple[int, int, int]:
        """Side of a patch, gap between neighbours and largest jitter in pixels for images of size x size.

        Raises:
            UsageError: three patches with their gaps are wider than the image.
        """
        tile = self.tile or 2 * size // 9
        if span(tile) > size:
            most = max((side for side in range(tile) if span(side) <= size), default=0)
            raise UsageError(
                f"tile {tile}: three patches of {tile} pixels with their gaps are wider than images of {size}: "
                f"take a tile of at most {most} or images of at least {span(tile)}"
            )
        return tile, _gap(tile), _jitter(tile)


def span(tile: int) -> int:
    """Pixels that three patches need side by side, with gaps and jitter."""
    return 3 * tile + 2 * _gap(tile) + 2 * _jitter(tile)


def _gap(tile: int) -> int:
    return round(tile * GAP / PATCH)


def _jitter(tile: int) -> int:
    return round(tile * JITTER / PATCH)


class Pairs(NamedTuple):
    """Two patches of each of b images.

    Attributes:
        tiles: (b, 2, 3, t, t) float32, as the network sees them: the one in the middle, and its neighbour.
        label: (b,) int64 in 0..7, where the neighbour lies (`PLACES`).
        corner: (b, 2, 2) int64, upper left pixel (y, x) of each patch.
        kept: (b, 2) int64 in 0..2, the channel of each patch that stays where colours are dropped.
    """

    tiles: Tensor
    label: Tensor
    corner: Tensor
    kept: Tensor


def make_pairs(pixels: Tensor, rows: Tensor, config: ContextConfig, seed: int, epoch: int) -> Pairs:
    """Cut a patch and one of its eight neighbours out of each image.

    The grid lies anywhere in the image where all nine places fit, so that the first patch alone says nothing. What
    becomes of an image depends on (seed, epoch, row) and the image alone, not on the rest of the batch.

    Args:
        pixels: (b, 3, S, S) uint8, RGB.
        rows: (b,) int64, rows of `pixels` in their dataset.
        config: how to cut.
        seed: 0 <= seed < 2**32.
        epoch: 0 <= epoch < 2**32.

    Raises:
        UsageError: the patches do not fit into the images.
    """
    size, batch = pixels.shape[-1], len(pixels)
    tile, gap, jitter = config.geometry(size)

    def integers(purpose: str, count: int, high: int) -> Tensor:
        return rng.integers(seed, f"pretext/context/{purpose}", epoch, rows, count, high)

    label = integers("label", 1, len(PLACES))[:, 0]
    grid = integers("grid", 2, size - span(tile) + 1)[:, None]
    moved = integers("jitter", 4, 2 * jitter + 1).view(batch, 2, 2)  # from 0 on: `span` leaves room to both sides
    neighbour = constant(PLACES, pixels.device)[label]
    place = torch.stack([torch.ones_like(neighbour), neighbour], dim=1)
    corner = grid + moved + place * (tile + gap)
    kept = integers("channel", 2, 3)

    image = torch.arange(batch, device=pixels.device)[:, None].expand(-1, 2)
    patches = gather(pixels, image, corner[:, :, None].expand(-1, -1, 3, -1), tile)
    if config.colour == "projected":
        coloured = recolour(patches, torch.full_like(kept, PROJECTED))
    else:
        noise = rng.uniform(seed, "pretext/context/noise", epoch, rows, patches.shape[1:].numel())
        coloured = drop_colours(patches, kept, noise.view(patches.shape) - 0.5)
    return Pairs(normalise(coloured), label, corner, kept)
