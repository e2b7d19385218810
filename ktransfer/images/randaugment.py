"""RandAugment in batches, each image with its own draws (ktransfer.rng).

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space" (NeurIPS 2020): N of 14
operations one after the other, all of level M. Operations and levels are torchvision's (`v2.RandAugment`, 31 levels);
here images stay floats where they can, what is turned or moved is interpolated, and what comes in from outside is grey.

There are three kinds, each computed for all its images at once: geometry is a grid, brightness, colour, contrast and
sharpness are blends of two images, all others a table of 256 values for each channel.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransfer import rng
from ktransfer.errors import UsageError
from ktransfer.training.device import constant

LEVELS = 31
MOST = 10
"""Operations of an image, at most."""
FILL = 128.0
GEOMETRY = ("shear x", "shear y", "translate x", "translate y", "rotate")
BLENDS = ("brightness", "colour", "contrast", "sharpness")
TABLES = ("posterise", "solarise", "autocontrast", "equalise")
OPERATIONS = ("identity", *GEOMETRY, *BLENDS, *TABLES)
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's

Change = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(b, 3, s, s) float32 in 0..255; (b,) int64, which of a kind; (b,) -1 or 1; level -> the images changed."""


def numbers(given: str) -> tuple[int, int]:
    """`N,M` -> how many operations an image has, 1 to 10, and their level, 0 to 30.

    Raises:
        UsageError: something else.
    """
    count, _, level = (part.strip() for part in given.partition(","))
    if not (count.isdecimal() and level.isdecimal() and 1 <= int(count) <= MOST and int(level) < LEVELS):
        raise UsageError(
            f"--randaugment {given}: must be N,M: 1 to {MOST} operations an image, and their level of 0 to "
            f"{LEVELS - 1}, such as 2,9"
        )
    return int(count), int(level)


class RandAugment:
    """What becomes of a batch.

    Args:
        rows: (b,) int64, the images' rows, which key the draws.
        count: operations of each image.
        level: of all of them, 0 to 30.
    """

    def __init__(self, rows: Tensor, count: int, level: int, seed: int, epoch: int, purpose: str) -> None:
        self.level = level
        self.chosen = rng.integers(seed, f"{purpose}/randaugment", epoch, rows, count, len(OPERATIONS))
        self.signs = 1.0 - 2.0 * rng.integers(seed, f"{purpose}/randaugment/sign", epoch, rows, count, 2)

    def __call__(self, pixels: Tensor, part: slice = slice(None)) -> Tensor:
        """(some, 3, s, s) float32 in 0..255, the images of that part of the batch -> the same, in 0..255."""
        with torch.autocast(pixels.device.type, enabled=False):  # a grid in bfloat16 would be half a pixel off
            for chosen, signs in zip(self.chosen[part].unbind(1), self.signs[part].unbind(1), strict=True):
                for kind, change in ((GEOMETRY, moved), (BLENDS, blended), (TABLES, mapped)):
                    pixels = _changed(pixels, chosen - OPERATIONS.index(kind[0]), len(kind), change, signs, self.level)
        return pixels


def _changed(pixels: Tensor, which: Tensor, kinds: int, change: Change, signs: Tensor, level: int) -> Tensor:
    """Those of the images changed of which `which` is in 0..kinds - 1.

    On a CPU no others are computed; on a GPU all are, as nothing there may wait to learn how many they are.
    """
    meant = (which >= 0) & (which < kinds)
    if pixels.device.type != "cpu":
        changed = change(pixels, which.clamp(0, kinds - 1), signs, level)
        return torch.where(meant[:, None, None, None], changed, pixels)
    places = meant.nonzero()[:, 0]
    if not len(places):
        return pixels
    return pixels.index_copy(0, places, change(pixels[places], which[places], signs[places], level))


