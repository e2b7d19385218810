"""Linear probes of a frozen network: how much of what matters for the labels can be read off its layers.

Protocol `linear/1`, after Zhang et al. (reference jigsawpp.md §6.2). Centre square, and its mirror image in training;
maps averaged to a grid of about 9,000 numbers; each channel standardised; one linear layer, SGD with momentum; the
learning rate chosen on a tenth of the training part, which the probes do not learn from; the test part used once.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import networks, ranks, rng
from ktransfer.augment import centre_crop
from ktransfer.config import nearest
from ktransfer.dataset import Dataset, open_parts
from ktransfer.errors import StageError, UsageError
from ktransfer.features import Features, create_or_resume, open_features
from ktransfer.networks import Network
from ktransfer.pictures import Pictures, check_broken, readable, reasons
from ktransfer.progress import bar, say
from ktransfer.run import input_hash
from ktransfer.training import loop
from ktransfer.training.loop import Source
from ktransfer.turns import in_turn

from .config import EvalConfig
from .probe import Layer, Probes, Views, hold_out, optimiser, predictions, probe_loss, scores

PROTOCOL = "linear/1"
HELD_OUT = 0.1
GRIDS = {"conv1": 10, "conv2": 6, "conv3": 5, "conv4": 5, "conv5": 6}  # Zhang et al.'s, for an AlexNet of full width
NUMBERS = 9216  # about what those grids give; for all other layers
FORWARD_BATCH = 64
SAMPLE = 4096  # pictures on which the channels are standardised
Pooled = Callable[[Tensor, Tensor], Tensor]
"""(b, 3, s, s) uint8 pictures and (b,) bool, whether each is mirrored -> (b, d) float32 maps on the CPU."""


@dataclass(frozen=True)
class Arm:
    """One network to be judged: its own weights, or fresh ones where `weights` is None."""

    name: str
    network: Network
    weights: Path | None


def judge(
    arm: Arm, parts: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Probe accuracies of one network, layer by layer.

    Args:
        parts: the training part and the test part.
        folder: for what is written on the way; all of it is removed at the end.

    Returns:
        {"task", "arch", "width", "layers": {name: {"top1": ..., "lr": ..., ...}}, "broken": [picture and reason, ...]}.
    """
    train, test = parts
    layers, pooled = _reader(arm, config, device)
    side, numbers = _side(arm), layers[-1].stop
    if map_bytes(layers, parts, config) <= config.cache * 1e9:
        views = [
            _cached(folder / f"train-{mirror}.h5", arm, pooled, numbers, parts, 0, config, mirror)
            for mirror in (False, True)
        ]
        plain: Source = Views(views[:1])
        of_test = _cached(folder / "test.h5", arm, pooled, numbers, parts, 1, config, False)
        tested: Source = Views([of_test])
        source: Source = Views(views)
        broken = [reasons(data, view.valid, side) for data, view in ((train, views[0]), (test, of_test))]
    else:
        gigabytes = map_bytes(layers, parts, config) / 1e9
        say(f"probe {arm.name}: its maps would take {gigabytes:.2g} GB, over --cache: each epoch computes them anew")
        pictures = [Pictures(data, side, config.workers, cache=config.cache_pictures, device=device) for data in parts]
        for part in pictures:
            readable(part, torch.arange(len(part.dataset)), config.max_broken)
        source = Computed(pooled, pictures[0], 2, config.dtype)
        plain, tested = (Computed(pooled, part, 1, config.dtype) for part in pictures)
        broken = [part.broken for part in pictures]
    learning, held = hold_out(len(train), HELD_OUT, config.seed)

    targets = torch.from_numpy(train.targets).long().to(device)
    probes = Probes(layers, rates(config), len(train.classes), _sample(plain, learning[:SAMPLE], numbers)).to(device)

    def batches(epoch: int) -> Tensor:
        order = loop.epoch_batches(learning, config.batch, config.seed, epoch)
        mirrored = rng.words(config.seed, "eval/mirror", epoch, order.flatten(), 1).view(order.shape) & 1
        return order * 2 + mirrored

    adjust = optimiser(probes, config.momentum, config.weight_decay)
    loop.fit(probes, probe_loss(targets, 2), source, batches, config, folder, device, f"probe {arm.name}", None, adjust)

    held_answers, held_rows = predictions(probes, plain, held, config.batch, device)
    held_right = (held_answers == torch.from_numpy(train.targets)[held_rows].long()).double().mean(1)
    test_answers, test_rows = predictions(probes, tested, torch.arange(len(test)), config.batch, device)
    wanted = torch.from_numpy(test.targets)[test_rows].long()
    found: dict[str, Any] = {}
    for place, layer in enumerate(layers):
        among = held_right[place * len(probes.rates) : (place + 1) * len(probes.rates)]
        best = int(among.argmax())
        found[layer.name] = {
            "numbers": layer.stop - layer.start,
            "grid": layer.grid,
            "lr": probes.rates[best],
            "held_out": {str(rate): round(float(value), 4) for rate, value in zip(probes.rates, among, strict=True)},
            **scores(test_answers[place * len(probes.rates) + best], wanted),
        }
    shutil.rmtree(folder)
    return {
        "task": arm.network.task,
        "arch": arm.network.arch,
        "width": arm.network.width,
        "layers": found,
        "broken": [
            f"{data.name}/{data.keys[row]}: {reason}"
            for data, rows in zip(parts, broken, strict=True)
            for row, reason in rows.items()
        ],
    }


