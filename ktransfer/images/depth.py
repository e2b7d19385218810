"""Images of more than eight bits: what their values mean, and how they become eight bits."""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ktransfer.images.tolerated import remark

_FULL = 65535
# What cameras and microscopes deliver in files of 16 bits, where no value is larger: else the image would be black.
_SHALLOW = (255, 4095)
_MAX_SAMPLE = 281  # TIFF's tag
_SWAPPED = {"B": "L", "L": "B", "N": "B" if np.little_endian else "L"}


def eight_bits(values: NDArray[np.generic], bits: int | None = None) -> NDArray[np.uint8]:
    """Deep values of any type and range as uint8, rounded to the nearest level.

    The scale is kept where it is evident: 0..65535, for whole numbers that are all small 0..255 or 0..4095 (8 or 12
    bits in a file of 16; said in the end), for floats 0..1 and 0..255; else the values are stretched to 0..255.

    Args:
        values: of any shape.
        bits: how many count, where the file says so.
    """
    if values.dtype.kind in "ui":
        tops: tuple[float, ...] = (_top(values, bits),)
    else:
        tops = (1.0, 255.0, 65535.0)
    numbers = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(numbers.min()), float(numbers.max())
    full = next((top for top in tops if low >= 0 and high <= top), None)
    if full is None:
        numbers, full = numbers - low, (high - low) or 1.0
    levels: NDArray[np.uint8] = np.rint(numbers * (255.0 / full)).astype(np.uint8)
    return levels


def _top(values: NDArray[np.generic], bits: int | None) -> int:
    """What is white in an image of whole numbers."""
    high = int(values.max())
    if not 0 < high <= _FULL or int(values.min()) < 0:
        return _FULL
    if bits is not None and 8 <= bits < 16:
        if _fills(values.astype(np.int64), bits):
            return _FULL
        if high < 2**bits:
            remark("fewer than sixteen bits in a file of sixteen, as it says")
            return int(2**bits) - 1
    top = next((top for top in _SHALLOW if high <= top), _FULL)
    if top != _FULL:
        remark(f"a file of sixteen bits with small values, taken for {'eight' if top == _SHALLOW[0] else 'twelve'}")
    return top


def _fills(values: NDArray[np.int64], bits: int) -> bool:
    """Whether values of so many bits were spread over 16, as the standard of PNG wants it."""
    empty = 16 - bits
    upper = values >> empty
    shifted = upper << empty
    scaled = np.rint(upper * (_FULL / (2**bits - 1)))
    return any(bool((values == spread).all()) for spread in (shifted, shifted | upper >> (bits - empty), scaled))


def significant_bits(image: Image.Image, head: bytes) -> int | None:
    """How many bits of a value count: sBIT of a PNG (of which `head` is the beginning), the largest value of a TIFF."""
    if image.format == "PNG":
        at = 8
        while at + 12 <= len(head):
            length, kind = struct.unpack_from(">I4s", head, at)
            if kind == b"sBIT" and length:
                return head[at + 8]
            if kind == b"IDAT":
                break
            at += 12 + length
    top = getattr(image, "tag_v2", {}).get(_MAX_SAMPLE)
    largest = max(top) if isinstance(top, tuple) and top else top
    if isinstance(largest, int) and largest > 0 and not largest & (largest + 1):
        return largest.bit_length()
    return None


def low_tiles(image: Image.Image) -> list[Any] | None:
    """How Pillow, which keeps the high byte of 16-bit colours, can be made to read the low one; None for the others."""
    if image.mode not in ("RGB", "RGBA"):
        return None
    found = []
    for tile in getattr(image, "tile", []):
        kept = tile[3]
        raw = kept if isinstance(kept, str) else kept[0] if isinstance(kept, tuple) and kept else None
        name, _, order = str(raw).partition(";16")
        if name not in ("RGB", "RGBA") or order not in _SWAPPED:
            return None
        swapped = f"{name};16{_SWAPPED[order]}"
        args = swapped if isinstance(kept, str) else (swapped, *kept[1:])
        found.append(tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args))
    return found or None


def is_dark(image: Image.Image) -> bool:
    """Whether all high bytes of the colours are so small that what the image shows is in the low ones."""
    return 0 <= max(high for _, high in image.getextrema()[:3]) <= _SHALLOW[-1] >> 8  # type: ignore[misc]


def joined(high: Image.Image, low: Image.Image, bits: int | None) -> Image.Image:
    """An image of 16-bit colours in eight bits, from its high and its low bytes."""
    values = np.asarray(high).astype(np.uint16) << 8 | np.asarray(low)
    colours = eight_bits(values[:, :, :3], bits)
    if values.shape[2] == 3:
        return Image.fromarray(colours)
    return Image.fromarray(np.dstack([colours, eight_bits(values[:, :, 3:], bits)]))
