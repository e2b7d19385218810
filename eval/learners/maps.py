"""Maps of frozen layers: one pass over the trunk for all of them, kept on disk while a protocol works with them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ktransfer import distributed, networks
from ktransfer.artifacts.features import Features, create_or_resume, open_features
from ktransfer.config import nearest
from ktransfer.data.augment import centre_crop, stored_side
from ktransfer.data.dataset import Dataset, check_broken
from ktransfer.data.loader import ImageLoader, reasons
from ktransfer.data.opening import open_splits
from ktransfer.data.ordered import ordered_map
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.progress import bar
from ktransfer.run import input_hash
from ktransfer.training.device import autocast, choose_device

from ..arms import RANDOM, Arm, model_of
from ..config import EvalConfig
from ..result import broken_lines

GRIDS = {"conv1": 10, "conv2": 6, "conv3": 5, "conv4": 5, "conv5": 6}  # Zhang et al.'s, for an AlexNet of full width
NUMBERS = 9216  # about what those grids give; for all other layers
FORWARD_BATCH = 64
Pooled = Callable[[Tensor, Tensor], Tensor]
"""(b, 3, s, s) uint8 images and (b,) bool, whether each is mirrored -> (b, d) float32 maps on the CPU."""


@dataclass(frozen=True)
class Layer:
    """Where a layer's numbers stand in a row: columns start..stop, of `channels` maps of `grid` x `grid`.

    `pool` is what averages them to that: side, step and padding of its squares; where it is None, adaptive squares.
    """

    name: str
    channels: int
    grid: int
    start: int
    stop: int
    pool: tuple[int, int, int] | None = None


class Views:
    """Rows of cached maps, read as the training loop reads images: `views[v]` holds view v of every image."""

    def __init__(self, views: list[Features]) -> None:
        self.views = views

    def batches(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """(b,) rows coded as image * views + view -> (rows, (b, d) maps, (b,) valid, 0 seconds waited)."""
        count = len(self.views)
        for chosen in rows:
            image, view = (chosen // count).numpy(), (chosen % count).numpy()
            maps = np.empty((len(chosen), self.views[0].rows.shape[1]), np.float32)
            for number, features in enumerate(self.views):
                maps[view == number] = features.rows[image[view == number]]
            yield chosen, torch.from_numpy(maps), torch.from_numpy(self.views[0].valid[image]), 0.0


def choose_layers(model: nn.Module, network: Network, names: str | None, grid: int = 0) -> list[Layer]:
    """The layers to evaluate, and the grid that their maps are averaged to: `grid` x `grid`, or that of linear/1 where
    0.

    Raises:
        UsageError: an unknown layer, or images too small for the network.
    """
    with networks.fitting(network):
        known = networks.layers(network, model)
    if names:
        chosen = [name.strip() for name in names.split(",")]
    elif set(GRIDS) <= set(known):
        chosen = list(GRIDS)
    else:
        chosen = list(known)[:: max(1, len(known) // 5)][-5:]
    if not chosen:
        raise UsageError(
            f"{network.arch}: none of its modules makes maps, (batch, channels, height, width), that could be evaluated"
            "; take eval --protocol finetune"
        )
    wrong = [name for name in chosen if name not in known]
    if wrong:
        raise UsageError(f"--layers {wrong[0]}: {network.arch} has no such layer; {nearest(wrong[0], known)}")
    device = next(model.parameters()).device
    with networks.fitting(network), torch.no_grad():
        image = torch.zeros(1, 3, network.size, network.size, device=device)
        maps = networks.feature_maps(model.eval(), {name: known[name] for name in chosen}, image)
    layers: list[Layer] = []
    start = 0
    for name in chosen:
        channels, side = maps[name].shape[1], maps[name].shape[-1]
        cells = min(side, grid or GRIDS.get(name, max(1, round((NUMBERS / channels) ** 0.5))))
        layers.append(Layer(name, channels, cells, start, start + channels * cells**2))
        start = layers[-1].stop
    return layers


@dataclass(frozen=True)
class Frozen:
    """What a frozen network makes of the images of one split.

    Attributes:
        layers: whose columns stand in a row.
        features: `rows` (n, d), `valid` (n,), `targets` (n,), image by image, broken ones included.
        broken: "PART/IMAGE: reason" of those that could not be read.
    """

    layers: list[Layer]
    features: Features
    broken: list[str]

    def layer(self, layer: Layer) -> NDArray[np.float32]:
        """(m, numbers) float32 of the images that are not broken."""
        return np.asarray(self.features.rows[:, layer.start : layer.stop], np.float32)[self.features.valid]


def frozen_maps(
    arm: Arm,
    splits: tuple[Dataset, ...],
    config: EvalConfig,
    folder: Path,
    device: torch.device,
    layers: list[Layer],
) -> list[Frozen]:
    """The maps of an arm's layers (as `choose_layers` gives them) for every image of some splits; killed, it goes on.

    Args:
        folder: for files named after the splits (`train.h5`, ...).

    Raises:
        UsageError, StageError: one line each.
    """
    model = model_of(arm, config.seed).to(device).eval()
    pooled, side = reading(model, arm, layers, config, device), stored_side(arm.network.size)
    found: list[Frozen] = []
    for split, (data, name) in enumerate(zip(splits, ("train", "test"), strict=False)):
        features = cached_maps(folder / f"{name}.h5", arm, layers, pooled, splits, split, config, False)
        broken = broken_lines(data, reasons(data, features.valid, side))
        found.append(Frozen(layers, features, broken))
    return found


def reading(model: nn.Module, arm: Arm, layers: list[Layer], config: EvalConfig, device: torch.device) -> Pooled:
    """What reads the layers of an arm's network, which is on the device and in evaluation mode."""
    paths = networks.layers(arm.network, model)
    chosen = {layer.name: paths[layer.name] for layer in layers}
    return partial(pooled_maps, model, arm.network, layers, chosen, config, device)


