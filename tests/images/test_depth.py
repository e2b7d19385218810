"""Values of more than eight bits: black only where the image is."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ktransfer.images import tolerated
from ktransfer.images.decoding import decode


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deep_png(values: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG of (height, width, channels) uint16."""
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def column(*values: int) -> np.ndarray:
    return np.array(values, np.uint16).reshape(-1, 1, 1)


@pytest.fixture(autouse=True)
def nothing_noted() -> None:
    tolerated.taken()


@pytest.mark.parametrize(
    ("values", "expected", "said"),
    [
        ((0, 2048, 4095), (0, 128, 255), True),
        ((0, 300, 1000), (0, 19, 62), True),
        ((0, 17, 255), (0, 17, 255), True),
        ((0, 4096, 65535), (0, 16, 255), False),
        ((0, 0, 4096), (0, 0, 16), False),
        ((0, 0, 0), (0, 0, 0), False),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_twelve_bits_in_sixteen(values: tuple[int, ...], expected: tuple[int, ...], said: bool, channels: int) -> None:
    colours = np.repeat(column(*values), min(channels, 3), 2)
    if channels == 4:
        colours = np.dstack([colours, np.full((3, 1, 1), 65535, np.uint16)])
    got = decode(deep_png(colours))
    assert np.abs(got[:, 0].astype(int) - np.array(expected)[:, None]).max() <= (channels > 1)
    assert bool(tolerated.taken()) is said


@pytest.mark.parametrize("channels", [1, 3])
def test_what_the_file_says_of_its_bits_is_taken(channels: int) -> None:
    bits = chunk(b"sBIT", bytes([10] * channels))
    values = np.repeat(column(0, 511, 1023), channels, 2)
    assert np.abs(decode(deep_png(values, bits))[:, 0].astype(int) - [[0], [127], [255]]).max() <= 1
    # As the standard has it: ten bits spread over sixteen, of a dark image.
    dark = np.repeat(column(0, 64, 1024), channels, 2)
    assert decode(deep_png(dark, bits))[:, 0, 0].tolist() == [0, 0, 4]


def test_a_tiff_of_twelve_bits() -> None:
    values = np.array([[0, 2048, 4095]], np.uint16)
    for options in ({}, {"compression": "tiff_lzw"}, {"tiffinfo": {281: 4095}}):
        out = io.BytesIO()
        Image.fromarray(values).save(out, "TIFF", **options)
        assert decode(out.getvalue())[0, :, 0].tolist() == [0, 128, 255]
    out = io.BytesIO()
    Image.fromarray(np.array([[0, 8195, 16383]], np.uint16)).save(out, "TIFF", tiffinfo={281: 16383})
    assert decode(out.getvalue())[0, :, 0].tolist() == [0, 128, 255]
