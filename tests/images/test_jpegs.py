"""Packs are decoded by torchvision, and nobody can tell: the pixels are Pillow's to the bit."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ktransfer.bench.photographs import photograph
from ktransfer.errors import BrokenImage
from ktransfer.images import decoding, jpegs

NEEDED = pytest.mark.skipif(
    not jpegs.decoders_agree(), reason="torchvision here has no decoder that agrees with Pillow's"
)


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@NEEDED
@pytest.mark.parametrize("quality", [1, 50, 90, 100])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (64, 48), (255, 341)])
def test_pixels_are_pillows(height: int, width: int, quality: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photograph(quality, height, width), quality=quality)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("Pillow decoded it"))
    assert np.array_equal(jpegs.decode(data), expected)


@pytest.mark.skipif("KTRANSFER_DATA" not in os.environ, reason="needs real images: KTRANSFER_DATA")
@NEEDED
def test_pixels_of_real_images_are_pillows() -> None:
    files = sorted(Path(os.environ["KTRANSFER_DATA"]).rglob("*.jpg"))
    assert files
    for path in files[:: max(1, len(files) // 100)]:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.mode == "RGB":
                assert np.array_equal(jpegs.decode(data), np.asarray(image))


def test_what_is_broken_is_broken_in_pillows_words() -> None:
    data = encoded(photograph(0, 60, 80))
    for damaged in (data[: len(data) // 2], data[:20], b"nothing"):
        with pytest.raises(BrokenImage) as ours:
            jpegs.decode(damaged)
        with pytest.raises(BrokenImage) as pillows:
            decoding.decode(damaged)
        assert str(ours.value) == str(pillows.value)


def test_other_kinds_go_to_pillow() -> None:
    for mode in ("L", "CMYK"):
        data = encoded(photograph(0, 60, 80).convert(mode))
        assert np.array_equal(jpegs.decode(data), decoding.decode(data)) and jpegs.decode(data).shape == (60, 80, 3)


def test_a_decoder_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = jpegs._decoded
    data = encoded(photograph(0, 60, 80))
    expected = decoding.decode(data)

    def missing(_: bytes) -> None:
        raise AttributeError("no such operator")

    for other in (lambda data: real(data) ^ 1, missing):
        monkeypatch.setattr(jpegs, "_decoded", other)
        jpegs.decoders_agree.cache_clear()
        assert not jpegs.decoders_agree()
        assert np.array_equal(jpegs.decode(data), expected)
    monkeypatch.undo()
    jpegs.decoders_agree.cache_clear()
