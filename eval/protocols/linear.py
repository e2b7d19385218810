"""Linear probes of a frozen network: how much of what matters for the labels can be read off its layers.

Protocol `linear/1`, after Zhang et al. (docs/papers.md). Centre square, and its mirror image in training;
maps averaged to a grid of about 9,000 numbers; each channel standardised; one linear layer, SGD with momentum; the
learning rate chosen on a tenth of the training split, which the probes do not learn from; the test split used once.
`--preset deepcluster` and `fair` are those of other groups (presets.py).
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktransfer import networks, rng
from ktransfer.data.augment import stored_side
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader, readable, reasons
from ktransfer.networks import Network
from ktransfer.number_list import number_list
from ktransfer.progress import say
from ktransfer.run import need_disk
from ktransfer.training import loop
from ktransfer.training.batch import Source

from ..arms import Arm, model_of
from ..config import EvalConfig
from ..enough import held_out
from ..learners.maps import FORWARD_BATCH, Computed, Views, cached_maps, map_bytes, reading
from ..learners.probe import Probes, hold_out, learnable, optimiser, predict, probe_loss, scores
from ..presets import PRESETS, Crops, check_preset, cropped_maps, preset_layers, ten_crop_predictions, with_schedule
from ..result import Result, broken_lines, result_of

PROTOCOL = "linear/1"
TITLE = "linear probe"
MEASURES = {"top1": "top-1 %", "mean_class": "mean per class %"}
HELD_OUT = 0.1
SAMPLE = 4096  # images on which the channels are standardised
enough = partial(held_out, share=HELD_OUT)


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong rates and layers, and how much disk the maps need.

    Raises:
        UsageError: one line.
    """
    rates(config)
    check_preset(config)
    for network in evaluated:
        layers = preset_layers(networks.build(network, 0, "check"), network, config)
        needed = map_bytes(layers, splits, config)
        if needed <= config.cache * 1e9 and not PRESETS[config.preset].crops:
            need_disk(run, needed, "eval")


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """Probe accuracies of one network, layer by layer.

    Args:
        splits: the training split and the test split.
        folder: for what is written on the way; killed, it goes on.

    Returns:
        `Result`; for each layer its best learning rate, and what each rate reached on the images held out for that.
    """
    train, test = splits
    config = with_schedule(config)
    model = model_of(arm, config.seed).to(device).eval()
    layers = preset_layers(model, arm.network, config)
    pooled = reading(model, arm, layers, config, device)
    side, numbers = stored_side(arm.network.size), layers[-1].stop
    crops = PRESETS[config.preset].crops
    source: Source
    plain: Source
    tested: Source
    if not crops and map_bytes(layers, splits, config) <= config.cache * 1e9:
        views = [
            cached_maps(folder / f"train-{mirror}.h5", arm, layers, pooled, splits, 0, config, mirror)
            for mirror in (False, True)
        ]
        plain = Views(views[:1])
        of_test = cached_maps(folder / "test.h5", arm, layers, pooled, splits, 1, config, False)
        tested = Views([of_test])
        source = Views(views)
        broken = [reasons(data, view.valid, side) for data, view in ((train, views[0]), (test, of_test))]
    else:
        images = [ImageLoader(data, side, config.workers, cache=config.cache_images, device=device) for data in splits]
        for split in images:
            readable(split, torch.arange(len(split.dataset)), config.max_broken)
        if crops:
            squares = cropped_maps(model, arm, layers, config, device)
            plain, tested = (Crops(squares, split, arm.network.size) for split in images)
            source = plain
        else:
            gigabytes = map_bytes(layers, splits, config) / 1e9
            say(
                f"probe {arm.name}: its feature maps take {gigabytes:.2g} GB, more than --cache: each epoch computes "
                "them again"
            )
            source = Computed(pooled, images[0], 2, config.dtype)
            plain, tested = (Computed(pooled, split, 1, config.dtype) for split in images)
        broken = [split.broken for split in images]
    learning, held = hold_out(len(train), HELD_OUT, config.seed)
    learning = learnable(learning, broken[0], config.batch)

    targets = torch.from_numpy(train.targets).long().to(device)
    sample = None if crops else _sample(plain, learning[:SAMPLE], numbers)
    probes = Probes(layers, rates(config), len(train.classes), sample).to(device)

    def batches(epoch: int) -> Tensor:
        order = loop.epoch_batches(learning, config.batch, config.seed, epoch)
        if isinstance(source, Crops):
            return source.drawn(order, config.seed, epoch)
        mirrored = rng.words(config.seed, "eval/mirror", epoch, order.flatten(), 1).view(order.shape) & 1
        return order * 2 + mirrored

    adjust = optimiser(probes, config.momentum, config.weight_decay)
    loss = probe_loss(targets, source.views if isinstance(source, Crops) else 2)
    loop.fit(probes, loss, source, batches, config, folder, device, f"probe {arm.name}", None, adjust)

    predict_rows: Any = ten_crop_predictions if crops else predict
    held_predictions, held_rows = predict_rows(probes, plain, held, config.batch, device)
    held_right = (held_predictions == torch.from_numpy(train.targets)[held_rows].long()).double().mean(1)
    test_predictions, test_rows = predict_rows(probes, tested, torch.arange(len(test)), config.batch, device)
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
            **scores(test_predictions[place * len(probes.rates) + best], wanted),
        }
    lines = [line for data, rows in zip(splits, broken, strict=True) for line in broken_lines(data, rows)]
    return result_of(arm.network, found, lines)


def rates(config: EvalConfig) -> list[float]:
    """The learning rates of `--lrs`.

    Raises:
        UsageError: they are not positive numbers.
    """
    found = number_list("--lrs", config.lrs, 0, 1000, "0.001,0.01")
    return found


def _sample(source: Source, rows: Tensor, numbers: int) -> Tensor:
    """(m, d) float32 maps of those of (n,) rows whose images are not broken."""
    maps, count = torch.empty(len(rows), numbers), 0
    for _, part, valid, _ in source.batches(iter(rows.split(FORWARD_BATCH))):
        kept = part[valid]
        maps[count : count + len(kept)] = kept
        count += len(kept)
    return maps[:count]
