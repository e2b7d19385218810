"""Augmentations as batched functions on uint8 tensors, each image with its own draws (ktransfer.rng)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransfer import rng

MARGIN = 8 / 7
"""Images are kept a little larger than what a network sees of them: at 256 pixels for an input of 224."""
_PART_BYTES = 2**20  # what a core keeps to itself, and less than what torch takes huge pages for


def in_parts(make: Callable[[slice], Tensor], images: int, numbers: int, device: torch.device) -> Tensor:
    """What `make` gives for all images; on a CPU for a few at a time, so that what it needs on the way stays in the
    cache and is not taken from the system again.

    Args:
        make: a slice of the images -> (of them, ...) float32; each image must not depend on the others.
        images: how many there are.
        numbers: of an image, as far as known, 0 where there are none; only speed depends on it.
        device: where it computes.
    """
    step = max(1, _PART_BYTES // (4 * max(1, numbers))) * torch.get_num_threads()
    if device.type != "cpu" or images <= step:
        return make(slice(0, images))
    first = make(slice(0, step))
    made = first.new_empty((images, *first.shape[1:]))
    made[:step] = first
    for start in range(step, images, step):
        part = slice(start, start + step)
        made[part] = make(part)
    return made


def random_resized_crop(
    pixels: Tensor,
    rows: Tensor,
    size: int,
    seed: int,
    epoch: int,
    purpose: str,
    smallest: float = 0.08,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A random part of each image, resized to a square, and mirrored half the time.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip do per image: area uniform in [smallest, 1], aspect
    log-uniform in [3/4, 4/3] (here clipped to what fits instead of drawn again), place uniform.

    Args:
        pixels: (batch, 3, s, s) uint8.
        rows: (batch,) int64, the images' rows, which key the draws.
        size: side of the result in pixels.
        finish: what is done to crops, (some, 3, size, size) float32, each by itself, such as to normalise them.

    Returns:
        (batch, 3, size, size) float32 in 0..255, or as `finish` leaves it.
    """
    transforms = _transforms(rows, seed, epoch, purpose, smallest)

    def crops(part: slice) -> Tensor:
        cropped = _cropped(pixels[part], transforms[part], size)
        return finish(cropped) if finish else cropped

    return in_parts(crops, len(pixels), 3 * size**2, pixels.device)


def _cropped(pixels: Tensor, transform: Tensor, size: int) -> Tensor:
    with torch.autocast(pixels.device.type, enabled=False):  # a grid in bfloat16 would be half a pixel off
        # Nothing is turned: columns are the same in every row of the grid, and rows in every column.
        shape = (len(pixels), size, size)
        x = F.affine_grid(transform, [len(pixels), 3, 1, size], align_corners=False)[..., 0].expand(shape)
        y = F.affine_grid(transform, [len(pixels), 3, size, 1], align_corners=False)[..., 1].expand(shape)
    grid = torch.stack([x, y], dim=-1)
    source = pixels.to(torch.float32)
    return F.grid_sample(source, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _transforms(rows: Tensor, seed: int, epoch: int, purpose: str, smallest: float) -> Tensor:
    """(batch, 2, 3) float32: where a point of the result, in -1..1, lies in the image."""
    area, aspect, x, y, mirror = rng.uniform(seed, f"{purpose}/crop", epoch, rows, 5).unbind(1)
    area = smallest + (1 - smallest) * area
    aspect = torch.exp((2 * aspect - 1) * math.log(4 / 3))
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    # affine_grid's coordinates run from -1 to 1: a crop of half extent `width` has its centre in +-(1 - width).
    centre_x, centre_y = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    sign = torch.where(mirror < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(width)
    return torch.stack([sign * width, zero, centre_x, zero, height, centre_y], dim=1).view(-1, 2, 3)


def stored_side(size: int) -> int:
    """The side, in pixels, of the squares that images are read as, of which a network sees `size` x `size`."""
    return round(size * MARGIN)


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """(batch, 3, s, s) -> its central (batch, 3, size, size), size <= s."""
    start = (pixels.shape[-1] - size) // 2
    return pixels[..., start : start + size, start : start + size]


def random_square(pixels: Tensor, rows: Tensor, size: int, seed: int, epoch: int, purpose: str) -> Tensor:
    """A square of `size` pixels out of each image, at a random place and mirrored half the time, without scaling.

    (batch, 3, s, s) -> (batch, 3, size, size) of the same type, size <= s; `rows` (batch,) int64 key the draws.
    """
    corner = rng.integers(seed, f"{purpose}/place", epoch, rows, 2, pixels.shape[-1] - size + 1)
    mirrored = rng.integers(seed, f"{purpose}/mirror", epoch, rows, 1, 2).bool()
    place = torch.arange(size, device=pixels.device)
    y = corner[:, :1] + place
    x = corner[:, 1:] + torch.where(mirrored, place.flip(0), place)
    image = torch.arange(len(pixels), device=pixels.device)
    return pixels[image[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
