"""One look at all rows: the nearest centroid of each, and the sums that the next centroids are made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

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
        on_device: the same as `read`, as tensors on a GPU where the rows are there already.
    """

    count: int
    dim: int
    read: Callable[[int, int], NDArray[np.float32]]
    weights: NDArray[np.float64] | None = None
    on_device: Callable[[int, int], Tensor] | None = None


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


def described(engine: Engine) -> str:
    """For the record of what one of several engines did."""
    return f"{engine.name} ({engine.version})"


def faiss_engine(float16: bool = False) -> Engine:
    """faiss's exhaustive search, on all GPUs where there are any; near-ties are decided in float64.

    So labels do not depend on the device, the block size or the BLAS library behind faiss.

    Args:
        float16: search among centroids (on GPUs also with rows) rounded to float16, with the wider margin that this
            asks for: on GPUs faster products, but more rows to decide anew on the CPU.
    """
    import faiss

    gpus = faiss.get_num_gpus()

    def scan(rows: Rows, centroids: NDArray[np.float32], tick: Callable[[int], object]) -> Pass:
        # faiss computes |x|^2 - 2xc + |c|^2 in float32: far from the origin only centred rows keep their digits.
        origin = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
        index = _index(rows.dim, gpus, float16)
        unit = _unit(centroids - origin) if float16 else None
        index.add(centroids - origin if unit is None else (centroids - origin) / np.float32(unit))
        found = empty_pass(rows, centroids)
        for start, stop in blocks(rows.count, rows.dim):
            block = rows.read(start, stop)
            labels = _nearest(index, block, centroids, origin, unit)
            gap = block - centroids[labels]
            found.labels[start:stop] = labels
            found.distances[start:stop] = np.einsum("ij,ij->i", gap, gap, dtype=np.float64)
            add_rows(found.sums, block, labels, None if rows.weights is None else rows.weights[start:stop])
            tick(stop - start)
        found.counts[:] = np.bincount(found.labels, minlength=len(centroids))
        return found

    where = f"{gpus} GPU" if gpus else "CPU"
    return Engine(f"faiss IndexFlatL2 on {where}{', float16' if float16 else ''}", faiss.__version__, scan)


def _index(dim: int, gpus: int, float16: bool) -> Any:
    import faiss

    if not gpus:
        return faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16) if float16 else faiss.IndexFlatL2(dim)
    if not float16:
        return faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(dim))
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    return faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(dim), options)


def blocks(count: int, dim: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of about BLOCK_NUMBERS numbers, in order."""
    size = max(1, BLOCK_NUMBERS // dim)
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _nearest(
    index: Any,
    block: NDArray[np.float32],
    centroids: NDArray[np.float32],
    origin: NDArray[np.float32],
    unit: float | None = None,
) -> NDArray[np.int64]:
    """(b,) the nearest centroid of each row, exact up to `TIE`, relative.

    `index` holds the centred centroids; with a unit, in multiples of it and as float16.
    """
    if len(centroids) == 1:
        return np.zeros(len(block), np.int64)
    centred = block - origin
    # Centred again in float64, where subtracting float32 numbers leaves exact ties exact.
    wide = centroids.astype(np.float64) - origin
    lengths = np.einsum("ij,ij->i", wide, wide)
    scale = np.einsum("ij,ij->i", centred, centred) + lengths.max()
    if unit is None:
        distances, neighbours = index.search(centred, 2)
        # Rounding of a float32 dot product of d terms stays well below this share of |x|^2 + max |c|^2.
        doubt = 4 * np.finfo(np.float32).eps * np.sqrt(block.shape[1]) * scale
    else:
        distances, neighbours, doubt = _search_half(index, centred, wide, unit)
    labels: NDArray[np.int64] = neighbours[:, 0].copy()
    close = np.flatnonzero(~(distances[:, 1] - distances[:, 0] > doubt))
    if len(close):
        scores = lengths - 2 * (block[close].astype(np.float64) - origin) @ wide.T
        limit = scores.min(axis=1) + TIE * scale[close]
        labels[close] = (scores <= limit[:, None]).argmax(axis=1)
    return labels


def _search_half(
    index: Any, centred: NDArray[np.float32], wide: NDArray[np.float64], unit: float
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """The two nearest by float16, and how far their squared distances may be off: all in multiples of the unit.

    For rows x and centroids c rounded to x' and c', |x'c' - xc| <= |x - x'| |c| + |x'| |c - c'|, both measured, and
    ||c'|^2 - |c|^2| <= 2 |c| |c - c'| + |c - c'|^2. faiss adds products of float16 in float32, at worst by tensor cores
    that cut off: 3 d 2^-24 of |x'| |c'| (device_rounding.py). |x|^2 is the same in both distances.
    """
    small, step = 2.0**-24, 3 * (centred.shape[1] + 16) * 2.0**-24
    rows = centred / np.float32(unit)
    fits = np.abs(rows).max(axis=1) < 2.0**15
    rows[~fits] = 0
    distances, neighbours = index.search(rows, 2)
    length = np.linalg.norm(rows.astype(np.float64), axis=1)
    error = np.linalg.norm(rows - rows.astype(np.float16).astype(np.float64), axis=1) + small * length
    longest = np.linalg.norm(wide, axis=1).max() / unit
    missed = np.linalg.norm(wide / unit - (wide / unit).astype(np.float16), axis=1).max() + small * longest
    off = 2 * (error * longest + (length + error) * missed) + 2 * longest * missed + missed**2
    off += 2 * step * (length + error) * (longest + missed) + step * longest**2 + 8 * small * (length + longest) ** 2
    width = TIE * (length + longest) ** 2
    return distances, neighbours, np.where(fits, 1.05 * (2 * off + width), np.inf)


def _unit(centred: NDArray[np.float32]) -> float:
    """The power of two by which centroids fit float16 with room for rows that are farther out."""
    return float(2.0 ** (np.frexp(np.abs(centred).max(initial=0) or 1)[1] - 8))


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
