"""Moves of pictures on their canvases as one affine map each, so that any number of them costs one resampling.

A map (b, 2, 3) float32 takes points (x, y, 1) of the old canvas to points of the new one; pixel centres lie at halves.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from .operations import FILL

Rest = ParamSpec("Rest")


def exact(function: Callable[Concatenate[Tensor, Rest], Tensor]) -> Callable[Concatenate[Tensor, Rest], Tensor]:
    """The function without autocast, whose products in bfloat16 would be whole pixels off."""

    @wraps(function)
    def within(first: Tensor, /, *rest: Rest.args, **named: Rest.kwargs) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest, **named)

    return within


def identity(count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count, 2, 3), the map that moves nothing."""
    return torch.eye(2, 3, device=device).repeat(count, 1, 1)


@exact
def then(first: Tensor, second: Tensor) -> Tensor:
    """The map that does `first`, then `second`."""
    return torch.cat([second[:, :, :2] @ first[:, :, :2], second[:, :, :2] @ first[:, :, 2:] + second[:, :, 2:]], 2)


@exact
def around(centre: Tensor, linear: Tensor) -> Tensor:
    """The map that applies (b, 2, 2) `linear` around (b, 2) `centre`, x before y."""
    return torch.cat([linear, centre[:, :, None] - linear @ centre[:, :, None]], dim=2)


def shift(by: Tensor) -> Tensor:
    """The map that moves all by (b, 2), x before y."""
    moved = identity(len(by), by.device)
    moved[:, :, 2] = by
    return moved


@exact
def inverse(maps: Tensor) -> Tensor:
    """The maps back."""
    back = torch.linalg.inv(maps[:, :, :2])
    return torch.cat([back, -back @ maps[:, :, 2:]], dim=2)


@exact
def move_pixels(pixels: Tensor, maps: Tensor, extents: Tensor, mode: str = "bilinear", fill: float = FILL) -> Tensor:
    """Move pictures on their canvases; what no pixel of the picture reaches is `fill`.

    Args:
        pixels: (b, c, s, s) uint8, or integer masks with mode "nearest".
        extents: (b, 2), width and height of the picture on the old canvas.

    Returns:
        The same shape and dtype.
    """
    side = pixels.shape[-1]
    back = inverse(maps.float())
    # grid_sample counts from -1 to 1 over the canvas, at pixel borders.
    scale = 2 / side
    theta = back.clone()
    theta[:, :, 2] = back[:, :, 2] * scale + back[:, :, 0] + back[:, :, 1] - 1
    grid = F.affine_grid(theta, [len(pixels), 1, side, side], align_corners=False)
    limit = (extents * scale - 1)[:, None, None]
    inside = ((grid > -1) & (grid < limit)).all(-1)
    # Held half a pixel inside of the picture, so that padding does not bleed into its right and lower edge.
    held = torch.minimum(grid, limit - scale / 2)
    moved = F.grid_sample(pixels.float(), held, mode=mode, padding_mode="border", align_corners=False)
    return torch.where(inside[:, None], moved.round(), fill).to(pixels.dtype)


@exact
def move_points(points: Tensor, maps: Tensor) -> Tensor:
    """(b, n, 2) points, x before y -> where they come to lie."""
    return points @ maps[:, :, :2].mT + maps[:, None, :, 2]


def move_boxes(boxes: Tensor, maps: Tensor, window: Tensor) -> Tensor:
    """The upright boxes around the moved corners of (b, m, 4) `boxes`, cut at (b, 4) `window`; x1, y1, x2, y2."""
    x1, y1, x2, y2 = boxes.unbind(2)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], dim=2).view(len(boxes), -1, 2)
    moved = move_points(corners, maps).view(len(boxes), -1, 4, 2)
    hull = torch.cat([moved.amin(2), moved.amax(2)], dim=2)
    low, high = window[:, None, :2].repeat(1, 1, 2), window[:, None, 2:].repeat(1, 1, 2)
    return torch.minimum(torch.maximum(hull, low), high)
