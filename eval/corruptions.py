"""Fifteen common corruptions of images, five severities each: batched functions whose noise belongs to the image.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR
2019; docs/papers.md): the same fifteen kinds, most of them with their strengths. Lengths are scaled
with the image (theirs are for 224 pixels) and noise with the root of that, so that small images are not drowned;
frost is drawn instead of photographed; snow, glass, elastic and pixelate have strengths of their own, each severity
stronger than the one before (theirs of frost and fog are not, between 3 and 4). So numbers can be compared with each
other, not with those of the stored ImageNet-C.

One draw serves all five severities of an image: they differ by strength alone.
"""

import io
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ktransfer import rng

SEVERITIES = 5
FULL_SIDE = 224  # pixels, for which the lengths below are meant
_SUPERSAMPLED = 8


class Draws:
    """The random numbers of a batch for one kind of corruption: each a function of (seed, kind, name, row).

    Attributes:
        side: of the images, in pixels.
        scale: side / 224.
    """

    def __init__(self, seed: int, kind: str, rows: Tensor, side: int) -> None:
        self.seed, self.kind, self.rows, self.side = seed, kind, rows, side
        self.scale = side / FULL_SIDE
        self._made: dict[str, Tensor] = {}

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(batch, *shape) float32 in (0, 1), the same for all severities."""
        if name not in self._made:
            words = rng.words(self.seed, f"eval/{self.kind}/{name}", 0, self.rows, math.prod(shape))
            self._made[name] = (((words >> 9).to(torch.float32) + 0.5) * 2.0**-23).view(-1, *shape)
        return self._made[name]

    def normal(self, name: str, *shape: int) -> Tensor:
        """(batch, *shape) float32, standard normal."""
        if (key := f"normal {name}") not in self._made:
            self._made[key] = torch.special.ndtri(self.uniform(name, *shape))
        return self._made[key]


def severities(kind: str, pixels: Tensor, rows: Tensor, seed: int) -> Iterator[Tensor]:
    """The five severities of one kind of corruption, the mildest first.

    Args:
        kind: one of `KINDS`.
        pixels: (batch, 3, side, side) uint8.
        rows: (batch,) int64 on the same device, the images' rows, which key the draws.
        seed: 0 <= seed < 2**32.

    Yields:
        (batch, 3, side, side) uint8, on the device of `pixels`; an image depends on the batch by no more than the
        rounding of the device's sums.
    """
    draws = Draws(seed, kind, rows, pixels.shape[-1])
    x = pixels.to(torch.float32) / 255
    for level in range(SEVERITIES):
        yield (KINDS[kind](x, draws, level).clamp(0, 1) * 255).round().to(torch.uint8)


def gaussian_noise(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Normal noise on each number."""
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[level] * math.sqrt(draws.scale)
    return x + deviation * draws.normal("noise", *x.shape[1:])


