"""The embedded data set: small colour scenes, drawn on demand, the same bytes for the same arguments.

Twelve classes are told apart by shape and structure alone: hue, lightness, texture, lighting, pose, size and place are
drawn without looking at the class, and the object is lighter or darker than what is behind it with equal chance.
Everything is a pure function of (seed, split, index, size). No torch here: `ktransfer --help` and `scenes` stay light.
"""

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ktransfer.data.scenes_shapes import SHAPES, Polygon
from ktransfer.errors import StageError, UsageError
from ktransfer.files import write_json
from ktransfer.progress import track

CLASSES: tuple[str, ...] = tuple(SHAPES)
VERSION = 1
MIN_SIZE, MAX_SIZE = 32, 2048

_Array = NDArray[np.floating[Any]]
# Drawn at so many times the resolution, then averaged. Pillow fills every pixel that a polygon touches, which widens
# bars by about one sample: hence many of them where width counts.
_AREA_SAMPLES, _MASK_SAMPLES, _CLUTTER_SAMPLES = 16, 6, 2
_LUMA = (0.299, 0.587, 0.114)
_TRIES = 16


@dataclass(frozen=True)
class SceneSpec:
    """What `scenes:` stands for: number of images, their side in pixels, seed."""

    images: int = 2000
    size: int = 96
    seed: int = 0


@dataclass(frozen=True)
class SceneObject:
    """One object of an image.

    `category` counts from 0 (COCO files count from 1); `box` is (x, y, width, height) in pixels, the extent of the
    polygons; `polygons` are flat lists x, y, x, y, ... in pixels (0 is the left or upper edge of the image). Their
    union is the silhouette. A hole (ring, key) is part of its polygon, joined to the rim by a seam without width, so
    that even-odd filling leaves it empty. Objects lie wholly inside the image and hide nothing of each other.
    """

    name: str
    category: int
    box: tuple[float, float, float, float]
    polygons: list[list[float]]


def parse(spec: str) -> SceneSpec:
    """Read `scenes:` or `scenes:images=2000,size=96,seed=0`; UsageError for any other key or value."""
    valid = {field.name: field.default for field in fields(SceneSpec)}
    usage = "write scenes:" + ",".join(f"{key}={value}" for key, value in valid.items()) + " (each may be left out)"
    kind, colon, rest = spec.partition(":")
    if kind != "scenes" or not colon:
        raise UsageError(f"{spec!r} is not a scenes: specification; {usage}")
    values: dict[str, int] = {}
    for item in rest.split(",") if rest.strip() else ():
        key, _, text = (piece.strip() for piece in item.partition("="))
        if key not in valid or key in values or not re.fullmatch("[0-9]{1,18}", text):
            why = "repeated" if key in values else "not KEY=WHOLE NUMBER with a valid key"
            raise UsageError(f"{spec!r}: {item.strip()!r} is {why}; valid keys are {', '.join(valid)}; {usage}")
        values[key] = int(text)
    parsed = SceneSpec(**values)
    _check(parsed, 1)
    return parsed


def render(seed: int, split: str, index: int, size: int) -> tuple[NDArray[np.uint8], list[SceneObject]]:
    """Draw one image: a pure function of its arguments.

    Args:
        seed: >= 0.
        split: any name; images of different splits ("train", "val") are independent.
        index: >= 0; the class of the image is `index % len(CLASSES)`.
        size: side in pixels, at least 8.

    Returns:
        (size, size, 3) uint8 RGB, and its objects: the first gives the class; a quarter of the images have one or two
        further, smaller ones of any class (fewer where there is no room).
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    outlines = _arrange(rng, index % len(CLASSES), size)
    noise = _noise(rng, size), _noise(rng, size)
    image = _clutter(rng, _background(rng, size, noise))
    for _, outline in outlines:
        _paint(rng, image, outline, noise[1])
    x, y = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    light = rng.uniform(0.8, 1.1) + rng.uniform(0, 0.5) * ramp
    image *= (light[:, :, None] * rng.uniform(0.93, 1.07, 3)).astype(np.float32)
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, 0.03))
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels, [_describe(category, outline) for category, outline in outlines]


def objects(seed: int, split: str, index: int, size: int) -> list[SceneObject]:
    """The objects of the image that `render` draws from the same arguments, without drawing it."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    return [_describe(category, outline) for category, outline in _arrange(rng, index % len(CLASSES), size)]


