"""The arm that learns the true labels: the same architecture, trained from scratch on the labelled training split.

Its recipe is that of `retrain --labels classes` (random parts of an image of 0.08 of its area at least, mirrored half
the time; SGD 0.01 with momentum 0.9, weight decay 5e-4, batches of 256, a warm-up over 5 % of the steps and a cosine;
90 epochs, or `--supervised-epochs`), at the size and stride at which the networks beside it are evaluated, and
normalised as the run's own is. Where images have several labels it learns them by sigmoids. It is a step of its own,
`supervised` in run/eval, made once for all protocols.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ktransfer import networks
from ktransfer.config import option
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import readable
from ktransfer.data.opening import open_splits
from ktransfer.errors import UsageError
from ktransfer.networks import TRUNKS, Network
from ktransfer.progress import say
from ktransfer.run import begin, changes, leaves_nothing, read_record, refusal
from ktransfer.training import checkpoint, loop
from ktransfer.training.batch_divider import seen_by_batch_norm
from ktransfer.training.options import LoopOptions, TrainOptions

from .arms import LEARNED, SUPERVISED, Trained, resized
from .config import EvalConfig
from .learners.heads import with_classes
from .learners.tuning import Labelled, crop_loss


@dataclass(frozen=True)
class Recipe(TrainOptions):
    """How the arm is trained."""

    arch: str = option("", "as the network beside it")
    width: float = option(1.0, "as the network beside it")
    stride: int = option(4, "as the network beside it")
    size: int = option(224, "as the network beside it")
    normalise: str = option("imagenet", "as the network beside it", before="imagenet")
    crop: float = option(0.08, "smallest share of an image's area that a random crop shows")


SHARED = ("seed", "precision", *(field.name for field in fields(LoopOptions) if field.metadata["execution"]))
"""The settings of eval that are the arm's too: how and where it is trained."""


def supervised_network(network: Network, classes: int) -> Network:
    """What the arm's weights hold, for a network as it is evaluated; a VGG's trunk stays one (see `heads.WithHead`)."""
    kept = 0 if network.arch in TRUNKS[2:] and not network.classes else classes
    return replace(network, classes=kept, task="classes")


class Training(NamedTuple):
    """The training of the arm, as it was planned.

    Attributes:
        network: what is trained.
    """

    run: Path
    data: Dataset
    network: Network
    recipe: Recipe
    inputs: dict[str, str]
    overwrite: bool
    device: torch.device


def check(own: Trained, configs: list[EvalConfig], device: torch.device) -> Training:
    """Find what would keep the arm from being trained once for all protocols.

    Args:
        own: the run's network, as it was trained.
        configs: those of the protocols, with images, size and stride resolved.

    Raises:
        UsageError: two protocols take networks of different looks, the images have no class each, or the arm is there
            and was made differently, and `--overwrite` was not given.
    """
    looks = {(config.size, config.stride): config.protocol for config in configs}
    if len(looks) > 1:
        uses = ", ".join(f"{name} --size {size} --stride {stride}" for (size, stride), name in looks.items())
        raise UsageError(
            f"--supervised: one network is trained for all protocols, and these need several ({uses}); give --size and "
            "--stride, or evaluate them in runs of their own"
        )
    try:
        training = _planned(own, configs[0], device)
    except UsageError as error:
        raise UsageError(f"--supervised: {error}") from error
    found = changes(own.run, "eval", SUPERVISED, training.recipe, training.inputs)
    old = read_record(own.run, "eval", SUPERVISED)
    if old and found and not training.overwrite and not leaves_nothing(own.run / "eval", old):
        raise refusal(own.run, "eval", SUPERVISED, found)
    return training


def train(training: Training) -> Path:
    """Train the arm, go on with it, or find it done; `--overwrite` makes it again only where it would be another.

    Returns:
        Its weights.

    Raises:
        UsageError, StageError: one line each.
    """
    run, data, network, recipe, inputs, overwrite, device = training
    overwrite = overwrite and bool(changes(run, "eval", SUPERVISED, recipe, inputs))
    with begin(run, "eval", SUPERVISED, recipe, inputs, [SUPERVISED], overwrite, str(device)) as step:
        weights = step.folder / LEARNED
        if not step.done:
            broken = _fit(weights, network, data, recipe, device)
            step.finish([weights], broken=broken)
            checkpoint.remove(weights.parent)
            say(f"eval {SUPERVISED}: done; {network.arch} learned {len(data.classes)} classes; {weights}")
        return weights


def _planned(own: Trained, config: EvalConfig, device: torch.device) -> Training:
    assert config.labelled is not None
    data, _ = open_splits(config.labelled)
    evaluated = resized(own.network, config.size, config.stride)
    shared = {name: getattr(config, name) for name in SHARED}
    look = {name: getattr(evaluated, name) for name in ("arch", "width", "stride", "size", "normalise")}
    recipe = Recipe(epochs=config.supervised_epochs, **shared, **look)
    made = supervised_network(evaluated, len(data.classes))
    micro = seen_by_batch_norm(recipe, lambda: with_classes(made, len(data.classes), recipe.seed, "check"))
    inputs = {"train": data.fingerprint} | micro
    return Training(own.run, data, made, recipe, inputs, config.overwrite, device)


def _fit(weights: Path, network: Network, data: Dataset, recipe: Recipe, device: torch.device) -> list[str]:
    split = Labelled(data, network, recipe, device)
    rows = readable(split.images, torch.arange(len(data)), recipe.max_broken)
    model = with_classes(network, len(data.classes), recipe.seed, "eval/supervised")
    loss = partial(
        crop_loss, train=split, network=network, seed=recipe.seed, purpose="eval/supervised", smallest=recipe.crop
    )
    batches = partial(loop.epoch_batches, rows, recipe.batch, recipe.seed)
    loop.fit(model, loss, split.images, batches, recipe, weights.parent, device, SUPERVISED)
    networks.save(weights, model.state_dict(), network, data.classes if network.classes else ())
    return split.broken()
