"""One image from a file, whatever the file holds: RGB pixels, or `BrokenImage` with the reason.

Pixels decide: what is wrong with anything else in a file is passed over, and counted (`images.tolerated`).
"""

import errno
import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

# Imported for their effect: a format is known to Pillow once its plugin is, and threads shall not race to load it.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from ktransfer.errors import BrokenImage
from ktransfer.images import depth, tolerated
from ktransfer.images.mending import mended

try:
    from PIL import AvifImagePlugin

    _AVIF = ("AVIF",) if AvifImagePlugin.SUPPORTED else ()
except ImportError:  # before Pillow 11.3
    _AVIF = ()

T = TypeVar("T")

# The rest of Pillow's formats is left out on purpose: some of them start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *_AVIF)
# 30,000 x 13,000 pixels pass; while it is decoded, the largest image takes about 4 GB.
MAX_PIXELS = 400_000_000
_BOMB = f"over the limit of {MAX_PIXELS:,} pixels (a decompression bomb?)"
_LARGEST_MENDED = 2**29  # bytes of a file
# Above this, one at a time: a pool of threads that all meet a giant must not multiply its memory.
_GIANT_PIXELS = 2**26
_GIANTS: AbstractContextManager[bool] = threading.Lock()
# Pillow's own limit is lower and knows no lists of rows; ours is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