def moved(pixels: Tensor, which: Tensor, signs: Tensor, level: int) -> Tensor:
    """Shears along both axes from the upper left corner, by up to 0.3; shifts by up to 150 of 331 of the side; turns by
    up to 30 degrees. A positive sign shears to the left or up, shifts to the right or down, turns against the clock."""
    side = pixels.shape[-1]
    share = level / (LEVELS - 1)
    shear, shift = signs * 0.3 * share, signs * int(150 / 331 * side * share)
    angle = signs * math.radians(30 * share)
    none, one = torch.zeros_like(signs), torch.ones_like(signs)
    # Where a pixel of the result, counted from the middle, comes from; the corner of a shear is `middle` away.
    middle = side / 2
    rows = [
        [one, shear, shear * middle, none, one, none],
        [one, none, none, shear, one, shear * middle],
        [one, none, -shift, none, one, none],
        [one, none, none, none, one, -shift],
        [angle.cos(), -angle.sin(), none, angle.sin(), angle.cos(), none],
    ]
    every = torch.stack([torch.stack(row, 1) for row in rows])  # (kinds, b, 6)
    chosen = every[which, _each(which)].view(-1, 2, 3)
    scale = constant((1.0, 1.0, 1 / middle), pixels.device)  # affine_grid counts in halves of the side
    grid = F.affine_grid(chosen * scale, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - FILL, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + FILL


def blended(pixels: Tensor, which: Tensor, signs: Tensor, level: int) -> Tensor:
    """Away from black, the grey image, its mean or the smoothed image, or towards it: by a factor of up to 1 +- 0.9."""
    factor = (1 + signs * 0.9 * level / (LEVELS - 1))[:, None, None, None]
    luma = constant(_LUMA, pixels.device).view(1, 3, 1, 1)
    grey = (pixels * luma).sum(1, keepdim=True).floor().expand_as(pixels)
    mean = grey.mean((1, 2, 3), keepdim=True).expand_as(pixels)
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    smooth = pixels.clone()
    if min(pixels.shape[-2:]) > 2:  # the outermost pixels stay
        smooth[..., 1:-1, 1:-1] = F.conv2d(pixels, kernel / 13, groups=3)
    other = torch.stack([torch.zeros_like(pixels), grey, mean, smooth])[which, _each(which)]
    return (other + factor * (pixels - other)).clamp(0, 255)


def mapped(pixels: Tensor, which: Tensor, signs: Tensor, level: int) -> Tensor:
    """Fewer bits (down to 4), inverted from a threshold on (down to 0), contrast stretched or histogram flattened,
    channel by channel; of whole numbers."""
    whole = pixels.round().long()
    value = torch.arange(256, device=pixels.device)
    bits = 8 - round(level / ((LEVELS - 1) / 4))
    posterised = value & (256 - 2 ** (8 - bits))
    solarised = torch.where(value >= 255 * (1 - level / (LEVELS - 1)), 255 - value, value)
    least, most = (whole.flatten(2).aminmax(dim=2)[place][..., None] for place in (0, 1))
    stretched = (value - least) * 255 // (most - least).clamp(min=1)
    stretched = torch.where(most == least, value, stretched)
    shape = stretched.shape  # (b, 3, 256)
    fixed = (posterised.expand(shape), solarised.expand(shape))
    tables = torch.stack([*fixed, stretched, _equalised(whole)])[which, _each(which)].clamp(0, 255)
    return tables.gather(2, whole.flatten(2)).view_as(pixels).to(pixels.dtype)


def _equalised(whole: Tensor) -> Tensor:
    """(b, 3, s, s) int64 in 0..255 -> (b, 3, 256), the table that flattens each channel's histogram."""
    flat = whole.flatten(2)
    counts = torch.zeros((*flat.shape[:2], 256), dtype=torch.int64, device=flat.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    value = torch.arange(256, device=flat.device)
    last = torch.where(counts > 0, value, 0).amax(2, keepdim=True)
    step = (flat.shape[2] - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    return torch.where(step == 0, value, (before + step // 2) // step.clamp(min=1)).clamp(max=255)


def _each(which: Tensor) -> Tensor:
    return torch.arange(len(which), device=which.device)
