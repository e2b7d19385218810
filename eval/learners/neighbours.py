"""The k most similar of many references, exactly, block by block and without a matrix of distances.

A neighbour is one whole number of 64 bits: its similarity in the upper half, in an order that integers share with
floats, its place in the lower half, reversed. So the best k are a partition of integers, and of equal similarities the
first reference wins, whatever the blocks. Only what beats a query's k-th best so far is looked at: of a block of b
references after n others about k b / n, so that nearly all of the time is the product of matrices (benchmarks/knn.py).
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ktransfer.machine import cores

QUERIES, REFERENCES = 512, 8192  # a block of similarities is 16 MiB
FIRST = 1024  # references of the first block, of which all are looked at
_PLACES = 0xFFFFFFFF
_LOWER = 0x7FFFFFFF


class Neighbours(NamedTuple):
    """What `search` finds.

    Attributes:
        similarities: (q, k) float32 in [-1, 1], falling.
        places: (q, k) int64, of which references they are.
    """

    similarities: NDArray[np.float32]
    places: NDArray[np.int64]

    def without(self, own: NDArray[np.int64]) -> "Neighbours":
        """k - 1 neighbours of each query that is itself the reference `own`, (q,); else the last one goes."""
        alien = self.places != own[:, None]
        alien[alien.all(axis=1), -1] = False
        kept = len(own), self.places.shape[1] - 1
        return Neighbours(self.similarities[alien].reshape(kept), self.places[alien].reshape(kept))


def search(
    queries: NDArray[Any],
    read: Callable[[int, int], NDArray[Any]],
    count: int,
    k: int,
    tick: Callable[[int], object] = lambda done: None,
) -> Neighbours:
    """The k references of highest cosine similarity for each query; of equal ones the first.

    Blocks of queries go to threads, each with its own product, so that looking at products takes all cores too, and the
    numbers do not depend on how many there are. Memory: queries * k * 8 bytes, and 50 MB and 20 MB a thread.

    Args:
        queries: (q, d), of any length.
        read: (start, stop) -> (stop - start, d) references, each read once.
        count: of the references, 1 <= count < 2**32.
        k: 1 <= k <= count.
        tick: is called with the number of references done since the last call.
    """
    queries = unit(queries)
    best = np.full((len(queries), k), _keys(np.array([-np.inf], np.float32), np.array([_PLACES]))[0])
    limits = np.full(len(queries), -np.inf, np.float32)
    room = threading.local()

    def one(at: int, block: NDArray[np.float32], start: int) -> None:
        if not hasattr(room, "products"):  # memory that is new each time costs as much as the comparison
            room.products, room.above = (np.empty(QUERIES * REFERENCES, kind) for kind in (np.float32, np.bool_))
        part = slice(at, at + QUERIES)
        shape = len(best[part]), len(block)
        product = room.products[: shape[0] * shape[1]].reshape(shape)
        np.matmul(queries[part], block.T, out=product)
        hits = np.greater(product, limits[part, None], out=room.above[: product.size].reshape(shape))
        _take(best[part], limits[part], product, np.flatnonzero(hits), start)

    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:
        start = 0
        while start < count:
            stop = min(count, start + min(REFERENCES, max(FIRST, start)))
            block = unit(read(start, stop))
            wait = [pool.submit(one, at, block, start) for at in range(0, len(queries), QUERIES)]
            for job in wait:
                job.result()
            tick(stop - start)
            start = stop
    best.sort(axis=1)
    return Neighbours(_similarities(best[:, ::-1]), _PLACES - (best[:, ::-1] & _PLACES))


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    """(n, d) rows of length 1, float32; rows of zeros stay so."""
    wide: NDArray[np.float32] = torch.from_numpy(rows).float().numpy()  # numpy takes long over float16
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    if not ((lengths > 1e-10) & (lengths < 1e18)).all():  # squares may have left the range of float32
        wide = wide / np.maximum(np.abs(wide).max(axis=1, keepdims=True, initial=0), np.float32(1e-37))
        lengths = np.maximum(np.sqrt(np.einsum("ij,ij->i", wide, wide)), np.float32(1e-37))
    found: NDArray[np.float32] = wide * (1 / lengths)[:, None]
    return found


def vote(found: Neighbours, labels: NDArray[np.int64], classes: int, k: int, temperature: float) -> NDArray[np.int64]:
    """(q,) the class of most votes; each of the first k neighbours has exp(similarity / temperature); of equals
    the first class.

    Args:
        labels: (count,) the references' classes, 0..classes - 1.
    """
    predictions = np.empty(len(found.places), np.int64)
    for at in range(0, len(predictions), QUERIES):
        near = found.similarities[at : at + QUERIES, :k].astype(np.float64)
        # Relative to the nearest: the same order of votes, and no overflow at low temperatures.
        weights = np.exp((near - near[:, :1]) / temperature)
        cells = labels[found.places[at : at + QUERIES, :k]] + classes * np.arange(len(near))[:, None]
        votes = np.bincount(cells.ravel(), weights.ravel(), classes * len(near))
        predictions[at : at + QUERIES] = votes.reshape(-1, classes).argmax(axis=1)
    return predictions


def _take(
    best: NDArray[np.int64],
    limits: NDArray[np.float32],
    product: NDArray[np.float32],
    hits: NDArray[np.intp],
    start: int,
) -> None:
    """Put the similarities at flat places `hits` of a block among the best of their queries, in place."""
    if not len(hits):
        return
    row = hits // product.shape[1]
    keys = _keys(product.ravel()[hits], hits - row * product.shape[1] + start)
    counts = np.bincount(row, minlength=len(best))
    most = int(counts.max())
    both = np.full((len(best), most + best.shape[1]), np.iinfo(np.int64).min)
    both[:, most:] = best
    both[row, np.arange(len(hits)) - (counts.cumsum() - counts)[row]] = keys
    both.partition(most, axis=1)
    best[:] = both[:, most:]
    limits[:] = _similarities(both[:, most])


def _keys(similarities: NDArray[np.float32], places: NDArray[np.integer]) -> NDArray[np.int64]:
    bits = (similarities + np.float32(0)).view(np.int32)  # -0 becomes 0, as the two are equal
    return (_ordered(bits).astype(np.int64) << 32) | (_PLACES - places.astype(np.int64))


def _similarities(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    return _ordered((keys >> 32).astype(np.int32)).view(np.float32)


def _ordered(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """The bits of floats as integers of the same order, and back."""
    return bits ^ ((bits >> 31) & np.int32(_LOWER))