tolerated.hear_pillow()
# Where nobody has asked for messages, Python would print those of Pillow's as they are.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_HEAD = 2**16
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = 5
"""From this orientation on width and height are swapped."""
# The machine ran short, the image is not to blame: recording it as broken would change results by chance.
_MACHINE_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def decode(source: Path | bytes, short_side: int | None = None, turned: bool = True) -> NDArray[np.uint8]:
    """The first frame of an image, upright, as RGB.

    Alpha is laid on white, CMYK is converted without a profile, 16-bit grey is divided by 257 (`depth.eight_bits` says
    what becomes of other deep values). Where only metadata, a checksum or the end of the file is damaged, the pixels
    are read, and the file is named in the end (`tolerated.say_tolerated`).

    Args:
        source: a file, or its bytes.
        short_side: the short side that is wanted in the end. A JPEG is decoded at 1/2, 1/4 or 1/8 by a smaller inverse
            DCT as long as at least twice `short_side` remains: the resize that follows then keeps its antialiasing, and
            the pixels differ little from those of a full decode. Other formats ignore it.
        turned: as EXIF says; else as it is stored.

    Returns:
        (height, width, 3) uint8.

    Raises:
        BrokenImage: the file is missing, empty, no image, damaged, truncated, or over `MAX_PIXELS`.
    """

    def pixels(image: Image.Image, opened: Path | bytes) -> NDArray[np.uint8]:
        if short_side is not None and image.format in ("JPEG", "MPO"):
            width, height = image.size
            scale = reduction(min(width, height), short_side)
            image.draft(image.mode, (width // scale, height // scale))
        with _GIANTS if image.width * image.height > _GIANT_PIXELS else nullcontext():
            return _loaded(image, opened, turned)

    return of_file(source, pixels)


def of_file(source: Path | bytes, use: Callable[[Image.Image, Path | bytes], T]) -> T:
    """What `use` makes of an opened image, within the size limit, and of what was opened.

    Where it fails, it is given the pixels of the same file without anything else, if they can be told.

    Raises:
        BrokenImage: see `decode`.
    """
    with tolerated.listening() as heard:
        try:
            found = _used(source, use)
        except _TooLarge:
            raise
        except BrokenImage as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                raise
            found = _mended(source, use, heard, error)
    if heard:
        tolerated.note("an image" if isinstance(source, bytes) else str(source), heard)
    return found


def _used(source: Path | bytes, use: Callable[[Image.Image, Path | bytes], T]) -> T:
    with _opened(source) as image:
        return use(image, source)


def _mended(
    source: Path | bytes, use: Callable[[Image.Image, Path | bytes], T], heard: list[str], error: BrokenImage
) -> T:
    if isinstance(source, Path):
        try:
            with _stream(source) as stream:
                data = stream.read(_LARGEST_MENDED + 1)
        except OSError:
            raise error from None
    else:
        data = source
    for what, pixels in mended(data) if len(data) <= _LARGEST_MENDED else ():
        heard.clear()
        try:
            found = _used(pixels, use)
        except BrokenImage:
            continue
        heard[:] = [what]
        return found
    raise error


def _loaded(image: Image.Image, opened: Path | bytes, turned: bool) -> NDArray[np.uint8]:
    tiles = depth.low_tiles(image)
    deep = image.mode.startswith("I")
    bits = depth.significant_bits(image, _head(opened)) if tiles or deep else None
    image.load()
    if tiles and depth.is_dark(image):
        with _opened(opened) as low:
            low.tile = tiles  # type: ignore[attr-defined]
            low.load()
            return _turned(depth.joined(image, low, bits), _orientation(image) if turned else 1)
    return upright(image, turned, bits)


def upright(image: Image.Image, turned: bool = True, bits: int | None = None) -> NDArray[np.uint8]:
    """(height, width, 3) uint8 of an opened image: `decode` says how it becomes RGB, and what `turned` is.

    Of its deep values, `bits` count.
    """
    return _turned(image, _orientation(image) if turned else 1, bits)


def _turned(image: Image.Image, orientation: int, bits: int | None = None) -> NDArray[np.uint8]:
    turn = _UPRIGHT.get(orientation)
    rgb = _rgb(image, bits)
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def reduction(side: int, short_side: int) -> int:
    """By how much a JPEG is decoded smaller, 1, 2, 4 or 8, when its short side is `side` and `short_side` is wanted."""
    return next((scale for scale in (8, 4, 2) if side >= scale * 2 * short_side), 1)


def short_side(source: Path | bytes) -> int:
    """The short side in pixels, from the header alone; raises `BrokenImage` where the header already is broken."""
    return of_file(source, lambda image, _: min(image.size))


def header(source: Path | bytes) -> tuple[int, int, int]:
    """Width, height and EXIF orientation (1 where there is none) as they are stored, from the header alone.

    Raises:
        BrokenImage: the header already is broken.
    """

    def stored(image: Image.Image, _: Path | bytes) -> tuple[int, int, int]:
        # Pillow would decode a whole PNG to see whether EXIF comes after its pixels.
        bare = image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys()
        return image.width, image.height, 1 if bare else _orientation(image)

    return of_file(source, stored)


def share_giants(lock: AbstractContextManager[bool]) -> None:
    """From now on decode the largest images under this lock, which other processes have too, one at a time."""
    global _GIANTS
    _GIANTS = lock


def square(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The centre square of an image, resized with an antialiased bilinear filter.

    The crop comes first, so that a 1 x 30,000 image costs no more than its single centre pixel.

    Args:
        pixels: (height, width, 3) uint8.
        size: side of the square, > 0.

    Returns:
        (size, size, 3) uint8; a view of `pixels` where nothing is to be resized.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    centre = pixels[top : top + side, left : left + side]
    if side == size:
        return centre
    return np.asarray(Image.fromarray(np.ascontiguousarray(centre)).resize((size, size), Image.Resampling.BILINEAR))


class _TooLarge(BrokenImage):
    """It is not to be decoded, by whatever means."""


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """An opened image within the size limit; whatever goes wrong until it is closed becomes a `BrokenImage`."""
    try:
        with _stream(source) as stream, Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _TooLarge(f"{image.width} x {image.height} pixels: {_BOMB}")
            yield image
    except (BrokenImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _TooLarge(_BOMB) from error
    except UnidentifiedImageError as error:
        raise BrokenImage(f"not an image in a known format ({', '.join(FORMATS)})") from error
    except OSError as error:
        if error.errno in _MACHINE_SHORT:
            raise
        raise BrokenImage(error.strerror or f"damaged: {error}") from error
    except Exception as error:  # hostile bytes make decoders raise anything: struct.error, SyntaxError, KeyError ...
        raise BrokenImage(f"damaged: {type(error).__name__}: {error}") from error


def _stream(source: Path | bytes) -> io.BufferedReader | io.BytesIO:
    if isinstance(source, bytes):
        if not source:
            raise BrokenImage("empty file")
        return io.BytesIO(source)
    # Opening a named pipe would wait for ever.
    if source.exists() and not source.is_file():
        raise BrokenImage("not a regular file")
    stream = source.open("rb")
    if not stream.peek(1):
        stream.close()
        raise BrokenImage("empty file")
    return stream


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF beside sound pixels is no reason to lose the image
        return 1


def _head(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:_HEAD]
    with source.open("rb") as stream:
        return stream.read(_HEAD)


def _rgb(image: Image.Image, bits: int | None) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        grey = depth.eight_bits(values, bits)
        if isinstance(clear := image.info.get("transparency"), int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas
