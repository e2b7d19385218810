"""In which frame boxes are: of images as their EXIF turns them upright, or of images as they are stored.

A file of boxes does not say. Where turning swaps the sides, the width and height that it states tell.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ktransfer.errors import BrokenImage
from ktransfer.images import decoding
from ktransfer.machine import cores
from ktransfer.progress import say_once

OBEY, IGNORE = "obey", "ignore"
EXIF = (OBEY, IGNORE)
LOOKED_AT = 1000  # images, evenly spread; each is compared when it is decoded in any case
Sides = tuple[int, int]
"""Width and height."""


def mark(turned: bool) -> bytes:
    """What a fingerprint takes in beside the images."""
    return b"" if turned else b"exif ignored"


def sides(place: Path, turned: bool) -> Sides:
    """Width and height of an image, from its header; raises `BrokenImage`."""
    return _frames(*decoding.header(place))[not turned]


def fits(sides: Sides, stated: Sides) -> bool:
    """Whether an image of such sides, maybe decoded at a reduced scale, is one of `stated` sides."""
    # A reduced decoding rounds each side up, so that it is at most one pixel larger than its share.
    factor = max(sides) / max(stated)
    return factor <= 1.01 and all(abs(side - factor * whole) <= 1.5 for side, whole in zip(sides, stated, strict=True))


def look(name: Path | str, keys: Sequence[str], places: Sequence[Path], stated: Sequence[Sides], turned: bool) -> None:
    """Say how many images have boxes for the other frame, or sides that are swapped, and which option helps."""
    rows = np.unique(np.linspace(0, len(keys) - 1, min(len(keys), LOOKED_AT)).round().astype(int)).tolist()
    with ThreadPoolExecutor(cores()) as pool:
        headers = list(pool.map(_header, (places[row] for row in rows)))
    other, swapped, silent = list[int](), list[int](), list[int]()
    for row, header in zip(rows, headers, strict=True):
        if header is None:
            continue
        mine, its_other = _frames(*header)[:: 1 if turned else -1]
        if fits(mine, stated[row]):
            if header[2] > 1 and fits(its_other, stated[row]):
                silent.append(row)
        elif fits(its_other, stated[row]):
            other.append(row)
        elif fits(mine, stated[row][::-1]):
            swapped.append(row)
    frame, way_out = (
        ("before EXIF turns it", f"--exif {IGNORE} takes all images as they are stored")
        if turned
        else ("as EXIF turns it", f"--exif {OBEY} turns all images upright")
    )
    for found, words in (
        (other, f"have boxes for the image {frame}, and are broken ones so; {way_out}"),
        (swapped, "have their width and height swapped in the file, and are broken ones so; correct the file"),
        (
            silent if turned else [],
            "are turned by EXIF so that their sides do not show it; boxes are taken to be for the upright image, and "
            f"if they are not, {way_out}",
        ),
    ):
        if found:
            say_once(f"{name}: {len(found):,} of {len(rows):,} images looked at, such as {keys[found[0]]}, {words}")


def _frames(width: int, height: int, orientation: int) -> tuple[Sides, Sides]:
    """The sides of an image as EXIF turns it, and as it is stored."""
    return ((height, width) if orientation >= decoding.SIDEWAYS else (width, height)), (width, height)


def _header(place: Path) -> tuple[int, int, int] | None:
    try:
        return decoding.header(place)
    except BrokenImage:
        return None
