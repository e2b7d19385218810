"""Pictures of a run as text that stands in the page."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHEETS = {
    "puzzles.png": "Puzzles as the network saw them, with their solutions",
    "rotation.png": "Rotated images as the network saw them",
    "context.png": "Pairs of tiles as the network saw them",
    "augmented.png": "Images with boxes as the detector saw them",
}
ROOM = 4 * 10**6
"""Bytes of all sheets."""
QUALITY = 80


class Picture(NamedTuple):
    """A picture and what it shows; `data` is an address that holds it."""

    says: str
    data: str


def sheets_of(run: Path) -> list[Picture]:
    """The sheets of what networks were given, in the order of the stages; those that do not fit are left out."""
    room, found = ROOM, []
    for path in sorted(path for name in SHEETS for path in run.rglob(name)):
        size = path.stat().st_size
        if size <= room:
            room -= size
            where = path.parent.relative_to(run).as_posix()
            found.append(Picture(f"{where}: {SHEETS[path.name]}", png(path.read_bytes())))
    return found


def png(content: bytes) -> str:
    """The address that holds a PNG."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def jpeg(pixels: NDArray[np.uint8], side: int) -> str:
    """The address that holds (height, width, 3) uint8 as JPEG, made smaller where its longer side exceeds `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
