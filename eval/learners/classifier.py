"""Linear heads on one layer of a frozen network as a classifier of pixels, for what happens to pixels or labels."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import networks, rng
from ktransfer.artifacts.features import Features
from ktransfer.data.dataset import Dataset
from ktransfer.training import loop
from ktransfer.training.batch import Batch, Loss
from ktransfer.training.device import autocast

from ..arms import Arm, model_of
from ..config import EvalConfig
from ..protocols.linear import rates
from .maps import FORWARD_BATCH, Layer, Views, cached_maps, choose_layers, reading
from .probe import Probes, hold_out, learnable, optimiser, predict, probe_loss

HELD_OUT = 0.1
SAMPLE = 4096  # images on which the channels are standardised
KINDS_OF_NOISE = ("uniform", "pair")


class Training(NamedTuple):
    """What the heads learn from.

    Attributes:
        trunk: frozen, on the device.
        views: the maps of all layers of the training images, and of their mirror images.
        learning, held: (n,) rows to learn from, and to choose on.
    """

    arm: Arm
    trunk: nn.Module
    layers: list[Layer]
    train: Dataset
    views: list[Features]
    learning: Tensor
    held: Tensor
    config: EvalConfig
    folder: Path
    device: torch.device


class Chosen(NamedTuple):
    """The head that was right for most of the held-out images."""

    layer: Layer
    rate: float
    held_out: float
    head: Probes


class Classifier(nn.Module):
    """A frozen trunk and linear heads on one of its layers, differentiable down to the pixels.

    (b, 3, s, s) in 0..255 -> (b, classes) logits of the first head; `heads` gives those of all.
    """

    def __init__(self, training: Training, layer: Layer, probes: list[Probes]) -> None:
        super().__init__()
        self.trunk, self.probes = training.trunk, nn.ModuleList(probes)
        self.network, self.layer, self.config = training.arm.network, layer, training.config
        self.paths = {layer.name: networks.layers(self.network, self.trunk)[layer.name]}
        self.eval().requires_grad_(False)

    def heads(self, pixels: Tensor) -> list[Tensor]:
        """The logits of every head, float32."""
        with autocast(self.config, pixels.device):
            x = networks.normalise(pixels, self.network.normalise)
            maps = networks.feature_maps(self.trunk, self.paths, x)[self.layer.name]
        pooled = F.adaptive_avg_pool2d(maps.float(), self.layer.grid).flatten(1)
        return [logits.float() for probe in self.probes for logits in probe(pooled)]

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        return self.heads(pixels)[0]


def prepare(arm: Arm, train: Dataset, config: EvalConfig, folder: Path, device: torch.device) -> Training:
    """The maps of all layers, kept below `folder`; killed, it goes on."""
    trunk = model_of(arm, config.seed).to(device).eval()
    layers = choose_layers(trunk, arm.network, config.layers)
    pooled = reading(trunk, arm, layers, config, device)
    views = [
        cached_maps(folder / f"train-{mirror}.h5", arm, layers, pooled, (train,), 0, config, mirror)
        for mirror in (False, True)
    ]
    learning, held = hold_out(len(train), HELD_OUT, config.seed)
    learning = learnable(learning, np.flatnonzero(~views[0].valid).tolist(), config.batch)
    return Training(arm, trunk, layers, train, views, learning, held, config, folder, device)


def choose(training: Training) -> Chosen:
    """Learn heads on all layers with all rates, as `linear` does, and take the best on the held-out images."""
    _, _, layers, train, views, learning, held, config, _, device = training
    targets = torch.from_numpy(train.targets).long()
    found = rates(config)
    sample = _sample(views[0], learning[:SAMPLE], layers[-1])
    probes = Probes(layers, found, len(train.classes), sample).to(device)
    _learn(training, probes, probe_loss(targets.to(device), 2), views, "probe")
    predictions, rows = predict(probes, Views(views[:1]), held, config.batch, device)
    right = (predictions == targets[rows]).double().mean(1)
    best = int(right.argmax())
    layer = layers[best // len(found)]
    head = Probes([_alone(layer)], [0.0], len(train.classes), None).to(device)
    head.shift, head.scale = (part[layer.start : layer.stop] for part in (probes.shift, probes.scale))
    head.heads[0] = probes.heads[best]
    return Chosen(layer, found[best % len(found)], float(right[best]), head)


def learn_from_noise(training: Training, chosen: Chosen, shares: list[float]) -> Probes:
    """One head for each kind and share of wrong labels, kind by kind, on the chosen layer with its rate."""
    classes, config = len(training.train.classes), training.config
    targets = torch.from_numpy(training.train.targets).long()
    each = [noisy_labels(targets, share, kind, classes, config.seed) for kind in KINDS_OF_NOISE for share in shares]
    labels = torch.stack(each).to(training.device)
    columns = [replace(view, rows=view.rows[:, chosen.layer.start : chosen.layer.stop]) for view in training.views]
    sample = _sample(columns[0], training.learning[:SAMPLE], _alone(chosen.layer))
    probes = Probes([_alone(chosen.layer)], [chosen.rate] * len(labels), classes, sample).to(training.device)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch.rows[batch.valid] // 2
        outputs = model(batch.pixels[batch.valid])
        losses = [F.cross_entropy(logits.float(), wrong[rows]) for logits, wrong in zip(outputs, labels, strict=True)]
        return torch.stack(losses).sum(), {"count": batch.valid.sum()}

    _learn(training, probes, loss, columns, "noise")
    return probes


def noisy_labels(targets: Tensor, share: float, kind: str, classes: int, seed: int) -> Tensor:
    """(n,) labels of which a share is wrong: `uniform` draws them again among all classes, `pair` takes the next class.

    A label that is touched at one share is touched, to the same class, at every larger one.
    """
    rows = torch.arange(len(targets))
    touched = rng.uniform(seed, "eval/noise", 0, rows, 1)[:, 0] < share
    drawn = rng.integers(seed, "eval/noise-class", 0, rows, 1, classes)[:, 0]
    return torch.where(touched, drawn if kind == "uniform" else (targets + 1) % classes, targets)


def _learn(training: Training, probes: Probes, loss: Loss, views: list[Features], name: str) -> None:
    """Train heads, each image or its mirror image in turn, as `linear` does."""
    config = training.config

    def batches(epoch: int) -> Tensor:
        order = loop.epoch_batches(training.learning, config.batch, config.seed, epoch)
        mirrored = rng.words(config.seed, "eval/mirror", epoch, order.flatten(), 1).view(order.shape) & 1
        return order * 2 + mirrored

    adjust = optimiser(probes, config.momentum, config.weight_decay)
    folder, label = training.folder / name, f"{name} {training.arm.name}"
    loop.fit(probes, loss, Views(views), batches, config, folder, training.device, label, None, adjust)


def _alone(layer: Layer) -> Layer:
    """The same layer where its numbers are all there are."""
    return Layer(layer.name, layer.channels, layer.grid, 0, layer.stop - layer.start)


def _sample(features: Features, rows: Tensor, last: Layer) -> Tensor:
    """(m, d) float32 maps, up to the last layer, of those of (n,) rows whose images are not broken."""
    chosen = np.sort(rows.numpy()[features.valid[rows.numpy()]])
    found = torch.empty(len(chosen), last.stop)
    for at in range(0, len(chosen), FORWARD_BATCH):
        part = chosen[at : at + FORWARD_BATCH]
        found[at : at + len(part)] = torch.from_numpy(np.asarray(features.rows[part], np.float32))
    return found
