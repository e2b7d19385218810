"""Projected gradient descent in an L-infinity ball: the smallest changes of pixels that make a classifier err."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import rng

REACH = 2.5
"""Steps and their size reach so many times across the radius, so that every corner can be come to from anywhere."""


def pgd(model: nn.Module, pixels: Tensor, targets: Tensor, rows: Tensor, eps: float, steps: int, seed: int) -> Tensor:
    """Adversarial images after Madry et al. (ICLR 2018), untargeted.

    From a random start in the ball, each step adds 2.5 eps / steps by the sign of the cross-entropy's gradient, and the
    result is brought back into the ball and into 0..255. The last step's image counts.

    Args:
        model: (b, 3, s, s) float32 in 0..255 -> (b, classes) logits; in evaluation mode.
        pixels: (b, 3, s, s) uint8.
        targets: (b,) int64, the true classes.
        rows: (b,) int64, the images' rows, which key the start.
        eps: radius in 0..255, > 0.
        steps: at least 1.

    Returns:
        (b, 3, s, s) float32 in 0..255, no number farther than eps from that of `pixels`.
    """
    clean = pixels.to(torch.float32)
    low, high = (clean - eps).clamp(min=0), (clean + eps).clamp(max=255)
    start = rng.uniform(seed, "eval/pgd", 0, rows, pixels[0].numel()).view_as(clean)
    found = torch.clamp(clean + (2 * start - 1) * eps, low, high)
    for _ in range(steps):
        found.requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(model(found).float(), targets, reduction="sum")
            (slope,) = torch.autograd.grad(loss, found)
        found = torch.clamp(found.detach() + REACH * eps / steps * slope.sign(), low, high)
    return found