def shot_noise(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Poisson noise of so many photons at full brightness, drawn exactly by the inverse of its distribution."""
    photons = (60, 25, 12, 5, 3)[level] / draws.scale
    most = int(photons + 9 * photons**0.5 + 12)
    mean = torch.arange(256, dtype=torch.float64, device=x.device)[:, None] * photons / 255
    count = torch.arange(most, dtype=torch.float64, device=x.device)
    log_p = torch.xlogy(count, mean) - mean - torch.lgamma(count + 1)
    # One sorted table for all 256 means: the mean's number plus the distribution there.
    below = log_p.exp().cumsum(1).clamp(max=1) + torch.arange(256, device=x.device)[:, None]
    number = (x * 255).round()
    key = number.double() + draws.uniform("noise", *x.shape[1:]).double()
    return (torch.searchsorted(below.flatten(), key) - number.long() * most).float() / photons


def impulse_noise(x: Tensor, draws: Draws, level: int) -> Tensor:
    """A share of the numbers becomes 0 or 1."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level] * draws.scale
    u = draws.uniform("noise", *x.shape[1:])
    return torch.where(u < share / 2, 0.0, torch.where(u > 1 - share / 2, 1.0, x))


def defocus_blur(x: Tensor, draws: Draws, level: int) -> Tensor:
    """The mean over a disk."""
    return _blurred(x, _disk((3, 4, 6, 8, 10)[level] * draws.scale, x.device)[None])


def glass_blur(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Each pixel comes from somewhere near, between two slight blurs."""
    blur = _gaussian((0.7, 0.9, 1.0, 1.1, 1.5)[level] * draws.scale, x.device)[None]
    reach = (1.4, 2.0, 3.0, 4.0, 5.5)[level] * draws.scale
    moved = (2 * draws.uniform("from", draws.side, draws.side, 2) - 1) * reach
    return _blurred(_displaced(_blurred(x, blur), moved), blur)


def motion_blur(x: Tensor, draws: Draws, level: int) -> Tensor:
    """A movement in a direction within 45 degrees of the horizontal."""
    angle = (draws.uniform("angle", 1)[:, 0] - 0.5) * (math.pi / 2)
    length, deviation = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _blurred(x, _streak(angle, length * draws.scale, deviation * draws.scale))


def zoom_blur(x: Tensor, draws: Draws, level: int) -> Tensor:
    """The mean of what a zoom passes through."""
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.33, 0.03))[level]
    zooms = [1.0, *np.arange(1, end, step).tolist()]  # the image itself counts twice, as in their code
    still = torch.zeros(len(x), draws.side, draws.side, 2, device=x.device)
    return torch.stack([_displaced(x, still, zoom) for zoom in zooms]).mean(0)


def snow(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Paler, with flakes that fall."""
    mean, threshold, deviation, paler = (
        (-0.1, 0.5, 4, 0.9),
        (-0.05, 0.5, 4, 0.85),
        (0.0, 0.5, 5, 0.8),
        (0.05, 0.5, 6, 0.7),
        (0.1, 0.5, 8, 0.6),
    )[level]
    cells = FULL_SIDE // 3  # flakes of three pixels of 224
    flakes = mean + 0.3 * draws.normal("flakes", 1, cells, cells)
    flakes = torch.where(flakes < threshold, 0.0, flakes.clamp(max=1))
    flakes = F.interpolate(flakes, size=(draws.side, draws.side), mode="bilinear", antialias=True)
    angle = -(draws.uniform("angle", 1)[:, 0] + 0.5) * (math.pi / 2)
    flakes = _blurred(flakes, _streak(angle, 12 * draws.scale, deviation * draws.scale))
    grey = x.mean(dim=1, keepdim=True)
    pale = paler * x + (1 - paler) * torch.maximum(x, 1.5 * grey + 0.5)
    return pale + flakes + flakes.flip((-1, -2))


def frost(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Under ridges of bluish ice."""
    kept, ice = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    ridges = 1 - (2 * _plasma(draws, "ice", 1.4) - 1).abs()
    colour = torch.tensor((0.75, 0.88, 1.0), device=x.device).view(1, 3, 1, 1)
    return kept * x + ice * ridges**2 * colour


def fog(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Behind a plasma cloud, dimmed to the brightness it had."""
    strength, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[level]
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    return (x + strength * _plasma(draws, "cloud", decay)) * brightest / (brightest + strength)


def brightness(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Brighter, with its hue and saturation."""
    value = x.amax(dim=1, keepdim=True)
    wanted = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[level]).clamp(max=1)
    return torch.where(value > 0, x * wanted / value.clamp(min=1 / 512), wanted)


def contrast(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Nearer to the mean of its colours."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean + (0.4, 0.3, 0.2, 0.1, 0.05)[level] * (x - mean)


def elastic_transform(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Stretched here and squeezed there."""
    field = draws.normal("field", 2, 17, 17)
    field = F.interpolate(field, size=(draws.side, draws.side), mode="bicubic", align_corners=True)
    return _displaced(x, (1.0, 1.75, 2.5, 3.5, 5.0)[level] * draws.scale * field.permute(0, 2, 3, 1))


def pixelate(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Made of fewer, larger squares."""
    cells = max(1, round((0.7, 0.55, 0.4, 0.3, 0.2)[level] * draws.side))
    return F.interpolate(F.adaptive_avg_pool2d(x, cells), size=(draws.side, draws.side), mode="nearest-exact")


def jpeg_compression(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Through a JPEG of low quality; encoded and decoded on the CPU, image by image."""
    quality = (25, 18, 15, 10, 7)[level]
    pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    coded = np.stack([_through_jpeg(image, quality) for image in pixels])
    return torch.from_numpy(coded).to(x.device).permute(0, 3, 1, 2).to(torch.float32) / 255


KINDS: dict[str, Callable[[Tensor, Draws, int], Tensor]] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
"""(batch, 3, side, side) float32 in 0..1, draws and a level in 0..4 -> the same, not yet clipped to 0..1."""


def _through_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """(s, s, 3), encoded and decoded."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _blurred(x: Tensor, kernels: Tensor) -> Tensor:
    """(b, c, s, s) with (b, k, k) kernels, or (1, k, k) for all; the border is repeated."""
    batch, channels = x.shape[:2]
    reach = kernels.shape[-1] // 2
    weights = kernels.expand(batch, -1, -1).repeat_interleave(channels, 0)[:, None]
    padded = F.pad(x, (reach,) * 4, mode="replicate").flatten(0, 1)[None]
    return F.conv2d(padded, weights, groups=batch * channels).view_as(x)


def _disk(radius: float, device: torch.device) -> Tensor:
    """(k, k): how much of each pixel lies within `radius` of the centre, in all 1."""
    reach = math.ceil(radius)
    inner = (torch.arange(_SUPERSAMPLED, device=device) + 0.5) / _SUPERSAMPLED - 0.5
    at = (torch.arange(-reach, reach + 1, device=device)[:, None] + inner).flatten()
    inside = ((at[:, None] ** 2 + at**2) <= max(radius, 0.5) ** 2).float()
    covered = F.avg_pool2d(inside[None], _SUPERSAMPLED)[0]
    return covered / covered.sum()


def _gaussian(deviation: float, device: torch.device) -> Tensor:
    """(k, k) of sum 1, cut at three deviations."""
    at = torch.arange(-math.ceil(3 * deviation), math.ceil(3 * deviation) + 1, device=device)
    line = torch.exp(-(at.float() ** 2) / (2 * deviation**2))
    kernel = line[:, None] * line
    return kernel / kernel.sum()


def _streak(angle: Tensor, length: float, deviation: float) -> Tensor:
    """(b, k, k) of sum 1: from the centre in the direction of each (b,) angle, fading like half a Gaussian."""
    reach = math.ceil(length)
    steps = torch.linspace(0, length, 2 * reach + 1, device=angle.device)
    weight = torch.exp(-(steps**2) / (2 * deviation**2))
    at = torch.arange(-reach, reach + 1, device=angle.device)
    across, down = (
        (1 - (at - turn[:, None, None] * steps[:, None]).abs()).clamp(min=0) for turn in (angle.cos(), angle.sin())
    )  # (b, steps, k) each: bilinear shares of the pixels around each step
    kernel = torch.einsum("t,bty,btx->byx", weight, down, across)
    return kernel / kernel.sum(dim=(1, 2), keepdim=True)


def _displaced(x: Tensor, moved: Tensor, zoom: float = 1.0) -> Tensor:
    """Each pixel from (b, s, s, 2) pixels (across, down) beside it, in an image enlarged by `zoom`; bilinear."""
    side = x.shape[-1]
    at = (2 * torch.arange(side, device=x.device) + 1) / side - 1
    place = torch.stack([at.expand(side, side), at[:, None].expand(side, side)], dim=-1)
    return F.grid_sample(x, place / zoom + moved * (2 / side), padding_mode="reflection", align_corners=False)


def _plasma(draws: Draws, name: str, decay: float) -> Tensor:
    """(b, 1, s, s) in 0..1, in each image from 0 to 1: noise of halved cells, each octave weaker by `decay`."""
    total = torch.zeros(1, device=draws.rows.device)
    cells, octave = 2, 0
    while cells < draws.side:
        noise = draws.uniform(f"{name}{cells}", 1, cells + 1, cells + 1) - 0.5
        smooth = F.interpolate(noise, size=(draws.side, draws.side), mode="bilinear", align_corners=True)
        total = total + smooth / decay**octave
        cells, octave = cells * 2, octave + 1
    low, high = total.amin(dim=(1, 2, 3), keepdim=True), total.amax(dim=(1, 2, 3), keepdim=True)
    return (total - low) / (high - low).clamp(min=1e-6)
