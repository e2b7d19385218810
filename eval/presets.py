"""Other groups' settings of the linear probe: `linear --preset NAME`.

deepcluster  (docs/papers.md, Caron et al. 2018): average pools of fixed squares, no standardisation; in
             training a random square of the stored image (224 of 256) and its mirror image, at the test the mean
             probability over ten squares (corners and centre, and their mirror images); SGD with momentum, 90 epochs,
             batch 256, rate 0.01 / sqrt(1 + 0.01 x decay x step). Not followed: they report the best epoch on the test
             part, we the last; their ten squares are of the whole image, ours of its centre square; their decay
             differs by layer, of which conv3's 1e-7 is known and taken for all.
fair         (§6.2, Goyal et al. 2019): conv1 keeps the stride 2 of the puzzle, average pools of fixed squares, channels
             standardised (their batch norm without scale and shift), centre square and mirror image; rate 0.01, a tenth
             of that at 2/7, 4/7 and 6/7 of the way; batch 256; 28 epochs, which on ImageNet are their 140 000 steps;
             decay 5e-4. Not followed: their PCA noise on colours; mean and deviation are measured once, not per batch.

In both a tenth of the training part is held out, on which the rate is chosen where `--lrs` has several. Both are for
the layers conv1..conv5 of an AlexNet; on smaller images than theirs the grids are smaller.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ktransfer import networks, rng
from ktransfer.config import nearest
from ktransfer.data.loader import ImageLoader
from ktransfer.errors import UsageError
from ktransfer.networks import Network

from .arms import Arm
from .config import EvalConfig
from .learners.maps import Layer, Pooled, averaged_maps, choose_layers
from .learners.probe import Probes

Pools = dict[str, tuple[int, int, int]]
DEEPCLUSTER: Pools = {
    "conv1": (6, 6, 3),
    "conv2": (4, 4, 0),
    "conv3": (3, 3, 1),
    "conv4": (3, 3, 1),
    "conv5": (2, 2, 0),
}
FAIR: Pools = {"conv1": (28, 9, 0), "conv2": (24, 6, 0), "conv3": (14, 3, 0), "conv4": (14, 3, 0), "conv5": (16, 2, 0)}


@dataclass(frozen=True)
class Preset:
    """What a preset changes beside the settings of `config.PRESETS`.

    Attributes:
        pools: side, step and padding of the squares that maps are averaged over; linear/1's grids where there are none.
        schedule: of the learning rate, without a warm-up (`training.loop.rate`); that of `--schedule` where empty.
        crops: whether it sees random squares, and does not standardise their maps.
    """

    pools: Pools
    schedule: str = ""
    crops: bool = False


PRESETS = {
    "zhang": Preset({}),
    "deepcluster": Preset(DEEPCLUSTER, "sqrt", crops=True),
    "fair": Preset(FAIR, "sevenths"),
}


def check_preset(config: EvalConfig) -> None:
    """Find settings that the preset does not leave open.

    Raises:
        UsageError: one line.
    """
    for name in ("schedule", "warmup"):
        if PRESETS[config.preset].schedule and getattr(config, name) != getattr(EvalConfig(), name):
            raise UsageError(f"--{name}: --preset {config.preset} sets it; leave --{name} out")


def with_schedule(config: EvalConfig) -> EvalConfig:
    """The settings with the preset's schedule."""
    schedule = PRESETS[config.preset].schedule
    return replace(config, schedule=schedule, warmup=0.0) if schedule else config


def preset_layers(model: nn.Module, network: Network, config: EvalConfig) -> list[Layer]:
    """The layers to evaluate, averaged as the preset says.

    Raises:
        UsageError: a layer that is unknown or has no pool in the preset, or maps smaller than their pool.
    """
    pools = PRESETS[config.preset].pools
    if not pools:
        return choose_layers(model, network, config.layers)
    names = [name.strip() for name in config.layers.split(",")] if config.layers else list(pools)
    wrong = [name for name in names if name not in pools]
    if wrong:
        raise UsageError(
            f"--layers {wrong[0]}: --preset {config.preset} has no pool for it; {nearest(wrong[0], pools)}"
        )
    found: list[Layer] = []
    start = 0
    for layer in choose_layers(model, network, ",".join(names), grid=network.size):  # of the whole maps
        side, step, padding = pools[layer.name]
        cells = (layer.grid + 2 * padding - side) // step + 1
        if cells < 1:
            raise UsageError(
                f"--preset {config.preset}: {layer.name} leaves maps of {layer.grid}x{layer.grid}, less than its pool "
                f"of {side}x{side}; give a larger --size, or other --layers"
            )
        stop = start + layer.channels * cells**2
        found.append(replace(layer, grid=cells, start=start, stop=stop, pool=pools[layer.name]))
        start = stop
    return found