@torch.no_grad()
def pooled_maps(
    model: nn.Module,
    network: Network,
    layers: list[Layer],
    paths: dict[str, str],
    config: EvalConfig,
    device: torch.device,
    pixels: Tensor,
    mirrored: Tensor,
) -> Tensor:
    """The maps of all layers, averaged to their grids, in one pass over the trunk (see `Pooled`)."""
    squares = centre_crop(pixels.to(device), network.size)
    squares = torch.where(mirrored[:, None, None, None].to(device), squares.flip(-1), squares)
    return averaged_maps(model, network, layers, paths, config, device, squares)


@torch.no_grad()
def averaged_maps(
    model: nn.Module,
    network: Network,
    layers: list[Layer],
    paths: dict[str, str],
    config: EvalConfig,
    device: torch.device,
    squares: Tensor,
) -> Tensor:
    """(b, 3, size, size) squares on the device -> (b, d) float32 on the CPU, the maps of all layers."""
    with autocast(config, device):
        maps = networks.feature_maps(model, paths, networks.normalise(squares, network.normalise))
    return torch.cat([_averaged(maps[layer.name].float(), layer).flatten(1) for layer in layers], dim=1).cpu()


def _averaged(maps: Tensor, layer: Layer) -> Tensor:
    return F.avg_pool2d(maps, *layer.pool) if layer.pool else F.adaptive_avg_pool2d(maps, layer.grid)


