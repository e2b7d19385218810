"""Sheets of small images, row by row, for the eye."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ktransfer import files

SIDE = 64
GAP = 3
MARGIN = 14
TEXT = 16
PAPER = (255, 255, 255)
BLANK = (205, 205, 205)
FRAME = (20, 150, 70)
_INK = (40, 40, 40)


class Strip(NamedTuple):
    """One row of a sheet.

    Attributes:
        caption: one line.
        pixels: (m, 3, side, side) uint8, m >= 1.
        valid: (m,) bool, false where the image could not be read.
        framed: (m,) bool, which of them have a green frame; none when not given.
    """

    caption: str
    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    framed: NDArray[np.bool_] | None = None


def draw_sheet(strips: list[Strip], columns: int) -> Image.Image:
    """An RGB image with one row for each strip (at least one), its caption above; grey for an unreadable image."""
    side = strips[0].pixels.shape[-1]
    width = columns * (side + GAP) - GAP + 2 * MARGIN
    height = TEXT + side + MARGIN
    sheet = Image.new("RGB", (width, height * len(strips) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, strip in enumerate(strips):
        top = MARGIN + row * height
        pen.text((MARGIN, top), strip.caption, fill=_INK)
        for column, (pixels, valid) in enumerate(zip(strip.pixels, strip.valid, strict=True)):
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            blank = Image.new("RGB", image.size, BLANK)
            left, above = MARGIN + column * (side + GAP), top + TEXT
            sheet.paste(image if valid else blank, (left, above))
            if strip.framed is not None and strip.framed[column]:
                pen.rectangle((left, above, left + side - 1, above + side - 1), None, FRAME, 3)
    return sheet


def save_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a sheet as PNG, whole or not at all."""
    files.write_whole(path, lambda part: sheet.save(part, format="PNG"))
