"""Images as fixed squares with their boxes: the long side resized, the rest padded, jittered on the device.

The long side of an image becomes `size` pixels, and what its short side leaves free, at the bottom or at the right, is
padding. So batches have one shape, and nothing is distorted. `extents` (b, 2) float32 are width and height of what is
image. Jitter is that of docs/papers.md: a scale, then a random crop of what is too large.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ktransfer import networks, rng
from ktransfer.data.loader import CPU, ImageLoader
from ktransfer.detection import frames
from ktransfer.detection.data import Detection, Objects
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.progress import say_once

SMALLEST = 1.0  # pixels: a box that a crop leaves narrower or lower is dropped


class Jitter(NamedTuple):
    """How a batch is moved: x' = scale * x - left, mirrored within the image before that where `flip`.

    Attributes:
        scale: (b,) float32.
        offset: (b, 2) float32 >= 0, what is cropped at the left and at the top, in pixels of the result.
        flip: (b,) bool.
        extents: (b, 2) float32, before.
        size: side of the canvas.
    """

    scale: Tensor
    offset: Tensor
    flip: Tensor
    extents: Tensor
    size: int

    def moved_extents(self) -> Tensor:
        """(b, 2) float32: width and height of what is image, after."""
        return (self.extents * self.scale[:, None] - self.offset).clamp(max=self.size)


def canvases(
    data: Detection, size: int, workers: int | None = None, cache: str = "auto", device: torch.device = CPU
) -> ImageLoader:
    """The images as (3, size, size) uint8 canvases, padded with zeros, on `device`, as a source for `loop.fit`.

    An image whose sides are not those that its file states (turned upside by EXIF, replaced) is broken: its boxes
    would lie elsewhere.
    """

    def read(row: int, short_side: int | None) -> NDArray[np.uint8]:
        return laid(data.read, row, (int(data.sizes[row, 0]), int(data.sizes[row, 1])), size)

    return ImageLoader(replace(data, read=read), size, workers, cache=cache, device=device)


def laid(
    read: Callable[[int, int | None], NDArray[np.uint8]], row: int, stated: tuple[int, int], size: int
) -> NDArray[np.uint8]:
    """(size, size, 3) uint8: image `row` of `stated` width and height on its canvas; raises `BrokenImage`."""
    width, height = (round(side) for side in extent(stated, size))
    pixels = read(row, min(width, height))
    shape = pixels.shape[1], pixels.shape[0]
    if not frames.fits(shape, stated):
        hint = "; boxes of the other EXIF frame? (--exif)" if frames.fits(shape[::-1], stated) else ""
        raise BrokenImage(f"is {shape[0]} x {shape[1]} pixels, and its boxes are for {stated[0]} x {stated[1]}{hint}")
    image = torch.from_numpy(np.require(pixels, requirements="W")).permute(2, 0, 1)[None]
    if shape != (width, height):
        # Pillow's antialiased filter but for rounding, in a third of the time.
        image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    canvas = torch.zeros(3, size, size, dtype=torch.uint8)
    canvas[:, :height, :width] = image[0]
    laid: NDArray[np.uint8] = canvas.permute(1, 2, 0).numpy()
    return laid


def extent(stated: tuple[int, int], size: int) -> tuple[float, float]:
    """Width and height, whole numbers >= 1, of an image of `stated` width and height on a canvas."""
    factor = size / max(stated)
    return float(max(1, round(stated[0] * factor))), float(max(1, round(stated[1] * factor)))


def extents(data: Detection, size: int) -> Tensor:
    """(n, 2) float32: width and height of each image on its canvas."""
    return torch.tensor([extent((int(width), int(height)), size) for width, height in data.sizes]).view(-1, 2)


def factors(data: Detection, size: int) -> Tensor:
    """(n, 4) float32: by these the boxes of an image become those on its canvas."""
    return (extents(data, size) / torch.from_numpy(data.sizes)).repeat(1, 2)


def look(flag: str, data: Detection, size: int, words: str, enlarged: float | None, outlines: bool = False) -> None:
    """Say how many objects are narrower or lower than a pixel of their canvas, and so nothing to a training.

    Args:
        flag: what makes canvases so small, such as "--size 64".
        size: of the canvases.
        words: what these images are, such as "training".
        enlarged: by at most this they are in training; None where nothing is learned from them.
        outlines: of an object with polygons these are looked at, and not its box; nothing of one whose pixels have
            classes by themselves.

    Raises:
        UsageError: all are, so that nothing would be learned.
    """
    if outlines and data.label_map is not None:
        return
    scales = factors(data, size)[:, 0].tolist()
    sides = [_sides_of(one, outlines) * factor for one, factor in zip(data.objects, scales, strict=True)]
    found = np.concatenate([np.zeros(0), *sides])
    small, thing = int((found < SMALLEST).sum()), "outlines" if outlines else "boxes"
    if small and enlarged is not None and found.max() * enlarged < SMALLEST:
        raise UsageError(
            f"{data.spec}: all {small:,} {thing} of the {words} split are narrower or lower than a pixel at {flag}; "
            f"give a larger {flag.split()[0]}, or, if they are shares of width and height, give them in pixels"
        )
    if small:
        cannot = "cannot be found" if enlarged is None else "are nothing to learn"
        say_once(
            f"{data.spec}: {small:,} of {len(found):,} {thing} of the {words} split are narrower or lower than a pixel "
            f"at {flag}, and {cannot}; give a larger {flag.split()[0]}"
        )


def _sides_of(one: Objects, outlines: bool) -> NDArray[np.float64]:
    """(m,) the shorter side of each object but crowds in pixels of the image, of its polygons where it has some."""
    found = (one.boxes[:, 2:] - one.boxes[:, :2]).astype(np.float64).min(1, initial=np.inf)
    for place, outline in enumerate(one.outlines if outlines else ()):
        if isinstance(outline, list):
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in outline])
            found[place] = np.ptp(points, axis=0).min()
    return np.asarray(found[~one.crowd], np.float64)


def draw_jitter(
    rows: Tensor, extents: Tensor, size: int, seed: int, epoch: int, scales: tuple[float, float] = (1.0, 1.0)
) -> Jitter:
    """Scale uniform in `scales`, place of the crop uniform, flip with probability 1/2, for each of (b,) rows."""
    s, x, y, mirror = rng.uniform(seed, "detection/jitter", epoch, rows, 4).unbind(1)
    scale = scales[0] + (scales[1] - scales[0]) * s
    over = (extents * scale[:, None] - size).clamp(min=0)
    return Jitter(scale, over * torch.stack([x, y], dim=1), mirror < 0.5, extents, size)


def move_pixels(pixels: Tensor, jitter: Jitter, mode: str = "bilinear") -> Tensor:
    """(b, c, size, size) uint8 or float -> float32 in the same range; what is not image holds any values.

    `mode` "nearest" keeps the numbers of classes.
    """
    size = jitter.size
    centres = torch.arange(size, device=pixels.device) + 0.5
    with torch.autocast(pixels.device.type, enabled=False):  # a grid in bfloat16 would be pixels off
        x = (centres[None, :] + jitter.offset[:, :1]) / jitter.scale[:, None]
        y = (centres[None, :] + jitter.offset[:, 1:]) / jitter.scale[:, None]
        width, height = jitter.extents.unbind(1)
        # Held inside of the image, so that padding does not bleed into its edge.
        x = torch.minimum(x.clamp(min=0.5), (width - 0.5)[:, None])
        y = torch.minimum(y.clamp(min=0.5), (height - 0.5)[:, None])
        x = torch.where(jitter.flip[:, None], width[:, None] - x, x)
        across, down = x * (2 / size) - 1, y * (2 / size) - 1
        grid = torch.stack([across[:, None, :].expand(-1, size, -1), down[:, :, None].expand(-1, -1, size)], dim=3)
        return F.grid_sample(pixels.float(), grid, mode=mode, padding_mode="border", align_corners=False)


def move_boxes(boxes: Tensor, jitter: Jitter, place: int) -> tuple[Tensor, Tensor]:
    """The boxes (m, 4) of image `place` of the batch after the jitter, and (m,) bool, which of them are left."""
    moved = move_points(boxes.view(-1, 2, 2), jitter, place)
    low, high = moved.amin(1), moved.amax(1)
    edge = jitter.moved_extents()[place]
    moved = torch.cat([low.clamp(min=0).minimum(edge), high.clamp(min=0).minimum(edge)], dim=1)
    return moved, (moved[:, 2:] - moved[:, :2] >= SMALLEST).all(1)


def move_points(points: Tensor, jitter: Jitter, place: int) -> Tensor:
    """(..., 2) points x, y of image `place` of the batch after the jitter, not clipped."""
    x, y = points.unbind(-1)
    x = torch.where(jitter.flip[place], jitter.extents[place, 0] - x, x)
    return torch.stack([x, y], dim=-1) * jitter.scale[place] - jitter.offset[place]


def inside(extents: Tensor, size: int) -> Tensor:
    """(b, 1, size, size) bool: whether the centre of a pixel is image, and not padding."""
    x, y = _sides(extents, size)
    return (y[:, :, None] & x[:, None, :])[:, None]


def _sides(extents: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(b, size) bool each: whether a column and a row of a canvas has image in it."""
    centres = torch.arange(size, device=extents.device) + 0.5
    x, y = (centres < side[:, None] for side in extents.unbind(1))
    return x, y


