"""How even the clusters are, and how well they match classes that the clustering never saw."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def size_facts(sizes: NDArray[np.int64]) -> dict[str, int | float]:
    """How even clusters of `sizes`, (k,) with k at least 1, are.

    Returns:
        min, median, max, empty (clusters without a row), imbalance (faiss: k * sum size^2 / rows^2, 1 when even).
    """
    rows = int(sizes.sum())
    return {
        "min": int(sizes.min()),
        "median": float(np.median(sizes)),
        "max": int(sizes.max()),
        "empty": int((sizes == 0).sum()),
        "imbalance": float(len(sizes) * np.square(sizes, dtype=np.float64).sum() / max(rows, 1) ** 2),
    }


def histogram(sizes: NDArray[np.int64]) -> dict[str, int]:
    """Number of clusters by size, in bins that double: {"0": 2, "1": 0, "2-3": 5, "4-7": 1}.

    The first bin is that of the smallest size, the last that of the largest; (k,) sizes >= 0, k at least 1.
    """
    # frexp's exponent is the number of binary digits: 0 for 0, 1 for 1, 2 for 2 and 3 ...
    digits = np.frexp(sizes.astype(np.float64))[1]
    bins = {}
    for count in range(int(digits.min()), int(digits.max()) + 1):
        low, high = (1 << count) >> 1, max((1 << count) - 1, 0)
        bins[f"{low}" if low == high else f"{low}-{high}"] = int((digits == count).sum())
    return bins


def sparkline(bins: dict[str, int]) -> str:
    """A histogram in one line, one block character for each bin; only an empty bin is blank."""
    most = max(bins.values())
    bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // most)] for count in bins.values())
    names = list(bins)
    return f"{names[0].partition('-')[0]} |{bars}| {names[-1].rpartition('-')[2]}"


def agreement(first: NDArray[np.int32], second: NDArray[np.int32]) -> dict[str, float]:
    """How far two clusterings of the same n >= 1 rows agree, whatever the clusters are numbered.

    Args:
        first, second: (n,) int32, at least 0.

    Returns:
        nmi (arithmetic mean) and ari; best_match: for each cluster of the first the highest Jaccard index with one of
        the second, averaged over the clusters that have rows (Hennig, "Cluster-wise assessment of cluster stability",
        2007). All are 1 for the same partition.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    pairs, together = np.unique(np.stack([first, second]), axis=1, return_counts=True)
    sizes, others = np.bincount(first), np.bincount(second)
    jaccard = together / (sizes[pairs[0]] + others[pairs[1]] - together)
    best = np.zeros(len(sizes))
    np.maximum.at(best, pairs[0], jaccard)
    return {
        "nmi": float(normalized_mutual_info_score(first, second)),
        "ari": float(adjusted_rand_score(first, second)),
        "best_match": float(best[sizes > 0].mean()),
    }


def quality(labels: NDArray[np.int32], targets: NDArray[np.int32], k: int) -> dict[str, int | float | None]:
    """Sizes over all labelled rows; purity, NMI and ARI over those whose class is known.

    Args:
        labels: (n,) int32 in [-1, k), -1 for a broken image.
        targets: (n,) int32, -1 where unknown.
        k: number of clusters.

    Returns:
        rows, k, those of `size_facts`,
        compared (rows with a class), classes, purity (share of rows whose class is the commonest of their cluster), nmi
        (arithmetic mean), ari (these three None where no class is known).
    """
    sizes = np.bincount(labels[labels >= 0], minlength=k)
    known = (labels >= 0) & (targets >= 0)
    found: dict[str, int | float | None] = {
        "rows": int(sizes.sum()),
        "k": k,
        **size_facts(sizes),
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
