"""Multinomial logistic regression on one vector: the linear probe of "How Well Do Self-Supervised Models Transfer?".

Protocol `logreg/2` (docs/papers.md). Centre square; maps of the last layer (or of `--layers`) averaged
to one vector, not standardised; L-BFGS, C = 1 / decay, 45 decays from 1e-6 to 1e5, the largest first, each from the
weights of the one before; the decay that is best on a fifth of the training split (seeded; the smallest of equals) is
fitted again, along the same path, to all of it; the test split is used once. Theirs: bicubic resizing, 224 pixels.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktransfer.data.dataset import Dataset
from ktransfer.networks import Network
from ktransfer.progress import bar

from ..arms import Arm
from ..config import EvalConfig
from ..learners.frozen import check_frozen, evaluate_layers, labels_of
from ..learners.logistic import fitted, last_best, right_by_decay
from ..learners.maps import Frozen, Layer
from ..learners.probe import hold_out, scores
from ..result import Result

PROTOCOL = "logreg/2"
TITLE = "logistic regression"
MEASURES = {"top1": "top-1 %", "mean_class": "mean per class %"}
HELD_OUT = 0.2
DECAYS = tuple(float(f"{decay:.6g}") for decay in np.logspace(5, -6, 45))


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong layers, and how much disk the vectors need.

    Raises:
        UsageError: one line.
    """
    check_frozen(evaluated, splits, config, run, last=True)


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """Accuracies, the weight decay that was chosen, and what each reached on the images held out for that."""
    return evaluate_layers(
        arm, splits, config, folder, device, partial(_one_layer, config=config, label=arm.name), last=True
    )


def _one_layer(train: Frozen, test: Frozen, layer: Layer, config: EvalConfig, label: str) -> dict[str, Any]:
    vectors, labels = train.layer(layer), labels_of(train)
    held = np.zeros(len(labels), np.bool_)
    held[hold_out(len(labels), HELD_OUT, config.seed)[1].numpy()] = True
    with bar(2 * len(DECAYS), f"logreg of {label}, {layer.name}", "fits") as shown:
        right = right_by_decay(vectors, labels, held, DECAYS, shown.update)
        best = last_best(right)
        model = fitted(vectors, labels, DECAYS[: best + 1], shown.update)
    predictions = torch.from_numpy(model.predict(test.layer(layer)))
    return {
        "decay": DECAYS[best],
        "C": float(f"{1 / DECAYS[best]:.6g}"),
        "held_out": {str(decay): round(float(n / held.sum()), 4) for decay, n in zip(DECAYS, right, strict=True)},
        **scores(predictions, torch.from_numpy(labels_of(test))),
    }
