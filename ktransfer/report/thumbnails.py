"""Thumbnails of many clusters within a budget of bytes: one JPEG a cluster, in which its images stand side by side.

A JPEG has 600 bytes of tables before its first pixel, so that a sheet costs half of what its images would alone.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader
from ktransfer.progress import bar

COLUMNS = 16
SIDES = {112: 2200, 96: 1700, 80: 1300, 64: 900, 48: 600}
"""Side in pixels -> bytes that a photograph takes about; where it takes more, the quality is lowered."""
QUALITIES = (80, 70, 60, 45, 30, 15)
FEW, MANY = 15, 400
"""Images of a cluster that should be shown at least, and are shown at most."""
BLANK = 200


class Size(NamedTuple):
    """How large thumbnails are, and how many of each cluster there are."""

    side: int
    most: int


def fitting(sizes: Sequence[int], budget: int) -> Size:
    """The largest thumbnails of which all images fit or, where those do not, `FEW` of each cluster.

    Args:
        sizes: images of each cluster.
        budget: bytes of all sheets.
    """
    wanted = [min(size, MANY) for size in sizes]
    few = [min(size, FEW) for size in sizes]
    for count, most in ((sum(wanted), MANY), (sum(few), FEW)):
        for side, cost in SIDES.items():
            if count * cost <= budget and (most == FEW or side >= 64):
                return Size(side, _most(sizes, budget // cost) if most == FEW else MANY)
    side, cost = list(SIDES.items())[-1]
    return Size(side, max(3, _most(sizes, budget // cost)))


def _most(sizes: Sequence[int], count: int) -> int:
    """The largest number of images of a cluster with which no more than `count` are shown."""
    low, high = 0, MANY
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(size, middle) for size in sizes) <= count else (low, middle - 1)
    return low


def sheets(data: Dataset, rows: Sequence[NDArray[np.int64]], side: int, budget: int) -> Iterator[str]:
    """The sheet of each cluster as base64 of JPEG: `COLUMNS` images of side x side in a row; grey where one is broken.

    Args:
        rows: of each cluster, those of the images that are shown; none: an empty text.
        budget: bytes of all sheets together; each cluster has the share of its images.
    """
    images = ImageLoader(data, side, cache="off")
    shown = max(1, sum(len(one) for one in rows))
    with bar(shown, "thumbnails") as progress:
        for cluster, (_, pixels, valid, _) in zip(
            [one for one in rows if len(one)],
            images.batches(torch.from_numpy(one) for one in rows if len(one)),
            strict=True,
        ):
            yield base64.b64encode(_jpeg(pixels.numpy(), valid.numpy(), budget * len(cluster) // shown)).decode()
            progress.update(len(cluster))


def _jpeg(pixels: NDArray[np.uint8], valid: NDArray[np.bool_], budget: int) -> bytes:
    count, _, side, _ = pixels.shape
    columns, lines = min(COLUMNS, count), -(-count // COLUMNS)
    tiles = np.full((lines * columns, side, side, 3), BLANK, np.uint8)
    tiles[:count][valid] = pixels[valid].transpose(0, 2, 3, 1)
    sheet = tiles.reshape(lines, columns, side, side, 3).swapaxes(1, 2).reshape(lines * side, columns * side, 3)
    image, data = Image.fromarray(sheet), b""
    for quality in QUALITIES:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality, optimize=True)
        data = out.getvalue()
        if len(data) <= budget:
            break
    return data
