"""The exact engine where its extension was not built: dense products in numpy, near-ties decided in float64.

The certificate is that of exact.cpp (ROUNDING): a float32 score is off by less than `doubt`, so a row whose best two
scores are further apart has its nearest centroid; the others are computed exactly.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from ktransfer import __version__

from .bounds import SAFETY, UNIT, Centred, Doubles, Floats, centre, longest
from .engine import BLOCK_NUMBERS, TIE, Engine, Pass, Rows, add_rows, blocks, empty_pass

SCORES_AT_ONCE = 2**20  # 4 MiB, which stay in the cache between the product and the two looks at them


def dense_engine(threads: int = 1) -> Engine:
    """Lloyd's pass by dense products on the CPU; the number of threads changes no byte.

    In numpy and not in torch, whose products and maxima are slower here and may round to bfloat16 by a global setting.
    """

    def scan(rows: Rows, centroids: Floats, tick: Callable[[int], object]) -> Pass:
        return _scan(rows, centroids, tick, threads)

    return Engine("exact, dense in numpy", f"{__version__}, numpy {np.__version__}", scan)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()  # looking for them takes milliseconds


def _scan(rows: Rows, centroids: Floats, tick: Callable[[int], object], threads: int) -> Pass:
    target = centre(centroids)
    found = empty_pass(rows, centroids)
    k, d = centroids.shape
    # One column more makes the bias part of the product.
    columns = np.column_stack([target.centred, target.lengths / -2]).astype(np.float32).T
    size = max(1, min(SCORES_AT_ONCE // k, BLOCK_NUMBERS // d))
    spare: SimpleQueue[tuple[Floats, Floats]] = SimpleQueue()
    for _ in range(threads):
        spare.put((np.ones((size, d + 1), np.float32), np.empty((size, k), np.float32)))

    def work(start: int, block: Floats) -> None:
        stop = start + len(block)
        room = spare.get()
        try:
            centred, scores = room[0][: len(block)], room[1][: len(block)]
            np.subtract(block, target.origin, out=centred[:, :-1])
            np.matmul(centred, columns, out=scores)
            found.labels[start:stop] = labels = _nearest(block, centred[:, :-1], scores, target)
        finally:
            spare.put(room)
        gap = block - target.raw[labels]
        found.distances[start:stop] = np.einsum("ij,ij->i", gap, gap, dtype=np.float64)

    def add(start: int, block: Floats, jobs: list[Future[None]]) -> None:
        for job in jobs:
            job.result()
        part = slice(start, start + len(block))
        add_rows(
            found.sums, block, found.labels[part].astype(np.int64), None if rows.weights is None else rows.weights[part]
        )
        tick(len(block))

    # Each thread has products of its own: all else is then shared out too, and no thread waits inside the library.
    with _libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        before: tuple[int, Floats, list[Future[None]]] | None = None
        for start, stop in blocks(rows.count, d):
            block = rows.read(start, stop)
            begins = range(0, stop - start, size)
            jobs = [pool.submit(work, start + begin, block[begin : begin + size]) for begin in begins]
            if before:  # its rows are added up while this block is worked on
                add(*before)
            before = start, block, jobs
        if before:
            add(*before)
    found.counts[:] = np.bincount(found.labels, minlength=k)
    return found


def _nearest(raw: Floats, centred: Floats, scores: Floats, target: Centred) -> NDArray[np.int64]:
    """(b,) the nearest centroid of each row; `scores` (b, k) is spoilt."""
    places = np.arange(len(scores))
    labels: NDArray[np.int64] = scores.argmax(axis=1)
    best = scores[places, labels]
    scores[places, labels] = -np.inf
    second = scores.max(axis=1)
    width = longest(target)
    d = raw.shape[1]
    lengths = np.sqrt(np.einsum("ij,ij->i", centred, centred).astype(np.float64)) * (1 + d * UNIT)
    # d links: nothing is known of the order in which the library adds.
    error = SAFETY * UNIT * (d + 8)
    doubt = 2 * error * (lengths * width + width**2 / 2) + TIE * (lengths**2 + width**2) + 8 * (d + 8) * 2.0**-126
    # Written so that NaN and infinity (rows near the limits of float32) are looked at again as well.
    close = np.flatnonzero(~(best.astype(np.float64) - second > doubt))
    if len(close):
        scores[close, labels[close]] = best[close]
        near = ~(scores[close] < (best - doubt)[close, None])
        labels[close] = _decide(raw[close], lengths[close], near, target)
    return labels


def _decide(raw: Floats, lengths: Doubles, near: NDArray[np.bool_], target: Centred) -> NDArray[np.int64]:
    """The lowest index among the nearest, of the pairs in `near` (b, k)."""
    open_ = np.flatnonzero(near.any(axis=0))  # few: converting all centroids would cost as much as their product
    # Centred in float64, where subtracting float32 numbers leaves exact ties exact.
    wide = target.raw[open_].astype(np.float64) - target.origin
    scale = lengths**2 + target.widest
    exact = np.einsum("ij,ij->i", wide, wide) - 2 * (raw.astype(np.float64) - target.origin) @ wide.T
    exact[~near[:, open_]] = np.inf
    tied = exact <= (exact.min(axis=1) + TIE * scale)[:, None]
    return np.asarray(open_[tied.argmax(axis=1)], np.int64)
