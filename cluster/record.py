"""The quality record of a clustering: what can be said of it without classes, at the price of one look at the rows.

Silhouettes are those of squared Euclidean distances, which k-means minimises; for rows of length 1 they are those of
cosine distances. The mean squared distance of a row x to a cluster of mean m is |x - m|^2 + v, v being the mean squared
distance of the cluster's rows to m. So the silhouette of a row counts *all* rows of *all* clusters, and costs k
distances instead of n. (Among 2000 sampled rows of 2000 clusters, most would be alone in theirs.)
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import files, rng
from ktransfer.progress import bar

from .algorithms.lloyd import Clustering
from .algorithms.sampling import random_sample
from .engines.engine import Rows, add_rows, blocks
from .quality import agreement, histogram, size_facts

SCHEMA = 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Survey(NamedTuple):
    """What one look at all rows of a finished clustering yields.

    Attributes:
        distances: (n,) float32, squared distance of each row to the centroid of its label.
        chosen: (s,) int64, the sampled rows, rising.
        sample: (s, d) float32, those rows.
        means: (k, d) float64, of the rows of each label (the centroid, where there are none).
        spreads: (k,) float64, mean squared distance of those rows to their mean.
    """

    distances: NDArray[np.float32]
    chosen: NDArray[np.int64]
    sample: NDArray[np.float32]
    means: NDArray[np.float64]
    spreads: NDArray[np.float64]


def survey(rows: Rows, found: Clustering, sample: int) -> Survey:
    """Look once at all rows; `sample` of them (all, if there are fewer) are drawn by the clustering's seed."""
    chosen = random_sample(rows.count, sample, found.seed, "cluster/sample")
    kept = np.empty((len(chosen), rows.dim), np.float32)
    distances = np.empty(rows.count, np.float32)
    moments = np.zeros(len(found.centroids))
    sums = np.zeros(found.centroids.shape)
    with bar(rows.count, "quality", "rows") as shown:
        for start, stop in blocks(rows.count, rows.dim):
            block, labels = rows.read(start, stop), found.labels[start:stop].astype(np.int64)
            # Relative to the centroid: far from the origin, squares would lose their digits.
            gaps = block - found.centroids[labels]
            squares = np.einsum("ij,ij->i", gaps, gaps, dtype=np.float64)
            distances[start:stop] = squares
            moments += np.bincount(labels, squares, len(moments))
            add_rows(sums, gaps, labels)
            first, last = np.searchsorted(chosen, (start, stop))
            kept[first:last] = block[chosen[first:last] - start]
            shown.update(stop - start)
    sizes = np.maximum(np.bincount(found.labels, minlength=len(moments)), 1)
    sums /= sizes[:, None]
    spreads = np.maximum(moments / sizes - np.einsum("ij,ij->i", sums, sums), 0)
    sums += found.centroids
    return Survey(distances, chosen, kept, sums, spreads)


def derived_seed(seed: int) -> int:
    """The seed of the second clustering, 0 <= seed < 2**32."""
    return int(rng.words(seed, "cluster/stability", 0, torch.tensor([0]), 1))


