"""Puzzles for the eye: as the network sees them, and solved."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ktransfer import files

from .puzzles import GRID, SLOTS, Puzzles

_FRAME = (230, 85, 13)
_INK = (40, 40, 40)
_PAPER = (255, 255, 255)
_HATCH = (205, 205, 205)
_COLUMNS = 2
_MARGIN = 14
_TEXT = 16
_LEAST = 56  # pixels, so that the captions fit above small tiles


def puzzle_sheet(puzzles: Puzzles) -> Image.Image:
    """Draw puzzles, two in a row: on the left as the network sees them, on the right the solution.

    Tiles of the other picture have an orange frame; the cells that they hide are hatched in the solution.

    Args:
        puzzles: b >= 1 of them, on any device. Tiles are normalised, so each is stretched to its own 0..255.

    Returns:
        An RGB picture.
    """
    tiles = [[_displayable(tile) for tile in puzzle] for puzzle in puzzles.tiles.float().cpu()]
    shown = max(puzzles.tiles.shape[-1], _LEAST)
    gap = max(shown // 20, 3)
    step = shown + gap
    side = GRID * step - gap
    width, height = 2 * side + 6 * gap + 2 * _MARGIN, side + _TEXT + 2 * _MARGIN
    columns = min(_COLUMNS, len(tiles))
    sheet = Image.new("RGB", (width * columns, height * -(-len(tiles) // columns)), _PAPER)
    pen = ImageDraw.Draw(sheet)

    labels, occluded, source = puzzles.label.tolist(), puzzles.occluded.tolist(), puzzles.source.tolist()
    for index in range(len(tiles)):
        left, top = index % columns * width + _MARGIN, index // columns * height + _MARGIN
        solution = left + side + 6 * gap
        pen.text((left, top), f"permutation {labels[index]}, occluding tiles: {sum(occluded[index])}", fill=_INK)
        pen.text((solution, top), "solution", fill=_INK)
        for cell in range(SLOTS):
            _hatch(pen, *_place(solution, top, cell, step), shown)
        for slot in range(SLOTS):
            picture = Image.fromarray(tiles[index][slot]).resize((shown, shown), Image.Resampling.NEAREST)
            x, y = _place(left, top, slot, step)
            sheet.paste(picture, (x, y))
            if occluded[index][slot]:
                pen.rectangle(
                    (x - gap // 2, y - gap // 2, x + shown + gap // 2, y + shown + gap // 2), None, _FRAME, gap
                )
            else:
                sheet.paste(picture, _place(solution, top, source[index][slot], step))
    return sheet


def save_sheet(path: Path, puzzles: Puzzles) -> None:
    """Write `puzzle_sheet` as PNG, whole or not at all."""
    sheet = puzzle_sheet(puzzles)
    files.write_whole(path, lambda part: sheet.save(part, format="PNG"))


def _displayable(tile: Tensor) -> NDArray[np.uint8]:
    """A normalised (3, t, t) tile as (t, t, 3) uint8, stretched to the whole range (a constant one to black)."""
    low, high = tile.min(), tile.max()
    stretched = (tile - low) / (high - low).clamp(min=1e-3) * 255
    return stretched.round().byte().permute(1, 2, 0).contiguous().numpy()


def _place(left: int, top: int, cell: int, step: int) -> tuple[int, int]:
    return left + cell % GRID * step, top + _TEXT + cell // GRID * step


def _hatch(pen: ImageDraw.ImageDraw, x: int, y: int, side: int) -> None:
    for offset in range(0, side, 8):
        pen.line((x, y + offset, x + offset, y), _HATCH)
        pen.line((x + offset, y + side - 1, x + side - 1, y + offset), _HATCH)
    pen.rectangle((x, y, x + side - 1, y + side - 1), None, _HATCH)
