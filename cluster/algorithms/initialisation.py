"""Where k-means starts: random rows, k-means++, or k-means|| where rows are many.

k-means++: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007, with the greedy choice
among several candidates that scikit-learn makes. k-means||: Bahmani et al., "Scalable k-means++", VLDB 2012.
"""

import math
from collections.abc import Callable
from functools import partial
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng
from ktransfer.errors import UsageError
from ktransfer.progress import bar, say

from ..engines.engine import BLOCK_NUMBERS, Engine, Rows, blocks, faiss_engine
from .sampling import random_order, random_sample

STARTS = ("random", "kmeans++", "kmeans-parallel")
SAMPLE_EACH = 64  # rows for each cluster that k-means++ looks at
SAMPLE_NUMBERS = 2**28  # and no more numbers than 1 GiB of float32
ROUNDS = 5  # of k-means||
OVERSAMPLING = 0.5  # its candidates a round, times k: the least that Bahmani et al. find as good as k-means++
FEWEST = 16  # its candidates a round, where k is small
_DRAWS = 2**20
# |x|^2 - 2xc + |c|^2 in float32 is off by some 2^-24 of |x|^2 + |c|^2: below this share, rows are subtracted instead.
_NEAR = 2.0**-8


def start_of(name: str, rows: Rows, k: int, seed: int, sample: int, engine: Engine) -> NDArray[np.float32]:
    """(k, d) float32, by one of `STARTS` (`sample` as in `kmeans_plus_plus`).

    Raises:
        UsageError: another name, or fewer than k distinct rows.
    """
    if name == "random":
        return random_rows(rows, k, seed)
    if name == "kmeans++":
        return kmeans_plus_plus(rows, k, seed, sample)
    if name == "kmeans-parallel":
        return kmeans_parallel(rows, k, seed, engine)
    raise UsageError(f"start '{name}': give {', '.join(STARTS)}")


def random_rows(rows: Rows, k: int, seed: int) -> NDArray[np.float32]:
    """(k, d) float32: the first k rows of different content in a random order of all rows, whatever their weights.

    Raises:
        UsageError: there are not so many.
    """
    return _filled(np.empty((0, rows.dim), np.float32), rows, k, seed)


def kmeans_plus_plus(
    rows: Rows, k: int, seed: int, sample: int = 0, candidates: int | None = None
) -> NDArray[np.float32]:
    """(k, d) float32, rows of different content: each drawn with a chance in proportion to weight times D^2.

    D is the distance to the nearest row chosen so far. Of several candidates drawn so, the one is taken that leaves the
    least sum of D^2 (greedy). Where the sample has fewer than k distinct rows, random ones are added.

    Memory: the sample as float32.

    Args:
        rows: n rows.
        k: 1 <= k <= number of distinct rows.
        seed: 0 <= seed < 2**32.
        sample: so many random rows are looked at, all if there are no more; 0: 64 k, at most 1 GiB, at least k.
        candidates: for each choice; 2 + log k when not given, as in scikit-learn. 1: plain k-means++.

    Raises:
        UsageError: fewer than k distinct rows.
    """
    size = sample_size(rows.count, rows.dim, k, sample)
    places = np.arange(rows.count) if size == rows.count else random_sample(rows.count, size, seed, "cluster/start")
    if size < rows.count:
        say(f"k-means++: on {size} random rows of {rows.count}")
    weights = np.ones(size) if rows.weights is None else rows.weights[places]
    chosen = _choose(take(rows, places), weights, k, seed, candidates)
    return _filled(take(rows, places[chosen]), rows, k, seed)


