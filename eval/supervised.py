"""The arm that learns the true labels: the same architecture, trained from scratch on the labelled training part.

Its recipe is that of `retrain --labels classes` (random parts of a picture of 0.08 of its area at least, mirrored half
the time; SGD 0.01 with momentum 0.9, weight decay 5e-4, batches of 256, a warm-up over 5 % of the steps and a cosine;
90 epochs, or `--supervised-epochs`), at the size and stride at which the networks beside it are judged. Where pictures
have several labels it learns them by sigmoids. It is a step of its own, `supervised` in run/eval, made once for all
protocols.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.augment import random_resized_crop
from ktransfer.config import option
from ktransfer.dataset import Dataset, open_parts
from ktransfer.networks import TRUNKS, Network
from ktransfer.pictures import readable
from ktransfer.progress import say
from ktransfer.run import begin, changes
from ktransfer.training import loop
from ktransfer.training.loop import Batch
from ktransfer.training.options import TrainOptions

from .arms import LEARNED, SUPERVISED, final_network, resized
from .config import EvalConfig
from .heads import with_classes
from .tuning import Labelled


@dataclass(frozen=True)
class Recipe(TrainOptions):
    """How the arm is trained."""

    arch: str = option("", "as the network beside it")
    width: float = option(1.0, "as the network beside it")
    stride: int = option(4, "as the network beside it")
    size: int = option(224, "as the network beside it")
    crop: float = option(0.08, "smallest share of a picture's area that a random crop shows")


def supervised_network(network: Network, classes: int) -> Network:
    """What the arm's weights hold, for a network as it is judged; a VGG's trunk stays one (see `heads.WithHead`)."""
    kept = 0 if network.arch in TRUNKS[2:] and not network.classes else classes
    return replace(network, classes=kept, normalise="imagenet", task="classes")


def train(run: Path, config: EvalConfig, device: torch.device) -> Path:
    """Train the arm, go on with it, or find it done; `--overwrite` makes it again only where it would be another.

    Args:
        config: with pictures, size and stride resolved.

    Returns:
        Its weights.

    Raises:
        UsageError, StageError: one line each.
    """
    assert config.labelled is not None
    network = resized(networks.describe(final_network(run)), config.size, config.stride)
    data, _ = open_parts(config.labelled)
    shared = {name: getattr(config, name) for name in ("seed", "device", "precision", "workers", "max_broken")}
    look = {name: getattr(network, name) for name in ("arch", "width", "stride", "size")}
    recipe = Recipe(epochs=config.supervised_epochs, **shared, **look)
    inputs = {"train": data.fingerprint}
    overwrite = config.overwrite and bool(changes(run, "eval", SUPERVISED, recipe, inputs))
    with begin(run, "eval", SUPERVISED, recipe, inputs, [SUPERVISED], overwrite, str(device)) as step:
        weights = step.folder / LEARNED
        if not step.done:
            broken = _fit(weights, supervised_network(network, len(data.classes)), data, recipe, device)
            step.finish([weights], broken=broken)
            loop.remove_checkpoint(weights.parent)
            say(f"eval {SUPERVISED}: done; {network.arch} learned {len(data.classes)} classes; {weights}")
        return weights


def _fit(weights: Path, network: Network, data: Dataset, recipe: Recipe, device: torch.device) -> list[str]:
    part = Labelled(data, network, recipe, device)
    rows = readable(part.pictures, torch.arange(len(data)), recipe.max_broken)
    model = with_classes(network, len(data.classes), recipe.seed, "eval/supervised")
    loss: Any = partial(_loss, part=part, network=network, recipe=recipe)
    batches = partial(loop.epoch_batches, rows, recipe.batch, recipe.seed)
    loop.fit(model, loss, part.pictures, batches, recipe, weights.parent, device, SUPERVISED)
    networks.save(weights, model.state_dict(), network)
    return part.broken()


def _loss(
    model: nn.Module, batch: Batch, part: Labelled, network: Network, recipe: Recipe
) -> tuple[Tensor, dict[str, Tensor]]:
    rows, pixels = batch.rows[batch.valid], batch.pixels[batch.valid]
    crops = random_resized_crop(pixels, rows, network.size, recipe.seed, batch.epoch, "eval/supervised", recipe.crop)
    logits = model(networks.normalise(crops, network.normalise))
    return part.loss(logits, rows), {"count": batch.valid.sum()}
