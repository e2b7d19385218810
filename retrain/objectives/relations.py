"""How similar an image is to others, the anchors, told as a distribution over them.

After Abbasi Koohpayegani et al., "CompRess: Self-Supervised Learning by Compressing Representations" (NeurIPS 2020),
and Fang et al., "SEED: Self-supervised Distillation for Visual Representation" (ICLR 2021). As in CompRess with one
queue, the anchors are the teacher's for both networks; they are fixed here, as the teacher sees every image once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransfer import rng

from .objective import Known, Objective, Sums, Vectors

TEMPERATURE = 0.04  # CompRess's
ANCHORS = 4096


def objective(known: Known, temperature: float, device: torch.device) -> Objective:
    """Cosines to at most ANCHORS images, drawn by the seed; the image itself is none of its anchors."""
    vectors, heat = Vectors(known, device), temperature or TEMPERATURE
    order = rng.words(known.seed, "retrain/anchors", 0, rows := known.rows(), 1)[:, 0].argsort(stable=True)
    chosen = rows[order[:ANCHORS]]
    anchors, columns = vectors(chosen.to(device)), len(vectors.mean)
    own = torch.full((len(known.labels),), -1)
    own[chosen] = torch.arange(len(chosen))
    own = own.to(device)

    def loss(outputs: Tensor, rows: Tensor) -> tuple[Tensor, Sums]:
        itself = torch.arange(len(anchors), device=device) == own[rows][:, None]
        wanted, told = (
            (F.normalize(seen.float(), dim=1) @ anchors.T / heat).masked_fill(itself, -1e4)
            for seen in (vectors(rows), outputs)
        )
        nearest = (told.argmax(1) == wanted.argmax(1)).sum()
        return F.cross_entropy(told, wanted.softmax(1)), {"accuracy": nearest}

    return Objective(columns, columns, "features", loss)
