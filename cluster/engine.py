"""One look at all rows: the nearest centroid of each, and the sums that the next centroids are made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_NUMBERS = 2**22  # one block is 16 MiB of float32: large for GEMM, small for memory
TIE = 1e-12


@dataclass(frozen=True)
class Rows:
    """Rows that are read block by block, as often as needed.

    Attributes:
        count: n.
        dim: d.
        read: (start, stop) -> (stop - start, d) float32, finite, the same numbers at every call.
        weights: (n,) float64 > 0, how much each row counts in means and objective; all alike when None.
    """

    count: int
    dim: int
    read: Callable[[int, int], NDArray[np.float32]]
    weights: NDArray[np.float64] | None = None


class Pass(NamedTuple):
    """What one look at all rows yields.

    Attributes:
        labels: (n,) int32 in [0, k), the nearest centroid.
        distances: (n,) float32, squared Euclidean distance to it.
        sums: (k, d) float64, the rows of each cluster added up, each times its weight.
        counts: (k,) int64, rows.
    """

    labels: NDArray[np.int32]
    distances: NDArray[np.float32]
    sums: NDArray[np.float64]
    counts: NDArray[np.int64]


def empty_pass(rows: Rows, centroids: NDArray[np.float32]) -> Pass:
    """Room for what a look at all rows yields."""
    return Pass(
        np.empty(rows.count, np.int32),
        np.empty(rows.count, np.float32),
        np.zeros(centroids.shape),
        np.zeros(len(centroids), np.int64),
    )


class Engine(NamedTuple):
    """The part of k-means that costs the time.

    Attributes:
        name: is stored with the result.
        version: of the library behind it.
        scan: (rows, centroids (k, d) float32, tick(rows done)) -> Pass.
    """

    name: str
    version: str
    scan: Callable[[Rows, NDArray[np.float32], Callable[[int], object]], Pass]


def faiss_engine() -> Engine:
    """faiss's exhaustive search, on all GPUs where there are any; near-ties are decided in float64.

    So labels do not depend on the device, the block size or the BLAS library behind faiss.
    """
    import faiss

    gpus = faiss.get_num_gpus()

    def scan(rows: Rows, centroids: NDArray[np.float32], tick: Callable[[int], object]) -> Pass:
        # faiss computes |x|^2 - 2xc + |c|^2 in float32: far from the origin only centred rows keep their digits.
        origin = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
        index: Any = faiss.IndexFlatL2(rows.dim)
        if gpus:
            index = faiss.index_cpu_to_all_gpus(index)
        index.add(centroids - origin)
        found = empty_pass(rows, centroids)
        for start, stop in blocks(rows.count, rows.dim):
            block = rows.read(start, stop)
            labels = _nearest(index, block, centroids, origin)
            gap = block - centroids[labels]
            found.labels[start:stop] = labels
            found.distances[start:stop] = np.einsum("ij,ij->i", gap, gap, dtype=np.float64)
            add_rows(found.sums, block, labels, None if rows.weights is None else rows.weights[start:stop])
            tick(stop - start)
        found.counts[:] = np.bincount(found.labels, minlength=len(centroids))
        return found

    return Engine(f"faiss IndexFlatL2 on {f'{gpus} GPU' if gpus else 'CPU'}", faiss.__version__, scan)


def blocks(count: int, dim: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of about BLOCK_NUMBERS numbers, in order."""
    size = max(1, BLOCK_NUMBERS // dim)
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _nearest(
    index: Any, block: NDArray[np.float32], centroids: NDArray[np.float32], origin: NDArray[np.float32]
) -> NDArray[np.int64]:
    """(b,) the nearest centroid of each row, exact up to `TIE`, relative; `index` holds the centred centroids."""
    if len(centroids) == 1:
        return np.zeros(len(block), np.int64)
    centred = block - origin
    distances, neighbours = index.search(centred, 2)
    labels: NDArray[np.int64] = neighbours[:, 0].copy()
    # Centred again in float64, where subtracting float32 numbers leaves exact ties exact.
    wide = centroids.astype(np.float64) - origin
    lengths = np.einsum("ij,ij->i", wide, wide)
    # Rounding of a float32 dot product of d terms stays well below this share of |x|^2 + max |c|^2.
    doubt = 4 * np.finfo(np.float32).eps * np.sqrt(block.shape[1])
    scale = np.einsum("ij,ij->i", centred, centred) + lengths.max()
    close = np.flatnonzero(~(distances[:, 1] - distances[:, 0] > doubt * scale))
    if len(close):
        scores = lengths - 2 * (block[close].astype(np.float64) - origin) @ wide.T
        limit = scores.min(axis=1) + TIE * scale[close]
        labels[close] = (scores <= limit[:, None]).argmax(axis=1)
    return labels


def add_rows(
    sums: NDArray[np.float64],
    block: NDArray[np.float32],
    labels: NDArray[np.int64],
    weights: NDArray[np.float64] | None = None,
) -> None:
    """Add each row, times its weight, to the sum of its cluster, in row order."""
    weighed: Any = block if weights is None else block * weights[:, None]
    order = np.argsort(labels, kind="stable")
    ranked = labels[order]
    edges = [0, *(np.flatnonzero(np.diff(ranked)) + 1).tolist(), len(order)]
    for begin, end in pairwise(edges):
        sums[ranked[begin]] += np.add.reduce(weighed[order[begin:end]], axis=0, dtype=np.float64)