def map_bytes(layers: list[Layer], parts: tuple[Dataset, Dataset], config: EvalConfig) -> int:
    """Bytes of the maps of all pictures: two views of the training part, one of the test part."""
    return layers[-1].stop * (2 * len(parts[0]) + len(parts[1])) * (2 if config.dtype == "float16" else 4)


def rates(config: EvalConfig) -> list[float]:
    """The learning rates of `--lrs`.

    Raises:
        UsageError: they are not positive numbers.
    """
    try:
        found = [float(part) for part in config.lrs.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < 1e3 for rate in found):
        raise UsageError(f"--lrs {config.lrs}: must be positive numbers separated by commas, such as 0.001,0.01")
    return found


def choose_layers(model: nn.Module, network: Network, names: str | None) -> list[Layer]:
    """The layers to judge, and the grid that their maps are averaged to.

    Raises:
        UsageError: an unknown layer, or pictures too small for the network.
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
        raise UsageError(f"--size {network.size}: no layer of {network.arch} leaves a map; give a larger --size")
    wrong = [name for name in chosen if name not in known]
    if wrong:
        raise UsageError(f"--layers {wrong[0]}: {network.arch} has no such layer; {nearest(wrong[0], known)}")
    device = next(model.parameters()).device
    with networks.fitting(network), torch.no_grad():
        picture = torch.zeros(1, 3, network.size, network.size, device=device)
        maps = networks.feature_maps(model.eval(), {name: known[name] for name in chosen}, picture)
    layers: list[Layer] = []
    start = 0
    for name in chosen:
        channels, side = maps[name].shape[1], maps[name].shape[-1]
        grid = min(side, GRIDS.get(name, max(1, round((NUMBERS / channels) ** 0.5))))
        layers.append(Layer(name, channels, grid, start, start + channels * grid**2))
        start = layers[-1].stop
    return layers


def _model(arm: Arm, seed: int) -> nn.Module:
    if arm.weights is None:
        return networks.build(arm.network, seed, "eval/random")
    return networks.load(arm.weights, arm.network)


@torch.no_grad()
def _pooled(
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
    with loop.autocast(config, device):
        maps = networks.feature_maps(model, paths, networks.normalise(squares, network.normalise))
    pooled = [F.adaptive_avg_pool2d(maps[layer.name].float(), layer.grid).flatten(1) for layer in layers]
    return torch.cat(pooled, dim=1).cpu()


def _reader(arm: Arm, config: EvalConfig, device: torch.device) -> tuple[list[Layer], Pooled]:
    """The layers of an arm that are judged, and what reads them."""
    model = _model(arm, config.seed).to(device).eval()
    layers = choose_layers(model, arm.network, config.layers)
    paths = networks.layers(arm.network, model)
    chosen = {layer.name: paths[layer.name] for layer in layers}
    return layers, partial(_pooled, model, arm.network, layers, chosen, config, device)


def _side(arm: Arm) -> int:
    return round(arm.network.size * 8 / 7)


def _cached(
    path: Path,
    arm: Arm,
    pooled: Pooled,
    numbers: int,
    parts: tuple[Dataset, Dataset],
    part: int,
    config: EvalConfig,
    mirror: bool,
) -> Features:
    """The maps of every picture of a part (`numbers` each), by all processes, kept on disk and resumable."""
    if path.is_file():
        return open_features(path)
    data, side = parts[part], _side(arm)
    writer = create_or_resume(path, data.keys, data.targets, numbers, config.dtype, {"fingerprint": data.fingerprint})
    first = writer.rows_done
    if ranks.count() > 1:
        facts = {"network": asdict(arm.network), "weights": str(arm.weights.resolve()) if arm.weights else None}
        hashes = {"sha256": input_hash(arm.weights) if arm.weights else None, "fingerprint": data.fingerprint}
        work = {"do": "maps", "part": part, "mirror": mirror, "first": first, "numbers": numbers}
        ranks.tell(work | facts | hashes | {"config": asdict(config)})
        ranks.agree(None)
    pictures = Pictures(data, side, config.workers, cache="off")
    with bar(len(data), f"maps {path.parent.name} {path.stem}", done=first) as shown:

        def take(start: int, features: np.ndarray[Any, Any], valid: np.ndarray[Any, Any]) -> None:
            writer.write(start, features, valid)
            shown.update(len(valid))

        in_turn(pictures, first, FORWARD_BATCH, partial(_seen, pooled, mirror), numbers, take)
    check_broken(reasons(data, writer.valid(), side), len(data), config.max_broken, data)
    writer.finish()
    return open_features(path)


def map_share(order: dict[str, Any]) -> None:
    """What the other processes do for the leader's maps (ktransfer/ranks.py)."""
    with ranks.opening():
        config, arm = EvalConfig(**order["config"]), Arm("", Network(**order["network"]), None)
        if order["weights"]:
            arm = replace(arm, weights=Path(order["weights"]))
        data = open_parts(str(config.labelled))[order["part"]]
        known = input_hash(arm.weights) if arm.weights else None, data.fingerprint
        if known != (order["sha256"], order["fingerprint"]):
            raise StageError(f"{arm.weights} or {config.labelled}: differ here from the first process's; copy them")
        _, pooled = _reader(arm, config, loop.choose_device(config))
        pictures = Pictures(data, _side(arm), config.workers, cache="off")
    in_turn(pictures, order["first"], FORWARD_BATCH, partial(_seen, pooled, order["mirror"]), order["numbers"], None)