def coverage(polygons: Sequence[Sequence[float]], size: int) -> NDArray[np.float32]:
    """(size, size) float32 in [0, 1]: the share of each pixel that the union of COCO polygons covers."""
    return _coverage(_points(polygons), (0, 0, size, size), _MASK_SAMPLES)


def write_scenes(out: Path, images: int, size: int = 128, seed: int = 0) -> None:
    """Write the data set as class folders and as COCO files.

    `out/train/CLASS/000123.jpg` (`images` of them) and `out/val/CLASS/...` (a quarter as many, at least one per class),
    JPEG of quality 90, then `out/train.json` and `out/val.json`: file names relative to `out`, categories from 1,
    boxes, polygons, areas in pixels.

    Raises:
        UsageError: before anything is written, for fewer images than classes, a size or seed out of range, a folder
            that is not empty or cannot be written.
        StageError: writing failed on the way (a full disk).
    """
    _check(SceneSpec(images, size, seed), len(CLASSES))
    try:
        out.mkdir(parents=True, exist_ok=True)
        full, writable = any(out.iterdir()), os.access(out, os.W_OK | os.X_OK)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
    if full:
        raise UsageError(f"{out} is not empty; choose a new folder for --out")
    if not writable:
        raise UsageError(f"{out} cannot be written (no permission); choose another --out")
    try:
        for split, count in (("train", images), ("val", max(len(CLASSES), images // 4))):
            _write_split(out, split, count, size, seed)
    except OSError as error:
        raise StageError(f"{out} is incomplete ({error.strerror}); make room, delete it and start again") from error


def _write_split(out: Path, split: str, count: int, size: int, seed: int) -> None:
    for name in CLASSES:
        (out / split / name).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for index in track(range(count), count, f"draw {split}"):
        pixels, objects = render(seed, split, index, size)
        name = f"{split}/{objects[0].name}/{index:06d}.jpg"
        Image.fromarray(pixels).save(out / name, quality=90)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for item in objects:
            outline = _points(item.polygons)
            area = _coverage(outline, _bounds(outline), _AREA_SAMPLES).sum()
            notes.append(
                {
                    "id": len(notes) + 1,
                    "image_id": index + 1,
                    "category_id": item.category + 1,
                    "bbox": list(item.box),
                    "segmentation": item.polygons,
                    "area": round(float(area), 2),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    write_json(out / f"{split}.json", {"images": images, "annotations": notes, "categories": categories})


def _check(spec: SceneSpec, fewest: int) -> None:
    if spec.images < fewest:
        raise UsageError(f"images={spec.images}: fewer than {fewest}; give at least {fewest}")
    if not MIN_SIZE <= spec.size <= MAX_SIZE:
        raise UsageError(f"size={spec.size}: not between {MIN_SIZE} and {MAX_SIZE} pixels; choose a size in that range")
    if not 0 <= spec.seed < 2**32:
        raise UsageError(f"seed={spec.seed}: not between 0 and {2**32 - 1}; choose a seed in that range")


def _arrange(rng: Generator, category: int, size: int) -> list[tuple[int, list[Polygon]]]:
    """The objects as (category, polygons in pixels); their extents are disjoint."""
    more = int(rng.integers(1, 3)) if rng.random() < 0.25 else 0
    # A large main object would leave no room for others.
    placed = [(category, _pose(rng, category, size * rng.uniform(0.45, 0.6 if more else 0.85), size))]
    for _ in range(more):
        other, extent = int(rng.integers(len(CLASSES))), size * rng.uniform(0.22, 0.34)
        for _ in range(_TRIES):
            outline = _pose(rng, other, extent, size)
            if all(_apart(outline, there) for _, there in placed):
                placed.append((other, outline))
                break
    return placed


def _pose(rng: Generator, category: int, extent: float, size: int) -> list[Polygon]:
    """A shape turned, stretched and placed inside the image; the longer side of its box is `extent` pixels."""
    polygons = SHAPES[CLASSES[category]](rng)
    turn, stretch, lean = np.deg2rad(rng.uniform(-35, 35)), rng.uniform(0.85, 1.18), rng.uniform(-0.15, 0.15)
    mirror = rng.choice([-1.0, 1.0])
    rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotate @ np.array([[mirror * stretch, lean], [0.0, 1 / stretch]])
    turned = [polygon @ matrix.T for polygon in polygons]
    low, high = _extent(turned)
    scale = extent / (high - low).max()
    corner = rng.uniform(0, size - (high - low) * scale)
    return [(polygon - low) * scale + corner for polygon in turned]


def _extent(polygons: list[Polygon]) -> tuple[Polygon, Polygon]:
    points = np.concatenate(polygons)
    return points.min(axis=0), points.max(axis=0)


def _apart(first: list[Polygon], second: list[Polygon]) -> bool:
    (low1, high1), (low2, high2) = _extent(first), _extent(second)
    return bool(((low1 > high2 + 1) | (low2 > high1 + 1)).any())


def _describe(category: int, outline: list[Polygon]) -> SceneObject:
    rounded = [polygon.round(2) for polygon in outline]
    low, high = _extent(rounded)
    box = (*low.tolist(), *(high - low).round(2).tolist())
    return SceneObject(CLASSES[category], category, box, [polygon.ravel().tolist() for polygon in rounded])


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[_Array, _Array]:
    """Pixel centres as shares of the side: x (1, size) and y (size, 1)."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[None, :], line[:, None]


@lru_cache(maxsize=4)
def _frequency(size: int) -> _Array:
    radius: _Array = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]) * size
    radius[0, 0] = np.inf
    return radius.astype(np.float32)


def _noise(rng: Generator, size: int) -> _Array:
    """(size, size) float32 of mean 0 and deviation 1, amplitude falling with frequency as in photographs."""
    frequency = _frequency(size)
    white = rng.standard_normal((2, *frequency.shape), np.float32)
    spectrum = (white[0] + 1j * white[1]) * frequency ** np.float32(-rng.uniform(1.0, 1.6))
    field = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    return np.asarray(field / field.std(), np.float32)


def _colour(rng: Generator, luma: float, chroma: float) -> _Array:
    """(3,) float32 RGB of any hue with the given lightness."""
    raw = rng.uniform(-1, 1, 3).tolist()
    grey = sum(weight * part for weight, part in zip(_LUMA, raw, strict=True))
    hue = [part - grey for part in raw]
    # Shrinking towards grey keeps the lightness where clipping would change it.
    room = min((1 - luma if part > 0 else luma) / (abs(part) + 1e-6) for part in hue)
    strength = min(chroma / (max(map(abs, hue)) + 1e-3), room)
    return np.array([luma + strength * part for part in hue], np.float32)


def _background(rng: Generator, size: int, noise: tuple[_Array, _Array]) -> _Array:
    """(size, size, 3) float32: a ramp between two colours under coloured 1/f noise."""
    x, y = _grid(size)
    luma, angle = rng.uniform(0.25, 0.75), rng.uniform(0, 2 * np.pi)
    first = _colour(rng, luma, rng.uniform(0, 0.35))
    second = _colour(rng, luma + rng.uniform(-0.15, 0.15), rng.uniform(0, 0.35))
    ramp = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1).astype(np.float32)
    image: _Array = first + ramp[:, :, None] * (second - first)
    for field in noise:
        image += field[:, :, None] * (_colour(rng, 0.5, 0.5) * np.float32(rng.uniform(0.04, 0.14)))
    return image.clip(0, 1)


def _clutter(rng: Generator, image: _Array) -> _Array:
    """Draw strokes, bars, triangles and discs of the colours around them: shape parts that belong to no object."""
    side = len(image)
    size = side * _CLUTTER_SAMPLES
    canvas = Image.fromarray((image * 255).astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for kind in rng.integers(0, 4, rng.integers(6, 19)):
        centre, reach = rng.uniform(0, size, 2), size * rng.uniform(0.04, 0.2)
        column, row = (centre / _CLUTTER_SAMPLES).astype(int)
        luma = float(image[row, column] @ _LUMA) + rng.uniform(-0.2, 0.2)
        shade = _colour(rng, min(max(luma, 0.03), 0.97), rng.uniform(0, 0.4))
        fill = (int(shade[0] * 255), int(shade[1] * 255), int(shade[2] * 255))
        if kind == 0:
            draw.ellipse([*(centre - reach / 2), *(centre + reach * rng.uniform(0.2, 0.5))], fill=fill)
        elif kind == 1:
            draw.polygon((centre + rng.uniform(-reach, reach, (3, 2))).ravel().tolist(), fill=fill)
        else:
            path = centre + np.cumsum(rng.uniform(-reach, reach, (int(kind), 2)), axis=0)
            joined = np.concatenate([centre[None], path]).ravel().tolist()
            draw.line(joined, fill=fill, width=max(1, int(size * rng.uniform(0.01, 0.045))), joint="curve")
    return np.asarray(canvas.reduce(_CLUTTER_SAMPLES), np.float32) / 255


def _points(polygons: Sequence[Sequence[float]]) -> list[Polygon]:
    return [np.reshape(flat, (-1, 2)) for flat in polygons]


def _bounds(outline: list[Polygon]) -> tuple[int, int, int, int]:
    """The whole pixels around an outline: left, top, right, bottom."""
    low, high = _extent(outline)
    return int(low[0]), int(low[1]), int(np.ceil(high[0])), int(np.ceil(high[1]))


def _coverage(outline: list[Polygon], bounds: tuple[int, int, int, int], samples: int) -> NDArray[np.float32]:
    left, top, right, bottom = bounds
    canvas = Image.new("L", ((right - left) * samples, (bottom - top) * samples))
    draw = ImageDraw.Draw(canvas)
    for polygon in outline:
        draw.polygon(np.floor((polygon - (left, top)) * samples).ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(samples), np.float32) / np.float32(255)


def _paint(rng: Generator, image: _Array, outline: list[Polygon], noise: _Array) -> None:
    """Paint one object into `image`: two colours, both set off from what is behind it, mixed by a texture, shaded."""
    size = len(image)
    low, high = _extent(outline)
    left, top, right, bottom = bounds = _bounds(outline)
    window = np.s_[top:bottom, left:right]
    alpha = _coverage(outline, bounds, _MASK_SAMPLES)
    behind = float((image[window] @ _LUMA).mean())
    gap = rng.uniform(0.28, 0.4)
    sides = [side for side in (-1, 1) if 0.04 <= behind + side * gap <= 0.96]
    side = rng.choice(sides or [1 if behind < 0.5 else -1])
    luma = min(max(behind + side * gap, 0.02), 0.98)
    # The second colour is never nearer to the background than the first.
    other = min(max(luma + side * rng.uniform(0, 0.25), 0.02), 0.98)
    first, second = _colour(rng, luma, rng.uniform(0, 0.5)), _colour(rng, other, rng.uniform(0, 0.5))
    x, y = _grid(size)
    mix = _texture(rng, x[:, window[1]], y[window[0]], noise[window])
    angle = rng.uniform(0, 2 * np.pi)
    middle, extent = (low + high) / (2 * size), (high - low).max() / size
    slope = (x[:, window[1]] - middle[0]) * np.cos(angle) + (y[window[0]] - middle[1]) * np.sin(angle)
    shade = 1 + rng.uniform(0, 0.25) / extent * slope
    paint = (first + mix[:, :, None] * (second - first)) * shade[:, :, None].astype(np.float32)
    image[window] += alpha[:, :, None] * (paint - image[window])


def _texture(rng: Generator, x: _Array, y: _Array, noise: _Array) -> _Array:
    """(h, w) float32 in [0, 1]: plain, striped, dotted, chequered or mottled."""
    kind, angle, waves = int(rng.integers(5)), rng.uniform(0, np.pi), rng.uniform(8, 20) * 2 * np.pi
    if kind == 0:
        return np.zeros(noise.shape, np.float32)
    if kind == 1:
        return (0.5 + 0.5 * noise).clip(0, 1)
    u = np.sin(waves * (x * np.cos(angle) + y * np.sin(angle)))
    v = np.sin(waves * (y * np.cos(angle) - x * np.sin(angle)))
    wave: _Array = (u, u + v - 0.6, 2 * u * v)[kind - 2]
    return (0.5 + 2 * wave).clip(0, 1)