class Crops:
    """Maps of squares of images, computed when they are asked for; read as the training loop reads images.

    A row is image * views + view, and a view (y * places + x) * 2 + mirrored, 0 <= x, y < places.
    """

    def __init__(self, pooled: Pooled, images: ImageLoader, size: int) -> None:
        self.pooled, self.images = pooled, images
        self.places = images.size - size + 1
        self.views = 2 * self.places**2

    def ten(self) -> Tensor:
        """(10,) the views of the corners and the centre, and of their mirror images."""
        last, middle = self.places - 1, (self.places - 1) // 2
        corners = [(0, 0), (0, last), (last, 0), (last, last), (middle, middle)]
        return torch.tensor([(y * self.places + x) * 2 + mirrored for y, x in corners for mirrored in (0, 1)])

    def drawn(self, order: Tensor, seed: int, epoch: int) -> Tensor:
        """A random view of each image of (steps, b) `order`, as rows of the same shape."""
        view = rng.integers(seed, "eval/crop", epoch, order.flatten(), 1, self.views).view(order.shape)
        return order * self.views + view

    def batches(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """(b,) rows -> (rows, (b, d) maps, (b,) valid, seconds waited); each image is read once a batch."""
        wanted = [(part, *(part // self.views).unique(return_inverse=True)) for part in rows]
        read = self.images.batches(images for _, images, _ in wanted)
        for (coded, _, places), (_, pixels, valid, wait) in zip(wanted, read, strict=True):
            yield coded, self.pooled(pixels[places], coded % self.views), valid[places], wait


def cropped_maps(
    model: nn.Module,
    arm: Arm,
    layers: list[Layer],
    config: EvalConfig,
    device: torch.device,
) -> Pooled:
    """(b, 3, s, s) uint8 images and (b,) views of `Crops` -> (b, d) maps of those squares."""
    size, known = arm.network.size, networks.layers(arm.network, model)
    paths = {layer.name: known[layer.name] for layer in layers}
    averaged = partial(averaged_maps, model, arm.network, layers, paths, config, device)

    def pooled(pixels: Tensor, views: Tensor) -> Tensor:
        places = pixels.shape[-1] - size + 1
        squares = [
            image[:, y : y + size, x : x + size].flip(-1) if mirrored else image[:, y : y + size, x : x + size]
            for image, view in zip(pixels, views.tolist(), strict=True)
            for (y, x), mirrored in ((divmod(view // 2, places), view % 2),)
        ]
        return averaged(torch.stack(squares).to(device))

    return pooled


def ten_crop_predictions(
    probes: Probes, crops: Crops, rows: Tensor, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(probes, m) int64 classes of the highest mean probability over ten squares, and the (m,) valid rows."""
    predictions: list[Any] = []
    kept: list[Tensor] = []
    ten = crops.ten()
    probes.eval()
    with torch.no_grad():
        parts = rows.split(max(1, batch // len(ten)))
        coded = ((part[:, None] * crops.views + ten).flatten() for part in parts)
        for part, (_, maps, valid, _) in zip(parts, crops.batches(coded), strict=True):
            whole = valid.view(len(part), len(ten))[:, 0]
            outputs = probes(maps[valid].to(device))
            shares = [logits.float().softmax(1).view(-1, len(ten), logits.shape[1]).mean(1) for logits in outputs]
            predictions.append(torch.stack([share.argmax(1) for share in shares]).cpu())
            kept.append(part[whole])
    return torch.cat(predictions, dim=1), torch.cat(kept)
