"""The direction of the teacher's features around their mean, through one linear layer: (1 - cosine) / temperature.

After Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), with the cosine in the place of the squared
distance, so that the length of a feature need not be learned. Divided by the temperature it is, but for a constant, the
negative log-likelihood of directions around the network's own (von Mises-Fisher of concentration 1 / temperature), and
its gradients are as large as those of the other objectives at the same learning rate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Known, Objective, Sums, Vectors

TEMPERATURE = 0.05


def objective(known: Known, temperature: float, device: torch.device) -> Objective:
    """All numbers of a teacher's row."""
    vectors, heat = Vectors(known, device), temperature or TEMPERATURE
    columns = len(vectors.mean)

    def loss(outputs: Tensor, rows: Tensor) -> tuple[Tensor, Sums]:
        cosines = F.cosine_similarity(outputs.float(), vectors(rows), dim=1)
        return (1 - cosines.mean()) / heat, {"cosine": cosines.sum()}

    return Objective(columns, columns, "features", loss)
