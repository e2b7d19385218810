"""Changes of colour in batches, each image with its own draws (ktransfer.rng): grey, and the jitter of SimCLR.

Brightness, saturation and hue are matrices on the three colours, and so is grey: an image is multiplied once by the
product of its own. Contrast then pulls it towards its mean. SimCLR (Chen et al., "A Simple Framework for Contrastive
Learning of Visual Representations", ICML 2020, appendix A) clips after each change, turns hues in HSV, and draws the
order of the changes; here the order is fixed, hues are turned around the grey axis of YIQ, and only the end is clipped.
"""

import math

import torch
from torch import Tensor

from ktransfer import rng
from ktransfer.training.device import constant

LUMA = (0.299, 0.587, 0.114)
JITTERED = 0.8  # share of the images that are jittered, SimCLR's
REACH, TURN = 0.8, 0.2  # of brightness, contrast and saturation, and of the hue's circle, at strength 1
# Around the axis of greys: rows give I and Q of a colour, and back.
_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


class Recolouring:
    """What becomes of the colours of a batch.

    Args:
        rows: (b,) int64, the images' rows, which key the draws.
        grey: share of the images that lose their colours.
        jitter: strength, 0 for none; SimCLR's is 1 for ImageNet, 0.5 for small images.
    """

    def __init__(self, rows: Tensor, grey: float, jitter: float, seed: int, epoch: int, purpose: str) -> None:
        draws = rng.uniform(seed, f"{purpose}/colour", epoch, rows, 6)
        luma = constant(LUMA, rows.device).expand(3, 3)
        same = torch.eye(3, device=rows.device)
        strength = torch.where(draws[:, 0] < JITTERED, jitter, 0.0)
        factors = 1 + (2 * draws[:, 1:4] - 1) * (REACH * strength).clamp(max=1)[:, None]
        brightness, self.contrast, saturation = (factor[:, None, None] for factor in factors.unbind(1))
        turned = _turns((2 * draws[:, 4] - 1) * TURN * strength)
        matrix = turned @ (brightness * (saturation * same + (1 - saturation) * luma))
        self.matrix = torch.where((draws[:, 5] < grey)[:, None, None], luma @ matrix, matrix)
        self.luma = constant(LUMA, rows.device)

    def __call__(self, pixels: Tensor, part: slice = slice(None)) -> Tensor:
        """(some, 3, h, w) float32 in 0..255, the images of that part of the batch -> the same, in 0..255."""
        changed = (self.matrix[part] @ pixels.flatten(2)).view_as(pixels)
        mean = torch.einsum("c,bchw->b", self.luma, changed) / pixels[0, 0].numel()
        contrast = self.contrast[part]
        return (changed * contrast[..., None] + ((1 - contrast) * mean[:, None, None])[..., None]).clamp_(0, 255)


def _turns(share: Tensor) -> Tensor:
    """(b,) shares of a full turn -> (b, 3, 3) turns of the hue."""
    angle = share * 2 * math.pi
    cosine, sine, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cosine, sine, zero, -sine, cosine], 1).view(-1, 3, 3)
    there = constant(_YIQ, share.device)
    turns: Tensor = torch.linalg.inv(there) @ turn @ there
    return turns
