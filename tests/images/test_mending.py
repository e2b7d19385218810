"""Pixels decide: whatever else is wrong with a file, its pixels are read, and nothing is read that is not there."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ktransfer.data.pack import pack
from ktransfer.errors import BrokenImage
from ktransfer.images import decoding, tolerated
from ktransfer.images.decoding import decode
from ktransfer.images.mending import METADATA


def photo(width: int = 64, height: int = 48) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 / (width - 1), y * 255 / max(height - 1, 1), (x + y) * 255 / (width + height - 2)]
    return np.stack(channels, 2).astype(np.uint8)


def encode(kind: str, pixels: np.ndarray | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(photo() if pixels is None else pixels).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


def png(*chunks: bytes, pixels: np.ndarray | None = None) -> bytes:
    """A PNG with these chunks behind its header."""
    data = encode("PNG", pixels)
    return data[:33] + b"".join(chunks) + data[33:]


def long_text() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("story", "x" * 2_000_000, zip=True)
    return encode("PNG", pnginfo=info)


def text_behind() -> bytes:
    data = encode("PNG")
    return data[:-12] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"y" * 2_000_000)) + data[-12:]


@pytest.fixture(autouse=True)
def nothing_noted() -> None:
    tolerated.taken()


@pytest.mark.parametrize(
    "data",
    [
        long_text(),
        text_behind(),
        png(*[chunk(b"zTXt", b"k\0\0" + zlib.compress(b"y" * 900_000))] * 100),
        png(chunk(b"iCCP", b"n\0\0" + zlib.compress(b"z" * 2_000_000))),
        png(chunk(b"iCCP", b"n")),
        png(chunk(b"tEXt", b"k\0v", wrong=1)),
        png(chunk(b"gAMA", struct.pack(">I", 45455), wrong=1)),
        *[png(chunk(kind, b"")) for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL", b"fcTL", b"iTXt", b"eXIf")],
    ],
)
def test_metadata_of_a_png_decide_nothing(data: bytes) -> None:
    assert (decode(data) == photo()).all()
    assert decoding.short_side(data) == 48


def test_a_wrong_checksum_inside_a_right_one_is_the_writers() -> None:
    body = zlib.compress(b"\0" + photo(64, 1).tobytes())
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 1, 8, 2, 0, 0, 0))
    start, end = b"\x89PNG\r\n\x1a\n" + head, chunk(b"IEND", b"")
    odd = body[:-1] + bytes([body[-1] ^ 1])
    assert (decode(start + chunk(b"IDAT", odd) + end) == photo(64, 1)).all()
    assert (decode(start + chunk(b"IDAT", body[:-4])) == photo(64, 1)).all()
    for damaged in (chunk(b"IDAT", odd, wrong=1), chunk(b"IDAT", body[: len(body) // 2])):
        with pytest.raises(BrokenImage):
            decode(start + damaged + end)
    with pytest.raises(BrokenImage):
        decode(start[:-1] + b"\0" + chunk(b"IDAT", body) + end)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("depth", "colour", "channels"), [(8, 2, 3), (1, 0, 1), (16, 0, 1), (8, 6, 4), (8, 4, 2)])
def test_a_mended_png_has_the_pixels_of_the_sound_one(interlaced: int, depth: int, colour: int, channels: int) -> None:
    width, height = 13, 11
    sizes = [(13, 11)]
    if interlaced:
        sizes = [(2, 2), (2, 2), (4, 1), (3, 3), (7, 3), (6, 6), (13, 5)]
    random = np.random.default_rng(depth + colour)
    rows = b"".join(
        b"\0" + random.bytes(-(-columns * channels * depth // 8)) for columns, count in sizes for _ in range(count)
    )
    head = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    )
    rest = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert (decode(head + chunk(b"gAMA", b"") + rest) == decode(head + rest)).all()
    assert "metadata" in "".join(tolerated.taken())


def test_transparency_and_orientation_survive_the_mending() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([7, 8, 9, 50, 60, 70])
    palette.putdata([0, 1])
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=0)
    data = out.getvalue()
    assert decode(data[:33] + chunk(b"gAMA", b"") + data[33:])[0].tolist() == [[255] * 3, [50, 60, 70]]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode("PNG", exif=exif)
    assert decode(turned[:33] + chunk(b"gAMA", b"") + turned[33:]).shape == (64, 48, 3)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize(
    "extra",
    [
        segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta <<"),
        segment(0xE2, b"MPF\0II*\0ab"),
        segment(0xE2, b"ICC_PROFILE\0\x01\x02ab"),
        segment(0xEE, b"Adobe"),
        segment(0xED, b"Photoshop 3.0\x008BIM\xff\xff\xff\xff"),
        segment(0xE0, b"ab"),
    ],
)
@pytest.mark.parametrize("action", ["error", "always"])
def test_metadata_of_a_jpeg_decide_nothing(extra: bytes, action: str) -> None:
    data = encode("JPEG", quality=95)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter(action)
        assert (decode(data[:2] + extra + data[2:]) == decode(data)).all()
    assert not seen


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_without_its_end(options: dict[str, object]) -> None:
    data = encode("JPEG", photo(200, 150), quality=90, **options)
    whole = decode(data)
    for cut in (1, 2):
        assert (decode(data[:-cut]) == whole).all()
        assert (decode(data[:-cut], 40) == decode(data, 40)).all()
    near = decode(data[:-4])
    assert (near[:128] == whole[:128]).all() and np.abs(near.astype(int) - whole).mean() < 2
    assert tolerated.taken().keys() == {"a JPEG without its end"}
    for cut in (len(data) // 4, len(data) // 2):
        with pytest.raises(BrokenImage, match=r"truncated|Truncated"):
            decode(data[:-cut])
    assert not tolerated.taken()


def test_colours_of_four_channels_survive_the_mending() -> None:
    out = io.BytesIO()
    Image.fromarray(photo()).convert("CMYK").save(out, "JPEG", quality=95)
    data = out.getvalue()
    whole = decode(data)
    assert np.abs(whole.astype(int) - photo()).mean() < 3
    assert (decode(data[:-2]) == whole).all()


def test_metadata_of_a_webp_decide_nothing() -> None:
    for alpha in (photo(), np.dstack([photo(), np.full((48, 64), 255, np.uint8)])):
        data = encode("WEBP", alpha, lossless=True, xmp=b"<x/>" * 50, icc_profile=b"p" * 40)
        assert (decode(data[:-30]) == photo()).all()
        with pytest.raises(BrokenImage):
            decode(data[: len(data) // 2])


def test_threads_do_not_hear_each_other_and_others_are_warned() -> None:
    jpeg = encode("JPEG")
    odd = jpeg[:2] + segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff") + jpeg[2:]
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open(io.BytesIO(odd)) as image:
        image.getexif()
    assert not tolerated.taken()
    decode(odd)
    assert tolerated.taken() == {"Corrupt EXIF data": {"an image"}}


def test_the_line_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        tolerated.note(f"{number}\n.png", ["Tag 1,234 is odd. Skipped"])
    tolerated.note("5.png", ["Tag 7 is odd", "another thing"])
    tolerated.note("5.png", ["another thing"])
    tolerated.say_tolerated()
    said = "6 images were read in spite of flaws of the file (Tag N is odd: 6; another thing: 1), such as 0\\n.png"
    assert capsys.readouterr().err.startswith(said)
    tolerated.say_tolerated()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pack_says_what_was_passed_over(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.png").write_bytes(long_text() if number in (3, 30) else encode("PNG"))
    pack(str(tmp_path), tmp_path / "out.h5", size=16, workers=workers)
    said = capsys.readouterr().err
    assert said.count("in spite of flaws") == 1 and "0 of them broken" in said
    assert f"2 images were read in spite of flaws of the file ({METADATA}: 2), such as {tmp_path}" in said
