"""Linear probes on several layers with several learning rates at once, and what they reach."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import rng
from ktransfer.training.batch import Batch, Source

from ..intervals import Z95, wilson
from .maps import Layer


class Probes(nn.Module):
    """One linear classifier for each (layer, learning rate), on maps standardised by channel.

    Standardising by the training split's mean and deviation is what batch norm without scale comes to when the trunk is
    frozen; without `maps` to measure them on, they stay as they are. (batch, d) -> one (batch, classes) for each
    learning rate and layer, layer by layer.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, layers: list[Layer], rates: list[float], classes: int, maps: Tensor | None) -> None:
        super().__init__()
        self.layers = layers
        self.rates = rates
        if maps is None:
            shift, scale = (fill(layers[-1].stop) for fill in (torch.zeros, torch.ones))
        else:
            by_layer = [standardisation(maps[:, part.start : part.stop], part) for part in layers]
            shift, scale = (torch.cat(numbers) for numbers in zip(*by_layer, strict=True))
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.heads = nn.ModuleList(nn.Linear(part.stop - part.start, classes) for part in layers for _ in rates)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, maps: Tensor) -> list[Tensor]:
        """See the class."""
        x = (maps - self.shift) * self.scale
        parts = [x[:, part.start : part.stop] for part in self.layers for _ in self.rates]
        return [head(part) for head, part in zip(self.heads, parts, strict=True)]


def standardisation(maps: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Shift and scale, (d,) each, that give every channel of a layer mean 0 and deviation 1 over (n, d) `maps`."""
    by_channel = maps.double().view(len(maps), layer.channels, -1)
    mean = by_channel.mean(dim=(0, 2))
    deviation = by_channel.var(dim=(0, 2), correction=0).clamp(min=1e-12).sqrt()
    cells = layer.grid**2
    return mean.float().repeat_interleave(cells), (1 / deviation).float().repeat_interleave(cells)


def probe_loss(targets: Tensor, views: int) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """The loss for the training loop: the sum of all probes' cross-entropies, which share no weights."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = targets[batch.rows[batch.kept] // views]
        outputs = model(batch.pixels[batch.kept])
        total = torch.stack([F.cross_entropy(logits.float(), wanted) for logits in outputs]).sum()
        correct = torch.stack([(logits.argmax(1) == wanted).sum() for logits in outputs]).float().max()
        return total, {"best_accuracy": correct, "count": batch.valid.sum()}

    return loss


def optimiser(probes: Probes, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with each probe's own learning rate."""
    groups = [
        {"params": list(head.parameters()), "lr": probes.rates[place % len(probes.rates)]}
        for place, head in enumerate(probes.heads)
    ]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)


def predict(probes: Probes, source: Source, rows: Tensor, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(probes, m) int64 predicted classes and the (m,) rows they are for: the valid ones."""
    predictions: list[Tensor] = []
    kept: list[Tensor] = []
    probes.eval()
    with torch.no_grad():
        for chosen, maps, valid, _ in source.batches(iter(rows.split(batch))):
            outputs = probes(maps[valid].to(device))
            predictions.append(torch.stack([logits.argmax(1) for logits in outputs]).cpu())
            kept.append(chosen[valid])
    return torch.cat(predictions, dim=1), torch.cat(kept)


def scores(predicted: Tensor, wanted: Tensor) -> dict[str, float | list[float]]:
    """Top-1 with Wilson's 95 % interval, and mean accuracy per class with a normal one, of (m,) predictions."""
    hit = (predicted == wanted).double()
    top1 = float(hit.mean())
    counts = torch.bincount(wanted).double()
    rates = torch.bincount(wanted, weights=hit)[counts > 0] / counts[counts > 0]
    mean = float(rates.mean())
    # Each class adds its variance; two predictions are added to each, so that few images never make a class certain.
    smooth = (rates * counts[counts > 0] + 1) / (counts[counts > 0] + 2)
    error = Z95 * float((smooth * (1 - smooth) / counts[counts > 0]).sum().sqrt()) / len(rates)
    return {
        "top1": top1,
        "top1_interval": wilson(top1, len(hit)),
        "mean_class": mean,
        "mean_class_interval": [max(0.0, mean - error), min(1.0, mean + error)],
    }


def learnable(rows: Tensor, broken: Iterable[int], batch: int) -> Tensor:
    """(n,) `rows` to learn from: without the broken ones where these could fill a whole batch."""
    lost = torch.isin(rows, torch.tensor(list(broken), dtype=torch.int64))
    return rows[~lost] if int(lost.sum()) >= min(batch, len(rows)) else rows


def hold_out(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that train the probes, and the rows among `count` on which their learning rate is chosen."""
    order = rng.words(seed, "eval/hold-out", 0, torch.arange(count), 1)[:, 0].argsort(stable=True)
    held = max(1, round(share * count))
    return order[held:], order[:held]