def sample_size(count: int, dim: int, k: int, sample: int = 0) -> int:
    """Rows that k-means++ looks at, of `count`; `sample` of them where that is given."""
    return min(count, sample or max(k, min(SAMPLE_EACH * k, SAMPLE_NUMBERS // dim)))


def kmeans_parallel(rows: Rows, k: int, seed: int, engine: Engine | None = None) -> NDArray[np.float32]:
    """(k, d) float32, rows of different content: k-means||, all rows streamed through `engine`, six passes.

    In each of 5 rounds every row becomes a candidate with the chance l w D^2 / sum of w D^2, independently; l is k / 2,
    or 16 if that is more. k-means++ then chooses among them, each weighing as much as the rows nearest to it.

    Args:
        rows: n rows.
        k: 1 <= k <= number of distinct rows.
        seed: 0 <= seed < 2**32.
        engine: finds the nearest candidates; `faiss_engine()` when not given.

    Raises:
        UsageError: fewer than k distinct rows.
    """
    engine = engine or faiss_engine()
    weights = np.ones(rows.count) if rows.weights is None else rows.weights
    expected = max(OVERSAMPLING * k, FEWEST)
    squares = np.full(rows.count, np.inf)
    owners = np.zeros(rows.count, np.int64)
    candidates = np.empty((0, rows.dim), np.float32)
    total = np.cumsum(weights)
    draw = _uniform(seed, "parallel/first", 0, 1) * total[-1]
    fresh = np.minimum(np.searchsorted(total, draw, side="right"), rows.count - 1)
    with bar((ROUNDS + 1) * rows.count, "k-means||", "rows") as shown:
        for step in range(ROUNDS + 1):
            known = {_digest(row) for row in candidates}
            distinct = {digest: row for row in take(rows, fresh) if (digest := _digest(row)) not in known}
            if not distinct:
                break
            found = engine.scan(rows, np.stack(list(distinct.values())), shown.update)
            closer = found.distances < squares
            squares[closer] = found.distances[closer]
            owners[closer] = found.labels[closer] + len(candidates)
            candidates = np.concatenate([candidates, *(row[None] for row in distinct.values())])
            gains = weights * squares
            if step == ROUNDS or not gains.any():
                break
            draws = _uniform(seed, "parallel", step, rows.count)
            fresh = np.flatnonzero(draws * gains.sum() < expected * gains)
    weighed = np.bincount(owners, weights, len(candidates)).astype(np.float64)
    return _filled(candidates[_choose(candidates.copy(), weighed, k, seed, None)], rows, k, seed)


def take(rows: Rows, places: NDArray[np.int64]) -> NDArray[np.float32]:
    """(m, d) float32: the rows at `places` (m,), which rise; -0.0 becomes 0.0, the same point with other bytes."""
    taken = np.empty((len(places), rows.dim), np.float32)
    for start, stop in blocks(rows.count, rows.dim):
        begin, end = np.searchsorted(places, (start, stop)).tolist()
        here = places[begin:end]
        if len(here) * 16 > stop - start:
            taken[begin:end] = rows.read(start, stop)[here - start]
        else:
            for at, place in enumerate(here.tolist(), begin):
                taken[at] = rows.read(place, place + 1)[0]
    taken += 0
    return taken


def _choose(
    data: NDArray[np.float32], weights: NDArray[np.float64], k: int, seed: int, candidates: int | None
) -> NDArray[np.int64]:
    """(at most k,) places of distinct rows by k-means++, rising; fewer than k where no others are. Spoils `data`."""
    # Far from the origin only centred rows keep their digits in a product.
    data -= data.mean(axis=0, dtype=np.float64).astype(np.float32)
    candidates = candidates or 2 + int(math.log(k))
    lengths = np.einsum("ij,ij->i", data, data, dtype=np.float64)
    nearest = np.full(len(data), np.inf)
    chosen: list[int] = []
    with bar(k, "k-means++", "centroids") as shown:
        while len(chosen) < k:
            gains = weights * nearest if chosen else weights
            total = np.cumsum(gains)
            if not total[-1] > 0:
                break
            draws = _uniform(seed, "plus-plus", len(chosen), candidates if chosen else 1)
            # The last row with a gain, should a product round up to the total; never one without.
            places = np.minimum(np.searchsorted(total, draws * total[-1], side="right"), np.flatnonzero(gains)[-1])
            squares = lengths[:, None] + lengths[places] - 2 * (data @ data[places].T)
            left = np.minimum(np.maximum(squares, 0), nearest[:, None])
            best = int((weights @ left).argmin())
            nearest = np.minimum(nearest, _mended(squares[:, best], data, lengths, nearest, int(places[best])))
            chosen.append(int(places[best]))
            shown.update()
    return np.sort(np.array(chosen, np.int64))


def _mended(
    squares: NDArray[np.float64],
    data: NDArray[np.float32],
    lengths: NDArray[np.float64],
    nearest: NDArray[np.float64],
    place: int,
) -> NDArray[np.float64]:
    """(m,) squared distances to row `place`: where little is left of the terms by subtraction, 0 for a twin."""
    doubtful = np.flatnonzero((squares <= _NEAR * (lengths + lengths[place])) & (nearest > 0))
    size = max(1, BLOCK_NUMBERS // data.shape[1])
    for start in range(0, len(doubtful), size):
        part = doubtful[start : start + size]
        gaps = data[part].astype(np.float64) - data[place]
        squares[part] = np.einsum("ij,ij->i", gaps, gaps)
    return squares


def _filled(found: NDArray[np.float32], rows: Rows, k: int, seed: int) -> NDArray[np.float32]:
    """(k, d): `found`, at most k distinct rows, and as many others in a random order as are missing."""
    chosen = {_digest(row): row for row in found}
    order = iter(random_order(rows.count, seed, "cluster/start") if len(chosen) < k else ())
    while len(chosen) < k:
        place = next(order, None)
        if place is None:
            raise UsageError(f"k = {k}, but only {len(chosen)} distinct rows: take a smaller --k")
        content = rows.read(int(place), int(place) + 1)[0] + np.float32(0)
        chosen.setdefault(_digest(content), content)
    return np.stack(list(chosen.values()))


def _digest(row: NDArray[np.float32]) -> bytes:
    return blake2b(row.tobytes(), digest_size=16).digest()


def _uniform(seed: int, purpose: str, step: int, count: int) -> NDArray[np.float64]:
    """(count,) in [0, 1), multiples of 2**-53; entry i depends on nothing but (seed, purpose, step, i)."""
    words: Callable[[torch.Tensor], torch.Tensor] = partial(rng.words, seed, f"cluster/start/{purpose}", step, count=2)
    parts = [words(torch.arange(begin, min(begin + _DRAWS, count))) for begin in range(0, count, _DRAWS)]
    high, low = torch.cat(parts).unbind(1)
    draws: NDArray[np.float64] = ((high << 21) ^ (low >> 11)).numpy() * 2.0**-53
    return draws
