"""Teachers that learn nothing: HOG, the hand-crafted baseline of the paper (CC+HOG), and the pixels themselves.

They are modules like any network, so that their layers are read in the same way. Their input is scaled to 0..1
(`UNIT`), their output is not pooled.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNIT = "0,0,0/1,1,1"
ORIENTATIONS = 9
CELL = 8
CLIP = 0.2
EPSILON = 1e-6
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SIZES = {"hog": 64, "pixels": 16}
"""Arch -> side of its images in pixels when none is asked for."""


class Hog(nn.Module):
    """Histograms of oriented gradients (Dalal and Triggs, CVPR 2005), batched on the device.

    (batch, 3, h, w) in 0..1, h and w multiples of 8 from 16 -> (batch, 36, h / 8 - 1, w / 8 - 1) float32. The paper
    does not state its settings; these are the usual ones: central differences (borders repeated), at each pixel the
    colour of the steepest gradient, 9 unsigned orientations with votes shared between the two nearest, cells of 8 x 8
    pixels, blocks of 2 x 2 cells at each cell, each block scaled to length 1, clipped at 0.2 and scaled again. Channel
    9 * (2 * row + column) + orientation of a block is its cell (row, column); orientation i is around (i + 0.5) * 20
    degrees.
    """

    layers: ClassVar[dict[str, str]] = {"hog": ""}

    def forward(self, x: Tensor) -> Tensor:
        """The blocks of each image."""
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x.float(), (1, 1, 1, 1), mode="replicate")
            down = (x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]) / 2
            right = (x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]) / 2
            squares, colour = (down.square() + right.square()).max(dim=1, keepdim=True)
            angle = torch.atan2(down.gather(1, colour), right.gather(1, colour))
            place = (angle % math.pi) * (ORIENTATIONS / math.pi) - 0.5
            lower = place.floor()
            share = place - lower
            strength = squares.sqrt()
            votes = torch.zeros(len(x), ORIENTATIONS, *strength.shape[2:], device=x.device)
            votes.scatter_add_(1, (lower % ORIENTATIONS).long(), strength * (1 - share))
            votes.scatter_add_(1, ((lower + 1) % ORIENTATIONS).long(), strength * share)
            cells = F.avg_pool2d(votes, CELL) * CELL**2
            high, wide = cells.shape[2] - 1, cells.shape[3] - 1
            corners = [cells[:, :, r : r + high, c : c + wide] for r in range(2) for c in range(2)]
            return _unit(_unit(torch.cat(corners, dim=1)).clamp(max=CLIP))


class Pixels(nn.Module):
    """The image itself: layer `rgb` (batch, 3, h, w) or `grey` (batch, 1, h, w), in 0..1."""

    layers: ClassVar[dict[str, str]] = {"grey": "grey", "rgb": "rgb"}

    def __init__(self) -> None:
        super().__init__()
        self.rgb = nn.Identity()
        self.grey = Grey()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, h, w) -> the same."""
        self.grey(x)
        colours: Tensor = self.rgb(x)
        return colours


class Grey(nn.Module):
    """(batch, 3, h, w) -> (batch, 1, h, w): the luma."""

    def forward(self, x: Tensor) -> Tensor:
        """The weighted sum of the colours."""
        return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


MODULES: dict[str, type[Hog] | type[Pixels]] = {"hog": Hog, "pixels": Pixels}


def _unit(blocks: Tensor) -> Tensor:
    # A constant block stays zero.
    return blocks / (blocks.square().sum(dim=1, keepdim=True) + EPSILON**2).sqrt()
