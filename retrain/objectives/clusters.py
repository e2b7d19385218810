"""One pseudo-label an image, or its class: softmax and cross-entropy (paper §3.4; docs/papers.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Known, Objective, Sums


def objective(known: Known, temperature: float, device: torch.device) -> Objective:
    """The first clustering of `known`; the temperature is not read."""
    labels = known.labels[:, 0].to(device)
    k = int(labels.max()) + 1

    def loss(outputs: Tensor, rows: Tensor) -> tuple[Tensor, Sums]:
        wanted = labels[rows]
        correct = (outputs.argmax(1) == wanted).sum()
        return F.cross_entropy(outputs, wanted), {"accuracy": correct}

    return Objective(k, k, "pseudo-labels", loss)
