"""Moves of images on their canvases as one affine map each, so that any number of them costs one resampling.

A map (b, 2, 3) float32 takes points (x, y, 1) of the old canvas to points of the new one; pixel centres lie at halves.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransfer.detection.operations import FILL, kept

Rest = ParamSpec("Rest")
Made = TypeVar("Made")


def exact(function: Callable[Concatenate[Tensor, Rest], Made]) -> Callable[Concatenate[Tensor, Rest], Made]:
    """The function without autocast, whose products in bfloat16 would be whole pixels off."""

    @wraps(function)
    def within(first: Tensor, /, *rest: Rest.args, **named: Rest.kwargs) -> Made:
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


class Route(NamedTuple):
    """Where the pixels of moved images come from, on canvases that count from -1 to 1, at pixel borders.

    Attributes:
        back: (b, 2, 3) float32, from the new canvas to the old one.
        edge: (b, 2) float32, the right and the lower edge of the images on the old canvas.
        reach: b of left, top, right, bottom: pixels of the new canvas beyond which nothing of the image comes to lie.
    """

    back: Tensor
    edge: Tensor
    reach: list[list[int]]


@exact
def route(maps: Tensor, extents: Tensor, side: int) -> Route:
    """The way back on canvases of `side` pixels; `extents` (b, 2), width and height of the images on the old ones."""
    back = inverse(maps.float())
    scale = 2 / side
    beside = back[:, :, 2:] * scale + back[:, :, :1] + back[:, :, 1:2] - 1
    corners = torch.tensor([0.0, 0.0, side, side], device=maps.device).expand(len(maps), 4)
    frame = torch.cat([torch.zeros_like(extents), extents], dim=1)[:, None]
    hull = move_boxes(frame, maps, corners)[:, 0]
    reach = torch.cat([hull[:, :2].floor(), hull[:, 2:].ceil()], dim=1).int().tolist()
    return Route(torch.cat([back[:, :, :2], beside], dim=2), extents * scale - 1, reach)


def move_pixels(pixels: Tensor, maps: Tensor, extents: Tensor, mode: str = "bilinear", fill: float = FILL) -> Tensor:
    """Move images on their canvases; what no pixel of the image reaches is `fill`.

    Args:
        pixels: (b, c, s, s) uint8, or integer masks with mode "nearest".
        extents: (b, 2), width and height of the image on the old canvas.

    Returns:
        The same shape and dtype.
    """
    return follow(pixels, route(maps, extents, pixels.shape[-1]), mode, fill).to(pixels.dtype)


@exact
def follow(pixels: Tensor, taken: Route, mode: str = "bilinear", fill: float = FILL) -> Tensor:
    """As `move_pixels`, for a route that is known; float32, whole numbers."""
    moved = torch.full_like(pixels, fill, dtype=torch.float32)
    lefts, tops, rights, bottoms = zip(*taken.reach, strict=True) if taken.reach else ((0,),) * 4
    left, top, right, bottom = min(lefts), min(tops), max(rights), max(bottoms)
    if left >= right or top >= bottom:
        return moved
    scale = 2 / pixels.shape[-1]
    back, edge = taken.back[..., None, None], taken.edge[..., None, None]
    x, y = ((torch.arange(*ends, device=pixels.device) + 0.5) * scale - 1 for ends in ((left, right), (top, bottom)))
    source = back[:, :, 0] * x + (back[:, :, 1] * y[:, None] + back[:, :, 2])
    within = (source - (edge - 1) / 2).abs_() < (edge + 1) / 2
    # Held half a pixel inside of the image, so that padding does not bleed into its right and lower edge.
    held = torch.minimum(source, edge - scale / 2).permute(0, 2, 3, 1)
    found = F.grid_sample(pixels.float(), held, mode=mode, padding_mode="border", align_corners=False).round_()
    moved[:, :, top:bottom, left:right] = kept(found, (within[:, :1] & within[:, 1:]).float(), fill)
    return moved


@exact
def move_points(points: Tensor, maps: Tensor) -> Tensor:
    """(b, n, 2) points, x before y -> where they come to lie."""
    return points @ maps[:, :, :2].mT + maps[:, None, :, 2]


def move_boxes(boxes: Tensor, maps: Tensor, window: Tensor) -> Tensor:
    """The upright boxes around the moved corners of (b, m, 4) `boxes`, cut at (b, 4) `window`; x1, y1, x2, y2."""
    x1, y1, x2, y2 = boxes.unbind(2)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], dim=2).view(len(boxes), 4 * boxes.shape[1], 2)
    moved = move_points(corners, maps).view(*boxes.shape[:2], 4, 2)
    hull = torch.cat([moved.amin(2), moved.amax(2)], dim=2)
    low, high = window[:, None, :2].repeat(1, 1, 2), window[:, None, 2:].repeat(1, 1, 2)
    return torch.minimum(torch.maximum(hull, low), high)
