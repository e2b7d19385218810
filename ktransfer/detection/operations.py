"""Colour operations of AutoAugment and RandAugment on batches of canvases, each image with its own strength.

Constants as in the authors' detection code (docs/papers.md); lengths in pixels are meant for canvases
of 640 and scale with the canvas. `extents` (b, 2) float32 are width and height of an image on its canvas.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FILL = 128
MOST = 10  # the largest level
DESIGNED_FOR = 640  # pixels, the canvas for which lengths are given


def kept(pixels: Tensor, which: Tensor, fill: float = FILL) -> Tensor:
    """`pixels`, with `fill` where `which`, 1 or 0 and of the same dtype, is 0; whole numbers, of uint8 or in float32.

    In arithmetic, which a CPU does four times as fast as it chooses; that of uint8 goes round, so nothing is lost.
    """
    return (pixels - fill).mul_(which).add_(fill)


def equalise(pixels: Tensor, extents: Tensor) -> Tensor:
    """Flatten the histogram of each channel, as Pillow's ImageOps.equalize does: (b, 3, s, s) uint8 -> the same.

    Args:
        extents: (b, 2), width and height of the image on its canvas; nothing else is counted.
    """
    planes = [
        plane[: int(height), : int(width)]
        for image, (width, height) in zip(pixels, extents.tolist(), strict=True)
        for plane in image
    ]
    histogram = torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in planes])
    filled = histogram > 0
    same = torch.arange(256, device=pixels.device)
    last = torch.where(filled, same, 0).amax(1, keepdim=True)
    step = (histogram.sum(1, keepdim=True) - histogram.gather(1, last)) // 255
    before = histogram.cumsum(1) - histogram
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where((step == 0) | (filled.sum(1, keepdim=True) <= 1), same, table).to(torch.uint8)
    first = torch.arange(0, table.numel(), 256, dtype=torch.int32, device=pixels.device)
    index = pixels.int() + first.view(*pixels.shape[:2], 1, 1)
    return table.flatten().index_select(0, index.flatten()).view_as(pixels)


def solarise(pixels: Tensor, level: float) -> Tensor:
    """Invert what is at least as bright as the threshold 256 * level / 10."""
    threshold = math.ceil(256 * level / MOST)
    return pixels if threshold > 255 else torch.where(pixels < threshold, pixels, 255 - pixels)


def solarise_add(pixels: Tensor, level: float) -> Tensor:
    """Add 110 * level / 10 to what is darker than 128."""
    return (pixels < 128).to(torch.uint8).mul_(int(110 * level / MOST)).add_(pixels)


def colour(pixels: Tensor, level: float) -> Tensor:
    """Blend with the grey image: factor 1.8 * level / 10 + 0.1, 1 leaves it as it is."""
    factor = 1.8 * level / MOST + 0.1
    wide = pixels.float()
    red, green, blue = wide.unbind(1)
    grey = (red * 0.299 + green * 0.587 + blue * 0.114).round_()[:, None]
    return wide.sub_(grey).mul_(factor).add_(grey).round_().clamp_(0, 255).to(torch.uint8)


def sharpness(pixels: Tensor, level: float) -> Tensor:
    """Blend with a smoothed image: factor 1.8 * level / 10 + 0.1; the outermost pixels stay."""
    factor = 1.8 * level / MOST + 0.1
    wide = pixels.float()
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    smooth = wide.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(wide, kernel / 13, groups=3).round()
    return (smooth + factor * (wide - smooth)).round().clamp(0, 255).to(torch.uint8)


def cutout(pixels: Tensor, extents: Tensor, level: float, draws: Tensor) -> Tensor:
    """Grey out a square of 2 * 100 * level / 10 pixels around a random place of the image.

    Args:
        extents: (b, 2) float32, width and height of the image on its canvas.
        draws: (b, 2) in [0, 1), where the square's centre lies, from left and top.
    """
    side = pixels.shape[-1]
    half = 100 * level / MOST * side / DESIGNED_FOR
    place = torch.arange(side, device=pixels.device) + 0.5
    centre = draws * extents
    columns = (place - centre[:, :1]).abs() <= half
    rows = (place - centre[:, 1:]).abs() <= half
    return kept(pixels, (~(rows[:, None, :, None] & columns[:, None, None])).to(torch.uint8))


def translate_only_boxes(pixels: Tensor, boxes: Tensor, chosen: Tensor, level: float, signs: Tensor) -> Tensor:
    """Shift what lies within each chosen box down or up by 120 * level / 10 pixels, within the box; the boxes stay.

    Args:
        boxes: (b, m, 4) float32 x1, y1, x2, y2.
        chosen: (b, m) bool.
        signs: (b, m) of -1 and 1; 1 shifts down.
    """
    out = pixels.clone()
    length = round(120 * level / MOST * pixels.shape[-1] / DESIGNED_FOR)
    for image, number in chosen.nonzero().tolist():
        x1, y1, x2, y2 = (int(value) for value in boxes[image, number].round().tolist())
        content = out[image, :, y1:y2, x1:x2].clone()
        shift = min(length, content.shape[1])
        moved = torch.full_like(content, FILL)
        if signs[image, number] > 0:
            moved[:, shift:] = content[:, : content.shape[1] - shift]
        else:
            moved[:, : content.shape[1] - shift] = content[:, shift:]
        out[image, :, y1:y2, x1:x2] = moved
    return out
