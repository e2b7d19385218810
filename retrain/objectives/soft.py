"""How near an image is to every centroid, as a distribution: the soft targets of Hinton et al., "Distilling the
Knowledge in a Neural Network" (2015), with the k-means of the teacher's features in the place of its classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Known, Objective, Sums, Vectors

TEMPERATURE = 0.05
"""Of squared distances between rows of length 1, which lie in 0..4."""


def objective(known: Known, temperature: float, device: torch.device) -> Objective:
    """The distribution over the centroids of `known`: softmax of minus the squared distances over the temperature."""
    vectors, made = Vectors(known, device), known.centroids
    assert made is not None
    points = torch.from_numpy(made.centroids).to(device)
    k, heat = len(points), temperature or TEMPERATURE
    turn = None
    if made.projection is not None:
        mean, components, _, scale = (torch.from_numpy(part).to(device) for part in made.projection)
        turn = mean, components * scale

    def shares(rows: Tensor) -> Tensor:
        seen = vectors.raw(rows)
        if turn is not None:
            seen = (seen - turn[0]) @ turn[1]
        if made.normalise:
            seen = F.normalize(seen, dim=1)
        return (-torch.cdist(seen, points).square() / heat).softmax(1)

    def loss(outputs: Tensor, rows: Tensor) -> tuple[Tensor, Sums]:
        wanted = shares(rows)
        correct = (outputs.argmax(1) == wanted.argmax(1)).sum()
        return F.cross_entropy(outputs, wanted), {"accuracy": correct}

    return Objective(k, k, "pseudo-labels", loss)
