"""How even the clusters are, and how well they match classes that the clustering never saw."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def quality(labels: NDArray[np.int32], targets: NDArray[np.int32], k: int) -> dict[str, int | float | None]:
    """Sizes over all labelled rows; purity, NMI and ARI over those whose class is known.

    Args:
        labels: (n,) int32 in [-1, k), -1 for a broken picture.
        targets: (n,) int32, -1 where unknown.
        k: number of clusters.

    Returns:
        rows, k, min, median, max (cluster sizes), empty, imbalance (faiss: k * sum size^2 / rows^2, 1 when even),
        compared (rows with a class), classes, purity (share of rows whose class is the commonest of their cluster), nmi
        (arithmetic mean), ari (these three None where no class is known).
    """
    sizes = np.bincount(labels[labels >= 0], minlength=k)
    rows = int(sizes.sum())
    known = (labels >= 0) & (targets >= 0)
    found: dict[str, int | float | None] = {
        "rows": rows,
        "k": k,
        "min": int(sizes.min()),
        "median": float(np.median(sizes)),
        "max": int(sizes.max()),
        "empty": int((sizes == 0).sum()),
        "imbalance": float(k * np.square(sizes, dtype=np.float64).sum() / max(rows, 1) ** 2),
        "compared": int(known.sum()),
        "classes": len(np.unique(targets[known])),
    }
    return found | _agreement(labels[known], targets[known])


def summary(found: dict[str, Any]) -> str:
    """One line of what `quality` found."""
    line = (
        f"{found['rows']} rows in {found['k']} clusters of {found['min']} / {found['median']:g} / {found['max']} rows "
        f"(min / median / max), {found['empty']} empty, imbalance {found['imbalance']:.2f}"
    )
    if found["purity"] is None:
        return line
    return (
        f"{line}; against {found['classes']} classes ({found['compared']} rows): "
        f"purity {found['purity']:.3f}, NMI {found['nmi']:.3f}, ARI {found['ari']:.3f}"
    )


def _agreement(labels: NDArray[np.int32], targets: NDArray[np.int32]) -> dict[str, float | None]:
    if not len(labels):
        return {"purity": None, "nmi": None, "ari": None}
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    pairs, together = np.unique(np.stack([labels, targets]), axis=1, return_counts=True)
    commonest = np.zeros(int(labels.max()) + 1, np.int64)
    np.maximum.at(commonest, pairs[0], together)
    return {
        "purity": float(commonest.sum() / len(labels)),
        "nmi": float(normalized_mutual_info_score(targets, labels)),
        "ari": float(adjusted_rand_score(targets, labels)),
    }
