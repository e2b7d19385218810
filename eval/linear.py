"""Linear probes of a frozen network: how much of what matters for the labels can be read off its layers.

Protocol `linear/1`, after Zhang et al. (reference jigsawpp.md §6.2). Centre square, and its mirror image in training;
maps averaged to a grid of about 9,000 numbers; each channel standardised; one linear layer, SGD with momentum; the
learning rate chosen on a tenth of the training part, which the probes do not learn from; the test part used once.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import networks, rng
from ktransfer.augment import centre_crop
from ktransfer.config import nearest
from ktransfer.dataset import Dataset
from ktransfer.errors import UsageError
from ktransfer.features import Features, create_or_resume, open_features
from ktransfer.networks import Network
from ktransfer.pictures import Pictures, check_broken, reasons
from ktransfer.progress import bar
from ktransfer.training import loop

from .config import EvalConfig
from .probe import Layer, Probes, Views, hold_out, optimiser, predictions, probe_loss, scores

PROTOCOL = "linear/1"
HELD_OUT = 0.1
GRIDS = {"conv1": 10, "conv2": 6, "conv3": 5, "conv4": 5, "conv5": 6}  # Zhang et al.'s, for an AlexNet of full width
NUMBERS = 9216  # about what those grids give; for all other layers
FORWARD_BATCH = 64


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
        {"network": ..., "layers": {name: {"top1": ..., "lr": ..., ...}}}.
    """
    train, test = parts
    model = _model(arm, config.seed).to(device).eval()
    layers = choose_layers(model, arm.network, config.layers)
    paths = networks.layers(arm.network, model)
    chosen = {layer.name: paths[layer.name] for layer in layers}

    views = [
        _cached(folder / f"train-{mirror}.h5", model, arm.network, layers, chosen, train, config, device, mirror)
        for mirror in (False, True)
    ]
    tested = Views([_cached(folder / "test.h5", model, arm.network, layers, chosen, test, config, device, False)])
    learning, held = hold_out(len(train), HELD_OUT, config.seed)

    source = Views(views)
    targets = torch.from_numpy(train.targets).long().to(device)
    sample = learning[:4096]
    maps = torch.from_numpy(views[0].rows[sample[torch.from_numpy(views[0].valid)[sample]].numpy()]).float()
    probes = Probes(layers, rates(config), len(train.classes), maps).to(device)

    def batches(epoch: int) -> Tensor:
        order = loop.epoch_batches(learning, config.batch, config.seed, epoch)
        mirrored = rng.words(config.seed, "eval/mirror", epoch, order.flatten(), 1).view(order.shape) & 1
        return order * 2 + mirrored

    adjust = optimiser(probes, config.momentum, config.weight_decay)
    loop.fit(probes, probe_loss(targets, 2), source, batches, config, folder, device, f"probe {arm.name}", None, adjust)

    held_answers, held_rows = predictions(probes, Views(views[:1]), held, config.batch, device)
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
    return {"task": arm.network.task, "arch": arm.network.arch, "width": arm.network.width, "layers": found}


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


def _cached(
    path: Path,
    model: nn.Module,
    network: Network,
    layers: list[Layer],
    paths: dict[str, str],
    data: Dataset,
    config: EvalConfig,
    device: torch.device,
    mirror: bool,
) -> Features:
    """The pooled maps of all layers of every picture, in one pass over the trunk, kept on disk and resumable."""
    if path.is_file():
        return open_features(path)
    writer = create_or_resume(
        path, data.keys, data.targets, layers[-1].stop, "float16", {"fingerprint": data.fingerprint}
    )
    pictures = Pictures(data, round(network.size * 8 / 7), config.workers, cache_bytes=0)
    rows = torch.arange(writer.rows_done, len(data))
    with bar(len(data), f"maps {path.parent.name} {path.stem}", done=writer.rows_done) as shown, torch.no_grad():
        for chosen, pixels, valid, _ in pictures.batches(part for part in rows.split(FORWARD_BATCH) if len(part)):
            squares = centre_crop(pixels.to(device), network.size)
            squares = squares.flip(-1) if mirror else squares
            with loop.autocast(config, device):
                maps = networks.feature_maps(model, paths, networks.normalise(squares, network.normalise))
            pooled = [F.adaptive_avg_pool2d(maps[layer.name].float(), layer.grid).flatten(1) for layer in layers]
            features = torch.where(valid[:, None], torch.cat(pooled, dim=1).cpu(), 0.0)
            writer.write(int(chosen[0]), features.numpy(), valid.numpy())
            shown.update(len(chosen))
    check_broken(reasons(data, writer.valid(), pictures.size), len(data), config.max_broken, data)
    writer.finish()
    return open_features(path)


def resized(network: Network, size: int, stride: int) -> Network:
    """The network as it is judged: on pictures of `size`, an AlexNet with `stride`."""
    return networks.trunk(replace(network, size=size, stride=stride))
