"""Networks that learn the labels, whole or behind frozen layers: what `nonlinear` and `finetune` have in common.

A tenth of the training split chooses the learning rate and is not learned from; the test split is evaluated once, by
the network of the chosen rate, on the mean of its predictions to `--test-crops` random squares of each image.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ktransfer import files, networks
from ktransfer.data.augment import centre_crop, random_resized_crop, random_square, stored_side
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader, readable
from ktransfer.errors import StageError
from ktransfer.networks import Network
from ktransfer.progress import say
from ktransfer.run import need_disk
from ktransfer.training import checkpoint, loop
from ktransfer.training.batch import Batch
from ktransfer.training.batch_divider import seen_by_batch_norm
from ktransfer.training.device import autocast
from ktransfer.training.log import Diverged
from ktransfer.training.options import LoopOptions

from ..arms import Arm
from ..config import EvalConfig
from ..metrics import mean_ap, voc_map
from ..protocols.linear import rates
from ..result import Result, broken_lines, result_of
from .heads import Before, with_classes
from .probe import hold_out, scores

HELD_OUT = 0.1
MEASURES = {"top1": "top-1 %", "mean_class": "mean per class %", "map": "VOC07 11-point mAP %"}


class Phase(NamedTuple):
    """A part of a training: its share of the epochs, and the factor on the learning rate of what lies before.

    Where that factor is 0, its weights stay, and its batch norms and dropouts work as in a test.
    """

    share: float
    factor: float


class Column(NamedTuple):
    """One column of the table: `start` makes the network before its training, `before` is what the phases' factor is
    for; a network that `start` makes is the same each time."""

    name: str
    start: Callable[[], tuple[nn.Module, Before]]
    phases: tuple[Phase, ...]


class Tuned(nn.Module):
    """A network of which some modules always stay in evaluation mode."""

    def __init__(self, model: nn.Module, still: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.still = still

    def train(self, mode: bool = True) -> "Tuned":
        """Set the mode of all but those."""
        super().train(mode)
        for name in self.still:
            self.model.get_submodule(name).eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) -> (batch, classes)."""
        logits: Tensor = self.model(x)
        return logits


class Labelled:
    """The images of one split, and the labels that are learned from them: one an image, or several."""

    def __init__(self, data: Dataset, network: Network, config: LoopOptions, device: torch.device) -> None:
        self.data = data
        self.images = ImageLoader(data, stored_side(network.size), config.workers, cache=config.cache_images)
        self.several = data.tags is not None
        labels = data.targets if data.tags is None else data.tags
        self.labels = torch.from_numpy(labels.astype("int64")).to(device)

    def loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Mean over images of the cross-entropy, or of the sum over classes of that of each class's sigmoid."""
        wanted = self.labels[rows]
        if not self.several:
            return F.cross_entropy(logits.float(), wanted)
        by_class = F.binary_cross_entropy_with_logits(logits.float(), (wanted == 1).float(), reduction="none")
        return (by_class * (wanted >= 0)).sum() / len(rows)

    def evaluated(self, predictions: Tensor, rows: Tensor, seed: int) -> dict[str, Any]:
        """The measures of (m, classes) predictions for (m,) rows, both on the CPU, with intervals."""
        wanted = self.labels.cpu()[rows]
        if not self.several:
            return dict(scores(predictions.argmax(1), wanted))
        return dict(voc_map(predictions.numpy(), wanted.numpy(), seed))

    def reached(self, predictions: Tensor, rows: Tensor) -> float:
        """The measure that rates are chosen by, in 0..1: top-1 or mAP (arguments as for `evaluated`)."""
        wanted = self.labels.cpu()[rows]
        if not self.several:
            return float((predictions.argmax(1) == wanted).double().mean())
        return mean_ap(predictions.numpy(), wanted.numpy())

    def broken(self) -> list[str]:
        """What could not be read."""
        return broken_lines(self.data, self.images.broken)


