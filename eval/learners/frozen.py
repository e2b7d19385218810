"""What the protocols on frozen features have in common: one vector a layer, layer by layer, each kept once
evaluated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import files, networks
from ktransfer.data.dataset import Dataset
from ktransfer.networks import Network
from ktransfer.run import need_disk

from ..arms import Arm, model_of
from ..config import EvalConfig
from ..result import Result, result_of
from .maps import Frozen, Layer, choose_layers, frozen_maps

EvaluateLayer = Callable[[Frozen, Frozen, Layer], dict[str, Any]]
"""(training split, test split, layer) -> one cell of `Result.scores`."""


def check_frozen(
    evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path, last: bool = False
) -> None:
    """Find wrong layers, and how much disk the vectors of one network need.

    Raises:
        UsageError: one line.
    """
    for network in evaluated:
        layers = _layers(networks.build(network, 0, "check"), network, config, last)
        rows = sum(len(split) for split in splits)
        need_disk(run, layers[-1].stop * rows * (2 if config.dtype == "float16" else 4), "eval")


def evaluate_layers(
    arm: Arm,
    splits: tuple[Dataset, Dataset],
    config: EvalConfig,
    folder: Path,
    device: torch.device,
    evaluate_layer: EvaluateLayer,
    last: bool = False,
) -> Result:
    """Evaluate an arm layer by layer on vectors: maps averaged to `--grid` x `--grid` numbers a channel.

    Args:
        folder: for the vectors and what was evaluated before an interruption.
        last: the last layer alone, where `--layers` does not name others.
    """
    layers = _layers(model_of(arm, config.seed), arm.network, config, last)
    train, test = frozen_maps(arm, splits, config, folder, device, layers)
    found: dict[str, Any] = {}
    for layer in layers:
        kept = folder / f"{layer.name}.json"
        if not kept.is_file():
            files.write_json(kept, {"numbers": layer.stop - layer.start} | evaluate_layer(train, test, layer))
        found[layer.name] = files.read_json(kept)
    return result_of(arm.network, found, train.broken + test.broken)


def labels_of(split: Frozen) -> NDArray[np.int64]:
    """(m,) classes of the images that are not broken."""
    return split.features.targets[split.features.valid].astype(np.int64)


def _layers(model: torch.nn.Module, network: Network, config: EvalConfig, last: bool) -> list[Layer]:
    names = config.layers
    if last and not names:  # which the layers that are chosen by default may not hold
        with networks.fitting(network):
            names = ",".join(list(networks.layers(network, model))[-1:])
    return choose_layers(model, network, names, config.grid)
