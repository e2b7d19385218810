"""The pseudo-labels of several clusterings at once, one head for each on the same network: the mean of their losses.

A cluster tells less than log2(k) bits of an image; clusterings that differ tell more. After DeepCluster-v2's several
prototype heads (Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
2020, appendix), which differ by the start of k-means; here also by k and by the directions that they see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Known, Objective, Sums


def objective(known: Known, temperature: float, device: torch.device) -> Objective:
    """All clusterings of `known`; the head of the first stays with the network. The temperature is not read."""
    labels = known.labels.to(device)
    sizes = [int(k) + 1 for k in known.labels.max(0).values]

    def loss(outputs: Tensor, rows: Tensor) -> tuple[Tensor, Sums]:
        wanted, heads = labels[rows], outputs.split(sizes, 1)
        correct = (heads[0].argmax(1) == wanted[:, 0]).sum()
        losses = [F.cross_entropy(head, wanted[:, view]) for view, head in enumerate(heads)]
        return torch.stack(losses).mean(), {"accuracy": correct}

    return Objective(sum(sizes), sizes[0], "pseudo-labels", loss)
