"""The filters of a network's first convolution, drawn and measured.

Protocol `filters/2`. Each filter is drawn on its own scale, grey where it is 0. `colour`: the share of a filter's
energy (squares) that is not common to its three colours; of random weights two thirds. `smooth`: the share at spatial
frequencies of at most half the highest in both directions; of random weights of 11 x 11 pixels 21 %.
Means over the filters that are not zero; intervals: normal, over these filters. No image is read.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.data.sheets import PAPER, save_sheet
from ktransfer.errors import UsageError
from ktransfer.networks import Network

from ..arms import Arm, model_of
from ..config import EvalConfig
from ..intervals import mean_of
from ..result import Result, result_of

PROTOCOL = "filters/2"
TITLE = "filters"
MEASURES = {"colour": "energy in colour %", "smooth": "energy at low frequencies %"}
MULTI_LABEL = True  # labels are not used
NEITHER_IS_BETTER = ("colour", "smooth")
NOTE = "weights alone, means over the filters; random weights have two thirds of their energy in colour."
LEAST = 44  # pixels of a filter's side
GAP = 3


def enough(splits: Any, config: EvalConfig) -> None:
    """No image is read."""


def check(evaluated: list[Network], splits: Any, config: EvalConfig, run: Path) -> None:
    """Find networks without a convolution of colours.

    Raises:
        UsageError: there is one.
    """
    for network in evaluated:
        first_filters(networks.build(network, 0, "check"), network)


def first_filters(model: nn.Module, network: Network) -> tuple[str, Tensor]:
    """The first convolution of colours: its name (of an AlexNet or VGG the layer's), and (n, 3, h, w) float32 weights.

    Raises:
        UsageError: there is none.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            named = next(iter(networks.layers(network, model))) if network.arch.startswith(("alexnet", "vgg")) else path
            return named, module.weight.detach().float().cpu()
    raise UsageError(f"--protocol filters: {network.arch} has no convolution of colour images; choose another protocol")


def evaluate(arm: Arm, splits: Any, config: EvalConfig, folder: Path, device: torch.device) -> Result:
    """Draw and measure the first filters of one network."""
    layer, weights = first_filters(model_of(arm, config.seed), arm.network)
    save_sheet(folder.parent.with_name("filters") / f"{arm.name}.png", draw(weights))
    scores = {layer: {"filters": len(weights), "pixels": list(weights.shape[2:]), **shares(weights)}}
    return result_of(arm.network, scores, []) | {"files": [f"{arm.name}.png"]}


def shares(weights: Tensor) -> dict[str, Any]:
    """How much of the energy of (n, 3, h, w) filters is colour, and how much is smooth."""
    energy = weights.square().sum(dim=(1, 2, 3))
    kept = weights[energy > 1e-12 * energy.max()].double()
    energy = kept.square().sum(dim=(1, 2, 3))
    grey = 3 * kept.mean(dim=1).square().sum(dim=(1, 2))
    power = torch.fft.fft2(kept).abs().square().sum(dim=1)
    low = [torch.fft.fftfreq(side).abs() <= 0.25 for side in weights.shape[2:]]
    smooth = power[:, low[0]][:, :, low[1]].sum(dim=(1, 2)) / power.sum(dim=(1, 2))
    return mean_of("colour", (1 - grey / energy).numpy()) | mean_of("smooth", smooth.numpy())


def draw(weights: Tensor) -> Image.Image:
    """(n, 3, h, w) filters side by side, enlarged without smoothing, in rows of about as many as there are rows."""
    count, _, height, width = weights.shape
    columns = int(np.ceil(np.sqrt(2 * count)))
    times = max(1, -(-LEAST // max(height, width)))
    step_x, step_y = width * times + GAP, height * times + GAP
    sheet = Image.new("RGB", (columns * step_x + GAP, -(-count // columns) * step_y + GAP), PAPER)
    for place, tile in enumerate(weights):
        largest = tile.abs().max().clamp(min=1e-12)
        pixels: NDArray[np.uint8] = (127.5 + 127.5 * tile / largest).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(np.ascontiguousarray(pixels.repeat(times, 0).repeat(times, 1)))
        sheet.paste(image, (GAP + place % columns * step_x, GAP + place // columns * step_y))
    return sheet
