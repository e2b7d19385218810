"""Jigsaw++ puzzles: batches of uint8 images in, normalised tiles and labels out, on the device of the images.

Facts, their sources, and where paper and released code differ: docs/papers.md.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ktransfer import rng
from ktransfer.data.augment import in_parts
from ktransfer.errors import UsageError

from .tiles import GREY, PLAIN, PROJECTED, gather, normalise, recolour

GRID = 3
SLOTS = GRID * GRID

COLOURS = {"paper": (0.7, 0.0), "released": (0.5, 0.25), "jigsaw": (0.3, 0.0), "plain": (0.0, 0.0)}
"""Share of images in grey and share under the colour projection; the rest keeps its colours."""


@dataclass(frozen=True)
class PuzzleConfig:
    """How puzzles are cut.

    Attributes:
        tile: side of a tile in pixels; 0 takes three quarters of a cell, rounded (64 of 85).
        shift: largest offset of one colour channel against the others in pixels, in each direction; limited to a
            quarter of what a tile leaves of its cell, so that small images keep their jitter.
        occlusions: largest number of occluding tiles, 0..8.
        colour: a key of `COLOURS`.
    """

    tile: int = 0
    shift: int = 2
    occlusions: int = 2
    colour: str = "paper"

    def __post_init__(self) -> None:
        """Raise UsageError for a value out of range."""
        if self.tile < 0:
            raise UsageError(f"tile {self.tile}: give its side in pixels, or 0 for three quarters of a cell")
        if self.shift < 0:
            raise UsageError(f"channel shift {self.shift}: give a number of pixels from 0 on")
        if not 0 <= self.occlusions < SLOTS:
            raise UsageError(f"{self.occlusions} occluding tiles: a puzzle of {SLOTS} tiles takes 0 to {SLOTS - 1}")
        if self.colour not in COLOURS:
            raise UsageError(f"colour {self.colour!r}: choose one of {', '.join(COLOURS)}")

    def geometry(self, size: int) -> tuple[int, int, int]:
        """Side of a cell, side of a tile and largest channel shift in pixels for images of size x size.

        Raises:
            UsageError: the images are smaller than the grid, or the tile is larger than a cell.
        """
        cell = size // GRID
        if cell < 1:
            raise UsageError(f"images of {size} pixels cannot be cut into {GRID}x{GRID} cells: make them larger")
        tile = self.tile or (3 * cell + 2) // 4
        if tile > cell:
            raise UsageError(
                f"tile {tile} is larger than a cell of {cell} pixels (a third of {size}): "
                f"take a tile of at most {cell} or images of at least {GRID * tile}"
            )
        return cell, tile, min(self.shift, (cell - tile) // 4)


JIGSAWPP = PuzzleConfig()
JIGSAW = PuzzleConfig(occlusions=0, colour="jigsaw")
PUZZLES = {
    ("jigsawpp", "paper"): JIGSAWPP,
    ("jigsawpp", "released"): PuzzleConfig(colour="released"),
    ("jigsaw", "paper"): JIGSAW,
    ("jigsaw", "released"): PuzzleConfig(shift=0, occlusions=0, colour="plain"),
}
"""Task and `--colour` -> how it is cut; the released Jigsaw neither greys images nor shifts their channels."""


class Draws(NamedTuple):
    """All that is random about a batch of puzzles.

    Attributes:
        label: (b,) int64, the row of the permutation.
        occluded: (b, 9) bool, whether a slot shows the other image.
        source: (b, 9) int64, the cell that a slot shows, of the image or, where occluded, of the other one.
        corner: (b, 9, 3, 2) int64, upper left pixel (y, x) of each slot's tile in each channel.
        colour: (b, 9) int64, PLAIN, GREY or PROJECTED; the same for all slots that show the same image.
    """

    label: Tensor
    occluded: Tensor
    source: Tensor
    corner: Tensor
    colour: Tensor


class Puzzles(NamedTuple):
    """Tiles as the network sees them, (b, 9, 3, t, t) float32, and how they came about (see `Draws`)."""

    tiles: Tensor
    label: Tensor
    occluded: Tensor
    source: Tensor
    corner: Tensor
    colour: Tensor


def make_puzzles(
    pixels: Tensor,
    others: Tensor,
    rows: Tensor,
    other_ok: Tensor,
    permutations: Tensor,
    config: PuzzleConfig,
    seed: int,
    epoch: int,
) -> Puzzles:
    """Make one puzzle of each image; all tensors on one device.

    The puzzle of an image depends on (seed, epoch, row) and the two images alone, not on the rest of the batch. For
    held-out images, an epoch that stays the same gives the same puzzles at every evaluation.

    Args:
        pixels: (b, 3, S, S) uint8, RGB.
        others: (b, 3, S, S) uint8, for each image the one that occluding tiles are taken from.
        rows: (b,) int64, rows of `pixels` in their dataset.
        other_ok: (b,) bool, whether there is another image; without one no slot is occluded.
        permutations: (n, 9) int64, values 0..8: slot i of a puzzle with label l shows cell permutations[l, i].
        config: how to cut.
        seed: 0 <= seed < 2**32.
        epoch: 0 <= epoch < 2**32.

    Returns:
        The puzzles, tiles normalised by `normalise`.

    Raises:
        UsageError: the tile is larger than a cell, or the images are smaller than the grid.
    """
    size = pixels.shape[-1]
    drawn = draw(rows, other_ok, permutations, config, size, seed, epoch)
    tile = config.geometry(size)[1]

    def tiles(part: slice) -> Tensor:
        draws = Draws(*(values[part] for values in drawn))
        # As in the released code the channels are mixed after their shift.
        return normalise(recolour(cut(pixels[part], others[part], draws, tile), draws.colour))

    return Puzzles(in_parts(tiles, len(rows), SLOTS * 3 * tile**2, pixels.device), *drawn)


def draw(
    rows: Tensor,
    other_ok: Tensor,
    permutations: Tensor,
    config: PuzzleConfig,
    size: int,
    seed: int,
    epoch: int,
) -> Draws:
    """Every random choice, each under a purpose of its own for images of `size` pixels (see `make_puzzles`)."""
    cell, tile, shift = config.geometry(size)
    batch = len(rows)

    def integers(purpose: str, count: int, high: int) -> Tensor:
        return rng.integers(seed, f"pretext/{purpose}", epoch, rows, count, high)

    label = integers("label", 1, len(permutations))[:, 0]
    number = integers("occlusions", 1, config.occlusions + 1) * other_ok[:, None]
    occluded = rng.shuffles(seed, "pretext/slots", epoch, rows, SLOTS) < number
    foreign = rng.shuffles(seed, "pretext/foreign", epoch, rows, SLOTS)
    source = torch.where(occluded, foreign, permutations[label])

    # An occluded slot's own image is not seen, so the slot's jitter is free to serve the foreign tile.
    jitter = integers("offset", SLOTS * 2, cell - tile - shift + 1).view(batch, SLOTS, 1, 2)
    extra = integers("shift", SLOTS * 6, shift + 1).view(batch, SLOTS, 3, 2)
    place = torch.stack([source // GRID, source % GRID], dim=-1)
    corner = place[:, :, None] * cell + jitter + extra

    grey, projected = COLOURS[config.colour]
    chance = rng.uniform(seed, "pretext/colour", epoch, rows, 2)
    kind = torch.where(chance < grey, GREY, torch.where(chance < grey + projected, PROJECTED, PLAIN))
    return Draws(label, occluded, source, corner, kind.gather(1, occluded.long()))


def cut(pixels: Tensor, others: Tensor, draws: Draws, tile: int) -> Tensor:
    """The tiles as they are in the images: (b, 9, 3, tile, tile) uint8."""
    image = torch.arange(len(pixels), device=pixels.device)[:, None] + len(pixels) * draws.occluded
    return gather(torch.cat([pixels, others]), image, draws.corner, tile)
