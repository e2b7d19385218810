"""Every mode and format against pixels that are known, and every way in which a file can be bad."""

import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ktransfer.errors import BrokenImage
from ktransfer.images import decoding
from ktransfer.images.decoding import decode, square


def photo(width: int = 40, height: int = 30) -> np.ndarray:
    """Smooth, with a different gradient in each channel, so that lossy formats stay close."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), (x + y) * 255 / (width + height - 2)], 2).astype(
        np.uint8
    )


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 4),
        ("JPEG", {"quality": 98, "subsampling": 0}, 2),
        ("JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, 2),
        ("GIF", {}, 24),
        ("PPM", {}, 0),
        pytest.param(
            "AVIF", {"quality": 95}, 4, marks=pytest.mark.skipif("AVIF" not in decoding.FORMATS, reason="none")
        ),
    ],
)
def test_formats(kind: str, options: dict[str, object], tolerance: int) -> None:
    source = photo()
    got = decode(encode(Image.fromarray(source), kind, **options))
    assert got.dtype == np.uint8 and got.shape == (30, 40, 3)
    assert np.abs(got.astype(int) - source).mean() <= tolerance


def test_grey_black_and_white_and_palette() -> None:
    grey = photo()[:, :, 0]
    assert (decode(encode(Image.fromarray(grey), "PNG")) == grey[:, :, None]).all()
    bits = Image.fromarray(grey).point(lambda v: 255 * (v > 99)).convert("1")
    assert (decode(encode(bits, "PNG")) == np.where(grey > 99, 255, 0)[:, :, None]).all()
    palette = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "L").convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    expected = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]]
    assert decode(encode(palette, "PNG")).tolist() == expected


def test_alpha_is_laid_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], np.uint8)
    got = decode(encode(Image.fromarray(rgba), "PNG"))[0].astype(int)
    assert got[0].tolist() == [200, 0, 0] and got[1].tolist() == [255, 255, 255]
    assert np.abs(got[2] - (np.array([200, 0, 0]) * 128 + 255 * 127) / 255).max() <= 1
    grey = np.array([[[10, 255], [10, 0]]], np.uint8)
    assert decode(encode(Image.fromarray(grey, "LA"), "PNG"))[0].tolist() == [[10] * 3, [255] * 3]
    assert (decode(encode(Image.fromarray(rgba), "WEBP", lossless=True))[0, 1] == 255).all()


def test_transparent_entries_are_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([7, 8, 9, 50, 60, 70])
    palette.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        assert decode(encode(palette, kind, transparency=0))[0].tolist() == [[255, 255, 255], [50, 60, 70]]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decode(encode(rgb, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [4, 5, 6]]
    deep = Image.fromarray(np.array([[1000, 2000, 65535]], np.uint16))
    assert decode(encode(deep, "PNG", transparency=1000))[0, :, 0].tolist() == [255, 8, 255]


def test_cmyk_as_adobe_writes_it() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decode(encode(cmyk, "JPEG", quality=95))[8, 8].astype(int) - [255, 0, 0]).max() <= 3
    assert decode(encode(cmyk, "TIFF"))[8, 8].tolist() == [255, 0, 0]


def test_sixteen_bit_grey_is_rounded() -> None:
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(np.arange(65536) / 257).reshape(256, 256)
    for kind in ("PNG", "TIFF"):
        assert (decode(encode(Image.fromarray(deep), kind))[:, :, 1] == expected).all()
    big_endian = Image.frombytes("I;16B", (256, 256), deep.astype(">u2").tobytes())
    assert (decode(encode(big_endian, "TIFF"))[:, :, 1] == expected).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 17, 255]], np.float32), [0, 17, 255]),
        (np.array([[0, np.nan, 65535]], np.float32), [0, 0, 255]),
        (np.array([[-5, -5, -5]], np.float32), [0, 0, 0]),
    ],
)
def test_deep_greys(values: np.ndarray, expected: list[int]) -> None:
    assert decode(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == expected


# What each orientation means (EXIF 2.3, tag 274): where row 0 and column 0 of the stored image are shown.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", sorted(SHOWN))
def test_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    got = decode(encode(Image.fromarray(photo()), kind, exif=exif, **options)).astype(int)
    expected = SHOWN[orientation](photo())
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() <= (2 if kind == "JPEG" else 0)


def test_portable_maps() -> None:
    assert decode(b"P1 2 1\n1 0\n")[0, :, 0].tolist() == [0, 255]
    assert decode(b"P2 2 1 255\n0 200\n")[0, :, 0].tolist() == [0, 200]
    assert decode(b"P5 2 1 65535\n\0\0\xff\xff")[0, :, 0].tolist() == [0, 255]
    assert decode(b"P5 2 1 4095\n\0\0\x0f\xff")[0, :, 0].tolist() == [0, 255]


def test_damaged_exif_keeps_the_image() -> None:
    got = decode(encode(Image.fromarray(photo()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage"))
    assert got.shape == (30, 40, 3)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        got = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.abs(got[4, 4].astype(int) - [255, 0, 0]).max() <= 4, kind


@pytest.mark.parametrize(("target", "decoded"), [(200, 400), (100, 200), (50, 100), (25, 50), (12, 50), (201, 400)])
def test_reduced_decode_keeps_twice_the_target(target: int, decoded: int) -> None:
    data = encode(Image.fromarray(photo(600, 400)), "JPEG", quality=95)
    reduced = decode(data, target)
    assert min(reduced.shape[:2]) == decoded
    difference = square(reduced, target).astype(int) - square(decode(data), target)
    assert np.abs(difference).mean() < 1.5
    assert decoding.short_side(data) == 400


def test_reduced_decode_leaves_other_formats_alone() -> None:
    data = encode(Image.fromarray(photo(600, 400)), "PNG")
    assert (decode(data, 10) == photo(600, 400)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40))
def test_square_is_the_resized_centre(height: int, width: int, size: int) -> None:
    pixels = np.random.default_rng(height * 71 + width).integers(0, 256, (height, width, 3), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    centre = torch.from_numpy(pixels[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(centre, size=(size, size), mode="bilinear", antialias=True)
    got = square(pixels, size)
    assert got.shape == (size, size, 3) and got.dtype == np.uint8
    assert np.abs(got - expected[0].permute(1, 2, 0).numpy()).max() <= 1.01


def test_one_pixel_and_very_long_images() -> None:
    for width, height in ((1, 1), (1, 30_000), (30_000, 20)):
        source = np.full((height, width, 3), 77, np.uint8)
        got = decode(encode(Image.fromarray(source), "PNG"), 32)
        assert got.shape == source.shape
        assert (square(got, 32) == 77).all()
    assert square(decode(encode(Image.new("L", (30_000, 20), 77), "JPEG"), 4), 4).tolist() == [[[77] * 3] * 4] * 4


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [20_001, 30_000, 2_000_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(width: int) -> None:
    for read in (decode, decoding.short_side):
        with pytest.raises(BrokenImage, match="over the limit of 400,000,000 pixels"):
            read(png_header(width, 20_000))


def whole_jpeg() -> bytes:
    return encode(Image.fromarray(photo(200, 200)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is not an image\n", "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
        (whole_jpeg()[:-700], "truncated"),
        (whole_jpeg()[:30], "known format|damaged"),
        (encode(Image.fromarray(photo()), "PNG")[:-60], "damaged"),
        (encode(Image.fromarray(photo()), "GIF")[:-900], "damaged"),
        (encode(Image.fromarray(photo()), "WEBP")[:-60], "known format|damaged"),
        (encode(Image.fromarray(photo()), "BMP")[:-60], "damaged"),
        (encode(Image.fromarray(photo()), "TIFF", compression="tiff_lzw")[:-60], "known format|damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Truncated File")
def test_broken_files(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(BrokenImage, match=reason) as caught:
            decode(source)
        assert "\n" not in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]), st.randoms(use_true_random=False))
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_never_raise_anything_else(kind: str, random: object) -> None:
    data = bytearray(encode(Image.fromarray(photo()), kind))
    for _ in range(8):
        data[random.randrange(len(data))] = random.randrange(256)
    try:
        got = decode(bytes(data), 8)
    except BrokenImage:
        return
    assert got.ndim == 3 and got.shape[2] == 3 and got.dtype == np.uint8


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(BrokenImage, match="No such file"):
        decode(tmp_path / "missing.jpg")
    with pytest.raises(BrokenImage, match="not a regular file"):
        decode(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BrokenImage, match="not a regular file"):
        decode(tmp_path / "pipe.jpg")
    with pytest.raises(BrokenImage, match="too long"):
        decode(tmp_path / ("x" * 300))


def test_a_machine_that_is_short_is_not_a_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(whole_jpeg())

    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        decode(tmp_path / "a.jpg")


def test_threads_agree() -> None:
    data = whole_jpeg()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: decode(data, 50), range(16)))
    assert all((result == results[0]).all() for result in results)
