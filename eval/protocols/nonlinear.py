"""What the rest of a network can learn behind its frozen layers: how task-specific is a layer?

Protocol `nonlinear/1`, after Table 2 of the original Jigsaw paper and the paper's own (docs/papers.md): for
each layer, all up to it is frozen (batch norms as in a test), and the remaining layers of the network are trained on
the labels *from scratch*, from random weights; of the run's network nothing else is used, so that a column says what
its frozen layers hold. fc6 and fc7 are columns where the weights of a network hold them. Training: random parts of a
image, `--crop` of its area at least, mirrored half the time; SGD with momentum; the learning rate chosen on a tenth
of the training split, which is not learned from; the test split used once, ten random squares of each image.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from ktransfer import networks
from ktransfer.data.dataset import Dataset
from ktransfer.errors import UsageError
from ktransfer.networks import TRUNKS, Network
from ktransfer.progress import say

from ..arms import Arm, model_of
from ..config import EvalConfig
from ..enough import tuned
from ..learners import tuning
from ..learners.heads import Before, before, copied, with_classes
from ..learners.maps import choose_layers
from ..result import Result

PROTOCOL = "nonlinear/1"
TITLE = "frozen up to"
MEASURES = tuning.MEASURES
MULTI_LABEL = True
inputs = tuning.inputs
enough = partial(tuned, share=tuning.HELD_OUT)
FULLY_CONNECTED = {"fc6": "bn6", "fc7": "bn7"}  # layer of an AlexNet -> its last module before the ReLU


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong rates and layers, and images that are too small.

    Raises:
        UsageError: one line.
    """
    for network in evaluated:
        _layers(network, config)
    tuning.check(evaluated, len(splits[0].classes), config, run)


def check_arms(arms: list[Arm], config: EvalConfig) -> None:
    """Find `--layers` that would leave a table without a column.

    Raises:
        UsageError: all of them are fully connected, and no weights hold these.
    """
    asked = [name.strip() for name in config.layers.split(",")] if config.layers else []
    if asked and set(asked) <= set(FULLY_CONNECTED) and not any(arm.whole for arm in arms):
        raise UsageError(
            f"--layers {config.layers}: no network here has them for images of {config.size} pixels and stride "
            f"{config.stride}; name convolutions too, or leave out --size and --stride"
        )


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """What is reached behind each frozen layer of one network; for each the learning rates that were tried."""
    columns: list[tuning.Column] = []
    for name in _layers(arm.network, config):
        if name in FULLY_CONNECTED and arm.whole is None:
            if config.layers:
                say(f"nonlinear {arm.name}: its weights have no {name} of this size and stride; it is left out")
            continue
        start = partial(_start, arm, name, len(splits[0].classes), config.seed)
        columns.append(tuning.Column(name, start, (tuning.Phase(1.0, 0.0),)))
    return tuning.evaluate_columns(arm, columns, splits, config, folder, device)


def _layers(network: Network, config: EvalConfig) -> list[str]:
    """The layers of `--layers`; when not given, those of `choose_layers`, and fc6 and fc7 of an AlexNet."""
    alexnet = network.arch in TRUNKS[:2]
    asked = [name.strip() for name in config.layers.split(",")] if config.layers else []
    fully = [name for name in (asked or FULLY_CONNECTED) if alexnet and name in FULLY_CONNECTED]
    others = ",".join(name for name in asked if name not in fully)
    if asked and not others:
        return fully
    model = networks.build(network, 0, "check")
    return [layer.name for layer in choose_layers(model, network, others or None)] + fully


def _start(arm: Arm, layer: str, classes: int, seed: int) -> tuple[nn.Module, Before]:
    """A fresh network of the arm's architecture, with the arm's own weights up to a layer."""
    fresh = with_classes(arm.network, classes, seed, "eval/nonlinear")
    if layer in FULLY_CONNECTED:
        assert arm.whole is not None
        source, path = model_of(Arm(arm.name, arm.whole, arm.weights), seed), FULLY_CONNECTED[layer]
    else:
        source = model_of(arm, seed)
        path = networks.layers(arm.network, source)[layer]
    frozen = before(fresh, path, arm.network.size)
    return copied(fresh, source, frozen.names), frozen
