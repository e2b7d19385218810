"""The whole network learns the labels: one label an image, or several.

Protocol `finetune/2`, after VOC07 classification (docs/papers.md) and the strategies that practitioners
tell apart (docs/papers.md). The trunk (AlexNet: conv1 to conv5; others: all but the classifier) comes from the
run, the fully connected layers are random. `--strategy`, one column each:

frozen     the trunk stays (batch norms as in a test), the new layers learn
staged     the first half of the epochs as `frozen`, then all learn
joint      all learn at once
layerwise  all learn at once, the trunk at a tenth of the rate

One label: cross-entropy, top-1. Several: the sum over classes of a sigmoid's cross-entropy, and the 11-point mAP of
VOC 2007 with an interval by bootstrap over images; labels that are not counted (VOC's difficult ones) are left out of
both. Training: random parts of an image, `--crop` of its area at least, mirrored half the time; SGD with momentum; the
learning rate chosen on a tenth of the training split, which is not learned from; the test split used once, ten random
squares of each image. `--rescale` first gives each layer's outputs unit variance on 64 images (`heads.py`).
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.config import chosen
from ktransfer.data.augment import centre_crop, stored_side
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader, readable
from ktransfer.errors import UsageError
from ktransfer.networks import Network

from ..arms import Arm, model_of
from ..config import EvalConfig
from ..enough import tuned
from ..learners import tuning
from ..learners.heads import Before, copied, trunk, unit_variance, with_classes
from ..learners.probe import hold_out
from ..learners.tuning import Phase
from ..result import Result

PROTOCOL = "finetune/2"
TITLE = "fine-tuned"
MEASURES = tuning.MEASURES
MULTI_LABEL = True
inputs = tuning.inputs
enough = partial(tuned, share=tuning.HELD_OUT)
STRATEGIES = {
    "frozen": (Phase(1.0, 0.0),),
    "staged": (Phase(0.5, 0.0), Phase(0.5, 1.0)),
    "joint": (Phase(1.0, 1.0),),
    "layerwise": (Phase(1.0, 0.1),),
}
SAMPLE = 64  # images on which weights are rescaled
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong rates and strategies, and images that are too small.

    Raises:
        UsageError: one line.
    """
    strategies(config)
    tuning.check(evaluated, len(splits[0].classes), config, run)
    for network in evaluated if config.rescale else ():
        if any(isinstance(module, NORMS) for module in networks.build(network, 0, "check").modules()):
            raise UsageError(
                f"--rescale: {network.arch} has normalisation layers, which undo any scale; leave it out, or evaluate "
                "a network without them"
            )


def strategies(config: EvalConfig) -> list[str]:
    """The names of `--strategy`.

    Raises:
        UsageError: an unknown one.
    """
    return chosen("--strategy", config.strategy, STRATEGIES, "strategy")


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """What one network reaches by each strategy; for each the learning rates that were tried."""
    sample = _sample(splits[0], arm.network, config) if config.rescale else None
    start = partial(_start, arm, len(splits[0].classes), config.seed, sample)
    columns = [tuning.Column(name, start, STRATEGIES[name]) for name in strategies(config)]
    return tuning.evaluate_columns(arm, columns, splits, config, folder, device)


def _start(arm: Arm, classes: int, seed: int, sample: Tensor | None) -> tuple[nn.Module, Before]:
    """The arm's trunk under fresh layers, rescaled on (m, 3, size, size) images if any are given."""
    fresh = with_classes(arm.network, classes, seed, "eval/finetune")
    taken = trunk(arm.network, fresh)
    model = copied(fresh, model_of(arm, seed), taken.names)
    if sample is not None:
        unit_variance(model, sample)
    return model, taken


def _sample(data: Dataset, network: Network, config: EvalConfig) -> Tensor:
    """(m, 3, size, size) normalised centre squares of images that are learned from."""
    rows, _ = hold_out(len(data), tuning.HELD_OUT, config.seed)
    images = ImageLoader(data, stored_side(network.size), config.workers, cache="off")
    rows = readable(images, rows[:SAMPLE], 1.0)
    return networks.normalise(centre_crop(images.batch(rows)[0], network.size), network.normalise)