def mirror(canvases: Tensor, extents: Tensor) -> Tensor:
    """(b, c, s, s) canvases whose images, (b, 2) whole numbers of pixels, are mirrored in their places."""
    places = torch.arange(canvases.shape[-1], device=canvases.device)
    width = extents[:, :1].long()
    columns = torch.where(places < width, width - 1 - places, places)
    return canvases.take_along_dim(columns[:, None, None, :], 3)


def normalise(pixels: Tensor, extents: Tensor, how: str) -> Tensor:
    """Canvases (b, 3, size, size), uint8 or float in 0..255, as float32 that a network reads; padding becomes 0.

    As `networks.normalise`, where `how` "picture" takes mean and deviation of what is image alone.
    """
    if how != "picture":
        across, down = (one.float() for one in _sides(extents, pixels.shape[-1]))
        return networks.normalise(pixels, how).mul_(across[:, None, None]).mul_(down[:, None, :, None])
    mask = inside(extents, pixels.shape[-1])
    x = pixels.float() * mask
    count = mask.sum(dim=(1, 2, 3), keepdim=True) * 3
    mean = x.sum(dim=(1, 2, 3), keepdim=True) / count
    centred = (x - mean) * mask
    variance = centred.square().sum(dim=(1, 2, 3), keepdim=True) / count
    return centred * (variance + 1e-5).rsqrt()
