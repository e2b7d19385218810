"""What a task makes of images, for the eye: as the network sees it, and solved."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ktransfer import files

from .context import PLACES, Pairs
from .puzzles import GRID, SLOTS, Puzzles
from .rotation import TURNS, Rotations

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

    Tiles of the other image have an orange frame; the cells that they hide are hatched in the solution.

    Args:
        puzzles: b >= 1 of them, on any device. Tiles are normalised, so each is stretched to its own 0..255.

    Returns:
        An RGB image.
    """
    tiles = puzzles.tiles.float().cpu()
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
            image = _enlarged(tiles[index][slot], shown)
            x, y = _place(left, top, slot, step)
            sheet.paste(image, (x, y))
            if occluded[index][slot]:
                pen.rectangle(
                    (x - gap // 2, y - gap // 2, x + shown + gap // 2, y + shown + gap // 2), None, _FRAME, gap
                )
            else:
                sheet.paste(image, _place(solution, top, source[index][slot], step))
    return sheet


def rotation_sheet(rotations: Rotations) -> Image.Image:
    """Draw the four rotations of each image in a row, as the network sees them; the captions are the solution.

    Args:
        rotations: of b >= 1 images, on any device.

    Returns:
        An RGB image.
    """
    side = max(rotations.tiles.shape[-1], _LEAST)
    step = side + _MARGIN
    sheet = Image.new("RGB", (TURNS * step + _MARGIN, len(rotations.corner) * (step + _TEXT) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (tile, turns) in enumerate(zip(rotations.tiles.float().cpu(), rotations.label.tolist(), strict=True)):
        left, top = index % TURNS * step + _MARGIN, index // TURNS * (step + _TEXT) + _MARGIN
        pen.text((left, top), f"{90 * turns} degrees", fill=_INK)
        sheet.paste(_enlarged(tile[0], side), (left, top + _TEXT))
    return sheet


def pair_sheet(pairs: Pairs) -> Image.Image:
    """Draw pairs of patches, two in a row: on the left as the network sees them, on the right where they belong.

    Args:
        pairs: b >= 1 of them, on any device.

    Returns:
        An RGB image.
    """
    shown = max(pairs.tiles.shape[-1], _LEAST)
    gap = shown // 2
    step = shown + gap
    side = GRID * step - gap
    width, height = 2 * step + side + 2 * _MARGIN, side + _TEXT + 2 * _MARGIN
    columns = min(_COLUMNS, len(pairs.label))
    sheet = Image.new("RGB", (width * columns, height * -(-len(pairs.label) // columns)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (tiles, label) in enumerate(zip(pairs.tiles.float().cpu(), pairs.label.tolist(), strict=True)):
        left, top = index % columns * width + _MARGIN, index // columns * height + _MARGIN
        solution = left + 2 * step
        first, second = (_enlarged(tile, shown) for tile in tiles)
        pen.text((left, top), "the first patch, and its neighbour", fill=_INK)
        pen.text((solution, top), f"solution: {label}", fill=_INK)
        sheet.paste(first, _place(left, top, GRID, step))
        sheet.paste(second, _place(left, top, GRID + 1, step))
        for cell in range(SLOTS):
            _hatch(pen, *_place(solution, top, cell, step), shown)
        row, column = PLACES[label]
        sheet.paste(first, _place(solution, top, SLOTS // 2, step))
        sheet.paste(second, _place(solution, top, GRID * row + column, step))
    return sheet


def save_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a sheet as PNG, whole or not at all."""
    files.write_whole(path, lambda part: sheet.save(part, format="PNG"))


def _enlarged(tile: Tensor, side: int) -> Image.Image:
    return Image.fromarray(_displayable(tile)).resize((side, side), Image.Resampling.NEAREST)


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
