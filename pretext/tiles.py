"""Tiles of images: what the pretext tasks share, as batched functions on the device of the images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransfer.training.device import constant

PLAIN, GREY, PROJECTED = range(3)
"""Kinds of colour, for `recolour`."""

# Six times the colour matrices, which are then whole numbers: float32 sums of them are exact in any order and on any
# device, and normalising takes the factor out again. The projection removes the direction (-1, 2, -1).
_SIXTHS = (
    ((6, 0, 0), (0, 6, 0), (0, 0, 6)),
    ((2, 2, 2), (2, 2, 2), (2, 2, 2)),
    ((5, 2, -1), (2, 2, 2), (-1, 2, 5)),
)

# Added to the variance: a tenth of a grey level, squared, so that a constant tile becomes zeros.
_EPSILON = (6 * 0.1) ** 2


def gather(pixels: Tensor, image: Tensor, corner: Tensor, tile: int) -> Tensor:
    """Cut tiles out of images.

    Args:
        pixels: (n, 3, S, S) uint8.
        image: (b, s) int64, which of the n images each tile is cut from.
        corner: (b, s, 3, 2) int64, upper left pixel (y, x) of the tile in each channel.
        tile: its side in pixels.

    Returns:
        (b, s, 3, tile, tile) uint8.
    """
    _, channels, size, _ = pixels.shape
    plane = image[:, :, None] * channels + torch.arange(channels, device=pixels.device)
    y, x = corner.unbind(-1)
    first = (plane * size + y) * size + x
    starts = first[..., None] + size * torch.arange(tile, device=pixels.device)
    # Whole tile rows are gathered from overlapping windows: one index for `tile` bytes instead of one for each.
    windows = pixels.flatten().unfold(0, tile, 1)
    return windows.index_select(0, starts.flatten()).view(*starts.shape, tile)


def recolour(tiles: Tensor, colour: Tensor) -> Tensor:
    """Colour tiles by kind: grey is the mean of the channels, the projection I - aa'/a'a with a = (-1, 2, -1).

    Args:
        tiles: (b, s, 3, t, t) uint8.
        colour: (b, s) int64, PLAIN, GREY or PROJECTED.

    Returns:
        (b, s, 3, t, t) float32, exact, in sixths of a grey level.
    """
    matrices = constant(_SIXTHS, tiles.device).float()[colour][..., None, None]
    values = tiles.float()
    mixed = matrices[:, :, :, 0] * values[:, :, :1]
    for channel in (1, 2):
        mixed.addcmul_(matrices[:, :, :, channel], values[:, :, channel : channel + 1])
    return mixed


def drop_colours(tiles: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
    """One channel of each tile less its mean, and noise in the place of the two others.

    Args:
        tiles: (b, s, 3, t, t) uint8.
        kept: (b, s) int64 in 0..2, the channel that stays.
        noise: (b, s, 3, t, t) float32, in grey levels.

    Returns:
        (b, s, 3, t, t) float32 in sixths of a grey level, as from `recolour`.
    """
    values = tiles.float()
    values = values - values.mean(dim=(3, 4), keepdim=True)
    return 6 * torch.where(F.one_hot(kept, 3).bool()[..., None, None], values, noise)


def normalise(tiles: Tensor) -> Tensor:
    """Each tile on its own: mean 0 and standard deviation 1 over its channels and pixels; a constant tile gives zeros.

    The released code multiplies by 50 after this; here the scale stays 1, which is what today's initialisations expect.
    """
    return F.layer_norm(tiles, tiles.shape[2:], eps=_EPSILON)