def margins(sample: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """(s,) float64 in [0, 1]: (d2 - d1) / d2 of the distances d1 <= d2 to the two nearest centroids; None where k = 1.

    0 where both are the same point as the row.
    """
    if len(centroids) < 2:
        return None
    nearest = _nearest(sample, centroids, np.zeros(len(centroids)), 2)
    found = np.zeros(len(sample))
    for start, stop in blocks(*sample.shape):
        one, two = (_squares(sample[start:stop], centroids[nearest[start:stop, place]]) for place in (0, 1))
        first, second = np.sqrt(np.minimum(one, two)), np.sqrt(np.maximum(one, two))
        np.divide(second - first, second, out=found[start:stop], where=second > 0)
    return found


def silhouettes(seen: Survey, labels: NDArray[np.int32]) -> NDArray[np.float64] | None:
    """The silhouettes of the sampled rows among all rows, by squared Euclidean distances.

    (b - a) / max(a, b) for a the mean squared distance to the other rows of the cluster, and b the least mean squared
    distance to the rows of another cluster; 0 for a row that is alone in its cluster, or where a = b = 0
    (Rousseeuw, "Silhouettes", 1987).

    Args:
        seen: what `survey` returned.
        labels: (n,) int32, of all rows.

    Returns:
        (s,) float64 in [-1, 1]; None where fewer than two clusters have rows.
    """
    sizes = np.bincount(labels, minlength=len(seen.means))
    filled = np.flatnonzero(sizes)
    if len(filled) < 2:
        return None
    found = np.zeros(len(seen.chosen))
    others = _nearest(seen.sample, seen.means, np.where(sizes > 0, seen.spreads, np.inf), 1, labels[seen.chosen])[:, 0]
    for start, stop in blocks(*seen.sample.shape):
        block, own, other = seen.sample[start:stop], labels[seen.chosen[start:stop]], others[start:stop]
        count = sizes[own]
        near = (_squares(block, seen.means[own]) + seen.spreads[own]) * count / np.maximum(count - 1, 1)
        far = _squares(block, seen.means[other]) + seen.spreads[other]
        most = np.maximum(near, far)
        np.divide(far - near, most, out=found[start:stop], where=(count > 1) & (most > 0))
    return found


def make_record(found: Clustering, seen: Survey, second: Clustering | None = None) -> dict[str, Any]:
    """What `quality.json` holds; the same clustering gives the same record.

    Args:
        found: the clustering.
        seen: `survey` of it.
        second: a clustering of the same rows from `derived_seed`, for the stability.

    Returns:
        schema, rows, k, seed, objective (per iteration), final_objective, sizes (`size_facts` and their histogram),
        sampled (rows); silhouette and margin (mean and quantiles over the sample, None where there is one cluster);
        stability (`agreement` with the second, its seed and final objective; None without).
    """
    sizes = np.bincount(found.labels, minlength=len(found.centroids))
    stability = None
    if second is not None:
        stability = {"seed": second.seed, "final_objective": second.final_objective}
        stability |= {name: _rounded(value) for name, value in agreement(found.labels, second.labels).items()}
    return {
        "schema": SCHEMA,
        "rows": len(found.labels),
        "k": len(found.centroids),
        "seed": found.seed,
        "objective": found.objective,
        "final_objective": found.final_objective,
        "sizes": size_facts(sizes) | {"histogram": histogram(sizes)},
        "sampled": len(seen.chosen),
        "silhouette": _spread(silhouettes(seen, found.labels)),
        "margin": _spread(margins(seen.sample, found.centroids)),
        "stability": stability,
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write it as JSON, whole or not at all."""
    files.write_json(path, record)


def record_summary(record: dict[str, Any]) -> str:
    """One line of the record."""
    parts = [
        f"{label} {record[name][fact]:.2f}"
        for name, fact, label in (("silhouette", "mean", "silhouette"), ("margin", "0.5", "margin median"))
        if record[name]
    ]
    parts.append(f"imbalance {record['sizes']['imbalance']:.2f}")
    if record["stability"]:
        facts = record["stability"]
        parts.append(
            f"agreement with seed {facts['seed']}: NMI {facts['nmi']:.3f}, ARI {facts['ari']:.3f}, "
            f"best match {facts['best_match']:.3f}"
        )
    return "; ".join(parts)


def _spread(values: NDArray[np.float64] | None) -> dict[str, float] | None:
    if values is None:
        return None
    quantiles = np.quantile(values, QUANTILES)
    return {"mean": _rounded(float(values.mean()))} | {
        f"{share:g}": _rounded(float(value)) for share, value in zip(QUANTILES, quantiles, strict=True)
    }


def _rounded(value: float) -> float:
    """Six decimals are more than a sample can tell, and hide the order of float sums."""
    return round(value, 6) + 0.0


def _nearest(
    sample: NDArray[np.float32],
    points: NDArray[Any],
    extra: NDArray[np.float64],
    count: int,
    own: NDArray[np.int32] | None = None,
) -> NDArray[np.int64]:
    """(s, count) int64, in no order: the points p of least |x - p|^2 + extra for each row x, `own` left out.

    In float64, and by blocks of points: of 100,000 centroids there shall be no third copy.
    """
    # Far from the origin squares lose their digits.
    origin = points.mean(axis=0, dtype=np.float64)
    best = np.zeros((len(sample), count), np.int64)
    least = np.full(best.shape, np.inf)
    for low, high in blocks(*points.shape):
        wide = points[low:high].astype(np.float64) - origin
        lengths = np.einsum("ij,ij->i", wide, wide) + extra[low:high]
        for start, stop in blocks(len(sample), max(high - low, sample.shape[1])):
            scores = lengths - 2 * (sample[start:stop].astype(np.float64) - origin) @ wide.T
            if own is not None:
                mine = np.flatnonzero((low <= own[start:stop]) & (own[start:stop] < high))
                scores[mine, own[start:stop][mine] - low] = np.inf
            scores = np.concatenate([least[start:stop], scores], axis=1)
            names = np.broadcast_to(np.arange(low, high), (stop - start, high - low))
            chosen = np.argpartition(scores, count - 1)[:, :count]
            least[start:stop] = np.take_along_axis(scores, chosen, 1)
            best[start:stop] = np.take_along_axis(np.concatenate([best[start:stop], names], axis=1), chosen, 1)
    return best


def _squares(rows: NDArray[np.float32], points: NDArray[Any]) -> NDArray[np.float64]:
    """(b,) squared distances, row by row, from differences: exact also where rows nearly meet their points."""
    gaps = rows.astype(np.float64) - points
    squares: NDArray[np.float64] = np.einsum("ij,ij->i", gaps, gaps)
    return squares