def cached_maps(
    path: Path,
    arm: Arm,
    layers: list[Layer],
    pooled: Pooled,
    splits: tuple[Dataset, ...],
    split: int,
    config: EvalConfig,
    mirror: bool,
) -> Features:
    """The maps of every image of a split, by all processes, kept on disk and resumable; `pooled` reads `layers`."""
    if path.is_file():
        return open_features(path)
    data, side, numbers = splits[split], stored_side(arm.network.size), layers[-1].stop
    writer = create_or_resume(path, data.keys, data.targets, numbers, config.dtype, {"fingerprint": data.fingerprint})
    first = writer.rows_done
    if distributed.world_size() > 1:
        facts = {"network": asdict(arm.network), "weights": str(arm.weights.resolve()) if arm.weights else None}
        hashes = {"sha256": input_hash(arm.weights) if arm.weights else None, "fingerprint": data.fingerprint}
        work = {
            "do": "maps",
            "split": split,
            "mirror": mirror,
            "first": first,
            "layers": [asdict(one) for one in layers],
        }
        distributed.send_order(work | facts | hashes | {"config": asdict(config)})
        distributed.agree(None)
    images = _images(data, side, config.workers, "off" if config.cache_images == "off" else "auto")
    with bar(len(data), _label(arm.name, split, mirror), done=first) as shown:

        def take(start: int, features: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
            writer.write(start, features, valid)
            shown.update(len(valid))

        ordered_map(images, first, FORWARD_BATCH, partial(_seen, pooled, mirror), numbers, take)
    check_broken(reasons(data, writer.valid(), side), len(data), config.max_broken, data)
    writer.finish()
    return open_features(path)


@lru_cache(maxsize=2)  # the two splits
def _images(data: Dataset, side: int, workers: int, cache: str) -> ImageLoader:
    """One loader of a split for all networks and views, so that images are decoded once where they fit."""
    return ImageLoader(data, side, workers, cache=cache)


def _label(name: str, split: int, mirror: bool) -> str:
    whose = "random weights" if name == RANDOM else name
    return f"features of {whose}, {('training set', 'test set')[split]}{', mirrored' if mirror else ''}"


def map_share(order: dict[str, Any]) -> None:
    """What the other processes do for the leader's maps (ktransfer/distributed.py)."""
    with distributed.opening():
        config, arm = EvalConfig(**order["config"]), Arm("", Network(**order["network"]), None)
        if order["weights"]:
            arm = replace(arm, weights=Path(order["weights"]))
        data = open_splits(str(config.labelled))[order["split"]]
        known = input_hash(arm.weights) if arm.weights else None, data.fingerprint
        if known != (order["sha256"], order["fingerprint"]):
            raise StageError(
                f"{arm.weights} or {config.labelled}: differ from those of the first process; copy those here"
            )
        device = choose_device(config)
        layers = [Layer(**one | {"pool": one["pool"] and tuple(one["pool"])}) for one in order["layers"]]
        pooled = reading(model_of(arm, config.seed).to(device).eval(), arm, layers, config, device)
        images = ImageLoader(data, stored_side(arm.network.size), config.workers, cache="off")
    numbers = layers[-1].stop
    ordered_map(images, order["first"], FORWARD_BATCH, partial(_seen, pooled, order["mirror"]), numbers, None)


def _seen(pooled: Pooled, mirror: bool, pixels: Tensor) -> Tensor:
    return pooled(pixels, torch.full((len(pixels),), mirror))


class Computed:
    """The maps that `Views` reads, computed when they are asked for and rounded as they would be kept.

    They depend on what else is in a batch by no more than the rounding of the trunk's sums.
    """

    def __init__(self, pooled: Pooled, images: ImageLoader, views: int, dtype: str) -> None:
        self.pooled, self.images, self.count = pooled, images, views
        self.dtype = torch.float16 if dtype == "float16" else torch.float32

    def batches(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """(b,) rows coded as image * views + view -> (rows, (b, d) maps, (b,) valid, seconds waited).

        Raises:
            StageError: a number is not finite, or does not fit float16.
        """
        wanted = list(rows)
        read = self.images.batches(part // self.count for part in wanted)
        for coded, (_, pixels, valid, wait) in zip(wanted, read, strict=True):
            maps = self.pooled(pixels, coded % self.count == 1).to(self.dtype).float()
            maps[~valid] = 0
            if not maps.isfinite().all():
                raise StageError(
                    "maps are not finite, or exceed 65504, the largest float16: give eval --dtype float32 --overwrite, "
                    "or check the weights of the network"
                )
            yield coded, maps, valid, wait


def map_bytes(layers: list[Layer], splits: tuple[Dataset, Dataset], config: EvalConfig) -> int:
    """Bytes of the maps of all images: two views of the training split, one of the test split."""
    return layers[-1].stop * (2 * len(splits[0]) + len(splits[1])) * (2 if config.dtype == "float16" else 4)
