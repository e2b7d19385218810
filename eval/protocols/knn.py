"""k nearest neighbours: how far a network's own geometry already separates the classes, with nothing trained.

Protocol `knn/1`, after the weighted k-NN of instance discrimination (Wu et al. 2018), as it is usual since. Centre
square; maps of each layer averaged to one vector (`--grid`), scaled to length 1; cosine similarity; a neighbour votes
for its class with exp(similarity / temperature). Exact, all references. k is the best of `--neighbours` for up to 4096
images of the training split among all others of it; the test split is used once.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng
from ktransfer.artifacts.features import valid_rows
from ktransfer.data.dataset import Dataset
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.progress import bar

from ..arms import Arm
from ..config import EvalConfig
from ..learners.frozen import check_frozen, evaluate_layers, labels_of
from ..learners.maps import Frozen, Layer
from ..learners.neighbours import Neighbours, search, vote
from ..learners.probe import scores
from ..result import Result

PROTOCOL = "knn/1"
TITLE = "k nearest neighbours"
MEASURES = {"top1": "weighted, top-1 %", "mean_class": "weighted, mean per class %", "nearest": "1-NN, top-1 %"}
SAMPLE = 4096  # images of the training split on which k is chosen


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong numbers of neighbours and layers, and how much disk the vectors need.

    Raises:
        UsageError: one line.
    """
    neighbours(config)
    check_frozen(evaluated, splits, config, run)


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """Accuracies of weighted k-NN and 1-NN, layer by layer; k, and what each k reached on the training split."""
    one_layer = partial(_one_layer, classes=len(splits[0].classes), config=config, label=arm.name)
    return evaluate_layers(arm, splits, config, folder, device, one_layer)


def neighbours(config: EvalConfig) -> list[int]:
    """The values of `--neighbours`, smallest first.

    Raises:
        UsageError: they are not positive whole numbers.
    """
    words = [part.strip() for part in config.neighbours.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < int(word) <= 10_000 for word in words):
        raise UsageError(
            f"--neighbours {config.neighbours}: must be whole numbers in 1..10000 separated by commas, such as 20,200"
        )
    return sorted({int(word) for word in words})


def _one_layer(
    train: Frozen, test: Frozen, layer: Layer, classes: int, config: EvalConfig, label: str
) -> dict[str, Any]:
    labels = labels_of(train)
    count = len(labels)
    tried = sorted({min(k, count - 1) for k in neighbours(config)})  # as many as there are beside an image itself
    read = valid_rows(train.features)

    def nearest(queries: NDArray[Any], k: int, name: str) -> Neighbours:
        with bar(count, f"knn of {label}, {layer.name}, {name}") as shown:
            return search(queries, lambda a, b: read(a, b)[:, layer.start : layer.stop], count, k, shown.update)

    chosen = rng.words(config.seed, "eval/knn", 0, torch.arange(count), 1)[:, 0].argsort(stable=True)[:SAMPLE].numpy()
    sample = train.features.rows[np.flatnonzero(train.features.valid)[chosen], layer.start : layer.stop]
    held = nearest(sample, tried[-1] + 1, "choice of k").without(chosen)
    reached = [float((vote(held, labels, classes, k, config.temperature) == labels[chosen]).mean()) for k in tried]
    best = tried[int(np.argmax(reached))]

    found = nearest(test.layer(layer), best, "test")
    wanted = torch.from_numpy(labels_of(test))
    first = scores(torch.from_numpy(labels[found.places[:, 0]]), wanted)
    return {
        "k": best,
        "held_out": {str(k): round(value, 4) for k, value in zip(tried, reached, strict=True)},
        **scores(torch.from_numpy(vote(found, labels, classes, best, config.temperature)), wanted),
        "nearest": first["top1"],
        "nearest_interval": first["top1_interval"],
    }