def _seen(pooled: Pooled, mirror: bool, pixels: Tensor) -> Tensor:
    return pooled(pixels, torch.full((len(pixels),), mirror))


class Computed:
    """The maps that `Views` reads, computed when they are asked for and rounded as they would be kept.

    They depend on what else is in a batch by no more than the rounding of the trunk's sums.
    """

    def __init__(self, pooled: Pooled, pictures: Pictures, views: int, dtype: str) -> None:
        self.pooled, self.pictures, self.count = pooled, pictures, views
        self.dtype = torch.float16 if dtype == "float16" else torch.float32

    def batches(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """(b,) rows coded as picture * views + view -> (rows, (b, d) maps, (b,) valid, seconds waited).

        Raises:
            StageError: a number is not finite, or does not fit float16.
        """
        wanted = list(rows)
        read = self.pictures.batches(part // self.count for part in wanted)
        for coded, (_, pixels, valid, wait) in zip(wanted, read, strict=True):
            maps = self.pooled(pixels, coded % self.count == 1).to(self.dtype).float()
            maps[~valid] = 0
            if not maps.isfinite().all():
                raise StageError(
                    "maps are not finite, or exceed 65504, the largest float16: give eval --dtype float32 --overwrite, "
                    "or check the weights of the network"
                )
            yield coded, maps, valid, wait


def _sample(source: Source, rows: Tensor, numbers: int) -> Tensor:
    """(m, d) float32 maps of those of (n,) rows whose pictures are not broken."""
    maps, count = torch.empty(len(rows), numbers), 0
    for _, part, valid, _ in source.batches(iter(rows.split(FORWARD_BATCH))):
        kept = part[valid]
        maps[count : count + len(kept)] = kept
        count += len(kept)
    return maps[:count]


def resized(network: Network, size: int, stride: int) -> Network:
    """The network as it is judged: on pictures of `size`, an AlexNet with `stride`."""
    return networks.trunk(replace(network, size=size, stride=stride))