def check(evaluated: list[Network], classes: int, config: EvalConfig, run: Path) -> None:
    """Find wrong rates, images that are too small, and how much disk the trainings need.

    Raises:
        UsageError: one line.
    """
    tried = rates(config)
    for network in evaluated:
        with networks.fitting(network), torch.no_grad():
            model = with_classes(network, classes, 0, "check").eval()
            model(torch.zeros(1, 3, network.size, network.size))
        weights = sum(part.numel() * part.element_size() for part in model.state_dict().values())
        # One file for each rate; what a phase ended with; weights and momentum of a checkpoint.
        need_disk(run, (len(tried) + 3) * weights, "eval")


def inputs(arms: list[Arm], splits: tuple[Dataset, Dataset], config: EvalConfig) -> dict[str, str]:
    """How many images a batch norm learns from at once, where a network has one and they are not the whole batch."""
    classes = len(splits[0].classes)
    for arm in arms:
        if seen_by_batch_norm(config, partial(with_classes, arm.network, classes, 0, "check")):
            return {"micro-batch": str(config.micro_batch)}
    return {}


def evaluate_columns(
    arm: Arm,
    columns: list[Column],
    splits: tuple[Dataset, Dataset],
    config: EvalConfig,
    folder: Path,
    device: torch.device,
) -> Result:
    """Train each column at each rate, choose the rate on the images held out, and evaluate the chosen network.

    Args:
        folder: for what is written on the way; killed, it goes on.
    """
    train, test = (Labelled(data, arm.network, config, device) for data in splits)
    learning, held = hold_out(len(splits[0]), HELD_OUT, config.seed)
    every = readable(train.images, torch.arange(len(splits[0])), config.max_broken)
    sound = torch.zeros(len(splits[0]), dtype=torch.bool)
    sound[every] = True
    learning, held = learning[sound[learning]], held[sound[held]]
    if not len(held) or (train.several and not (train.labels.cpu()[held] == 1).any()):
        raise StageError(
            f"{splits[0].spec}: a tenth of it is too small to choose a learning rate by; give more labelled images"
        )
    tested = readable(test.images, torch.arange(len(splits[1])), config.max_broken)
    tried, found = rates(config), dict[str, dict[str, Any]]()
    for column in columns:
        kept = folder / f"{column.name}.json"
        if not kept.is_file():
            say(f"{config.protocol} {arm.name}: {column.name}")
            reached = {
                rate: _reached(arm, column, rate, train, (learning, held), config, folder / column.name, device)
                for rate in tried
            }
            best = max(tried, key=lambda rate: reached[rate])
            if reached[best] < 0:
                raise StageError(f"{column.name}: the loss is not finite at any of --lrs {config.lrs}; give lower ones")
            model, _ = column.start()
            with files.in_unicode(folder / column.name / f"{best}.safetensors") as place:
                model.load_state_dict(load_file(place))
            predictions = crop_predictions(model.to(device), arm.network, test.images, tested, config, device)
            held_out = {str(rate): round(value, 4) if value >= 0 else None for rate, value in reached.items()}
            cell = {"lr": best, "held_out": held_out, **test.evaluated(predictions, tested, config.seed)}
            files.write_json(kept, cell)
            files.remove(folder / column.name)
        found[column.name] = files.read_json(kept)
    return result_of(arm.network, found, train.broken() + test.broken())


def _reached(
    arm: Arm,
    column: Column,
    rate: float,
    train: Labelled,
    rows: tuple[Tensor, Tensor],
    config: EvalConfig,
    folder: Path,
    device: torch.device,
) -> float:
    """What a training at one rate reaches on the rows held out: top-1 or mAP, -1 where it diverges.

    Its weights are in `folder`/RATE.safetensors.
    """
    weights, kept = folder / f"{rate}.safetensors", folder / f"{rate}.json"
    if not kept.is_file():
        learning, held = rows
        model, before = column.start()
        label, place = f"{config.protocol} {column.name} {rate}", folder / str(rate)
        try:
            tune(model, before, column.phases, rate, train, learning, arm.network, config, place, device, label)
        except Diverged:
            say(f"{label}: the loss is not finite; this rate is left out")
            value = -1.0
        else:
            networks.save(weights, model.state_dict(), arm.network)
            predictions = crop_predictions(model, arm.network, train.images, held, config, device)
            value = train.reached(predictions, held)
        files.write_json(kept, value)
        files.remove(place)
    return float(files.read_json(kept))


