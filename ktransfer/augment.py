"""Augmentations as batched functions on uint8 tensors, each picture with its own draws (ktransfer.rng)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransfer import rng


def random_resized_crop(
    pixels: Tensor, rows: Tensor, size: int, seed: int, epoch: int, purpose: str, smallest: float = 0.08
) -> Tensor:
    """A random part of each picture, resized to a square, and mirrored half the time.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip do per picture: area uniform in [smallest, 1], aspect
    log-uniform in [3/4, 4/3] (here clipped to what fits instead of drawn again), place uniform.

    Args:
        pixels: (batch, 3, s, s) uint8.
        rows: (batch,) int64, the pictures' rows, which key the draws.
        size: side of the result in pixels.

    Returns:
        (batch, 3, size, size) float32 in 0..255.
    """
    area, aspect, x, y, mirror = rng.uniform(seed, f"{purpose}/crop", epoch, rows, 5).unbind(1)
    area = smallest + (1 - smallest) * area
    aspect = torch.exp((2 * aspect - 1) * math.log(4 / 3))
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    # affine_grid's coordinates run from -1 to 1: a crop of half extent `width` has its centre in +-(1 - width).
    centre_x, centre_y = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    sign = torch.where(mirror < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(width)
    transform = torch.stack([sign * width, zero, centre_x, zero, height, centre_y], dim=1).view(-1, 2, 3)
    with torch.autocast(pixels.device.type, enabled=False):  # a grid in bfloat16 would be half a pixel off
        grid = F.affine_grid(transform, [len(pixels), 3, size, size], align_corners=False)
    source = pixels.to(torch.float32)
    return F.grid_sample(source, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """(batch, 3, s, s) -> its central (batch, 3, size, size), size <= s."""
    start = (pixels.shape[-1] - size) // 2
    return pixels[..., start : start + size, start : start + size]


def random_square(pixels: Tensor, rows: Tensor, size: int, seed: int, epoch: int, purpose: str) -> Tensor:
    """A square of `size` pixels out of each picture, at a random place and mirrored half the time, without scaling.

    (batch, 3, s, s) -> (batch, 3, size, size) of the same type, size <= s; `rows` (batch,) int64 key the draws.
    """
    corner = rng.integers(seed, f"{purpose}/place", epoch, rows, 2, pixels.shape[-1] - size + 1)
    mirrored = rng.integers(seed, f"{purpose}/mirror", epoch, rows, 1, 2).bool()
    place = torch.arange(size, device=pixels.device)
    y = corner[:, :1] + place
    x = corner[:, 1:] + torch.where(mirrored, place.flip(0), place)
    picture = torch.arange(len(pixels), device=pixels.device)
    return pixels[picture[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
