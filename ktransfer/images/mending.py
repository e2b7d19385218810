"""Files that Pillow refuses though their pixels are there: written again with nothing but these.

Text, profiles and other metadata decide nothing; neither do checksums of what is left out, nor an end that is missing.
Pixels do: one that cannot be told makes the image broken, but for the last eighth of a JPEG that was cut off.
"""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

METADATA = "unreadable metadata or checksums"
CUT_OFF = "a JPEG without its end"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"sBIT")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_MOST = 2**30  # bytes of pixels: more is not held twice
_SOI, _EOI, _SOS = b"\xff\xd8", b"\xff\xd9", 0xDA
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_WEBP_KEPT = (b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF", b"EXIF")
_WEBP_EXIF, _WEBP_EXTRA = 0x08, 0x20 | 0x08 | 0x04  # flags of VP8X: profile, EXIF, XMP


def mended(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What a file may be read as instead, the nearest first, each with a word for what was passed over."""
    try:
        if data.startswith(_PNG):
            yield METADATA, _png(data)
        elif data.startswith(_SOI):
            bare = _jpeg(data)
            yield METADATA, bare
            yield CUT_OFF, _completed(bare)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            yield METADATA, _webp(data)
    except (ValueError, IndexError, KeyError, struct.error, zlib.error, OSError, SyntaxError):
        return  # it is broken, and was said to be


def _png(data: bytes) -> bytes:
    kept: list[tuple[bytes, bytes]] = []
    stream, sound, at = b"", True, len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if not kind.isalpha():
            break
        body, check = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        right = check == struct.pack(">I", zlib.crc32(kind + body))
        if kind in (b"IHDR", b"PLTE") and not right:
            raise ValueError(kind)
        if kind == b"IDAT":
            stream, sound = stream + body, sound and right
        elif kind in _PNG_KEPT and right and len(body) == length:
            kept.append((kind, body))
        at += 12 + length
    raw = _inflated(stream, _png_bytes(kept[0][1]), sound)
    return _PNG + b"".join(_chunk(*one) for one in [*kept, (b"IDAT", zlib.compress(raw, 1)), (b"IEND", b"")])


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _inflated(stream: bytes, expected: int, sound: bool) -> bytes:
    """The filtered rows of a PNG, all of them; `sound`: the checksums outside are right, so that inside is as well."""
    if expected > _MOST or stream[0] & 0x0F != 8:
        raise ValueError("not held twice")
    inflate = zlib.decompressobj(-15)
    raw = inflate.decompress(stream[2:], expected)
    while len(raw) < expected and (more := inflate.decompress(inflate.unconsumed_tail, expected - len(raw))):
        raw += more
    if len(raw) < expected:
        raise ValueError("pixels are missing")
    inside = inflate.unused_data[:4]
    if not sound and len(inside) == 4 and inside != struct.pack(">I", zlib.adler32(raw)):
        raise ValueError("both checksums are wrong: so are pixels")
    return raw


def _png_bytes(header: bytes) -> int:
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _CHANNELS[colour]
    sizes = [(width, height)]
    if interlaced:
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _PASSES]
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of each segment before the first scan of a JPEG, then that of the scan to the end."""
    at = 2
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:
            at += 1
        if data[at] != 0xFF:
            raise ValueError("no marker")
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == _SOS:
            yield _SOS, at, len(data)
            return
        if end > len(data):
            raise ValueError("cut off before the first scan")
        yield data[at + 1], at, end
        at = end


def _jpeg(data: bytes) -> bytes:
    """Without metadata, but for what says the colours and which way is up."""
    parts = [_SOI]
    for marker, begin, end in _segments(data):
        body = data[begin + 4 : end]
        said = {0xE0: body[:5] == b"JFIF\0" and len(body) >= 14, 0xE1: body[:6] == b"Exif\0\0"}
        said[0xEE] = body[:5] == b"Adobe" and len(body) >= 12
        if said.get(marker, not (0xE0 <= marker <= 0xEF or marker == 0xFE)):
            parts.append(data[begin:end])
    return b"".join(parts)


def _completed(data: bytes) -> bytes:
    """With an end; ValueError where more than an eighth of the image (of a small one, its last block) is not told."""
    data = data.rstrip(b"\xff")
    if not _complete_scans(data):
        raise ValueError("scans are missing")
    # Pixels that depend on what comes after the cut are not told by what is before it.
    first, second = (_pixels(data + tail + _EOI) for tail in (b"", b"\xaa\x55\x33\xcc" * 64))
    differing = (first != second).any(2)
    height, width = differing.shape
    if differing.any():
        block = 16
        # One pixel more before it, where colours of half the size are smoothed.
        top = (int(differing.any(1).argmax()) + 1) // block * block
        left = (int(differing[top : top + block].any(0).argmax()) + 1) // block * block
        lost = (width - left) * min(block, height - top) + width * max(0, height - top - block)
        if lost > max(width * height // 8, min(block * block, width * height // 4)):
            raise ValueError("too much is missing")
    return data + _EOI


def _pixels(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return np.asarray(image.convert("RGB"))


def _complete_scans(data: bytes) -> bool:
    """Whether the scans that were begun give each coefficient to its last bit (all of them do in a baseline JPEG)."""
    left: set[tuple[int, int]] = set()
    at = -1
    for marker, begin, _ in _segments(data):
        if marker in _FRAMES:
            components = [data[begin + 10 + 3 * one] for one in range(data[begin + 9])]
            left = {(one, place) for one in components for place in range(64)}
        at = begin
    while at >= 0:
        count = data[at + 4]
        spectral, last, bits = data[at + 5 + 2 * count : at + 8 + 2 * count]
        if not bits & 0x0F:
            left -= {(data[at + 5 + 2 * one], place) for one in range(count) for place in range(spectral, last + 1)}
        at = data.find(b"\xff\xda", at + 2)
    return not left


def _webp(data: bytes) -> bytes:
    parts: list[bytes] = []
    kinds: list[bytes] = []
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        whole = data[at : at + 8 + length]
        if len(whole) == 8 + length and kind in _WEBP_KEPT:
            kinds.append(kind)
            parts.append(whole + b"\0" * (length % 2))
        at += 8 + length + length % 2
    if not {b"VP8 ", b"VP8L", b"ANMF"} & set(kinds):
        raise ValueError("pixels are missing")
    if kinds[0] == b"VP8X":
        flags = parts[0][8] & ~_WEBP_EXTRA | (_WEBP_EXIF if b"EXIF" in kinds else 0)
        parts[0] = parts[0][:8] + bytes([flags]) + parts[0][9:]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body