def tune(
    model: nn.Module,
    before: Before,
    phases: tuple[Phase, ...],
    rate: float,
    train: Labelled,
    rows: Tensor,
    network: Network,
    config: EvalConfig,
    folder: Path,
    device: torch.device,
    label: str,
) -> None:
    """Train a network in place, phase after phase, on random parts of the images; killed, it goes on.

    Args:
        before: the part that the phases' factors are for.
        rate: learning rate of the rest.
        rows: (n,) int64 of the training split.
        folder: `0`, `1`, ... in it hold a phase's checkpoint and what it ended with.
        label: on the bar and in the seeds.
    """
    for number, (phase, epochs) in enumerate(zip(phases, epochs_of(phases, config.epochs), strict=True)):
        place = folder / str(number)
        ended = place / "model.safetensors"
        if ended.is_file():
            with files.in_unicode(ended) as name:
                model.load_state_dict(load_file(name))
            continue
        options = replace(config, epochs=epochs)
        tuned = Tuned(model, before.modules if phase.factor == 0 else ())
        loop.fit(
            tuned,
            partial(
                crop_loss, train=train, network=network, seed=config.seed, purpose="eval/tuning", smallest=config.crop
            ),
            train.images,
            partial(loop.epoch_batches, rows, config.batch, config.seed),
            options,
            place,
            device,
            label,
            None,
            optimiser(model.to(device), before, phase, rate, config),
        )
        networks.save(ended, model.state_dict(), network)
        checkpoint.remove(place)


def epochs_of(phases: tuple[Phase, ...], epochs: int) -> list[int]:
    """The epochs of each phase, at least 1; the last takes what the others leave."""
    early = [max(1, round(phase.share * epochs)) for phase in phases[:-1]]
    return [*early, max(1, epochs - sum(early))]


def optimiser(model: nn.Module, before: Before, phase: Phase, rate: float, config: EvalConfig) -> torch.optim.SGD:
    """SGD of what a phase moves, without weight decay on biases and norms; what it does not move needs no gradient."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        factor = phase.factor if name in before.names else 1.0
        weight.requires_grad_(factor > 0)
        if factor > 0:
            groups.setdefault((factor * rate, config.weight_decay * (weight.ndim > 1)), []).append(weight)
    return torch.optim.SGD(
        [{"params": weights, "lr": lr, "weight_decay": decay} for (lr, decay), weights in groups.items()],
        lr=rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        fused=True,
    )


def crop_loss(
    model: nn.Module, batch: Batch, train: Labelled, network: Network, seed: int, purpose: str, smallest: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a network on random parts of the images, for `loop.fit` (see `random_resized_crop`)."""
    rows, pixels = batch.rows[batch.valid], batch.pixels[batch.valid]
    crops = random_resized_crop(pixels, rows, network.size, seed, batch.epoch, purpose, smallest)
    logits = model(networks.normalise(crops, network.normalise))
    return train.loss(logits, rows), {"count": batch.valid.sum()}


@torch.no_grad()
def crop_predictions(
    model: nn.Module, network: Network, images: ImageLoader, rows: Tensor, config: EvalConfig, device: torch.device
) -> Tensor:
    """The mean over the crops of each image of softmax, or of sigmoids where labels are several.

    Args:
        rows: (n,) int64; of each image `--test-crops` random squares, or where that is 0 its centre.

    Returns:
        (n, classes) float32 on the CPU.
    """
    squash = partial(torch.softmax, dim=1) if images.dataset.tags is None else torch.sigmoid
    predictions: list[Tensor] = []
    model.eval()
    for chosen, pixels, _, _ in images.batches(iter(rows.split(config.batch))):
        chosen, pixels = chosen.to(device), pixels.to(device)
        squares = [
            random_square(pixels, chosen, network.size, config.seed, number, "eval/test-crops")
            for number in range(config.test_crops)
        ] or [centre_crop(pixels, network.size)]
        with autocast(config, device):
            logits = [model(networks.normalise(square, network.normalise)) for square in squares]
        predictions.append(torch.stack([squash(one.float()) for one in logits]).mean(0).cpu())
    return torch.cat(predictions)
