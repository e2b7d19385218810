"""The direction of the teacher's features around their mean, through one linear layer: 1 - cosine.

After Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), with the cosine in the place of the squared
distance, so that the length of a feature need not be learned.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Known, Objective, Sums, Vectors


def objective(known: Known, temperature: float, device: torch.device) -> Objective:
    """All numbers of a teacher's row; the temperature is not read."""
    vectors = Vectors(known, device)
    columns = len(vectors.mean)

    def loss(outputs: Tensor, rows: Tensor) -> tuple[Tensor, Sums]:
        cosines = F.cosine_similarity(outputs.float(), vectors(rows), dim=1)
        return 1 - cosines.mean(), {"cosine": cosines.sum()}

    return Objective(columns, columns, "features", loss)
