"""The exact engine where its extension was not built: dense products in numpy, near-ties decided in float64.

The certificate is that of exact.cpp (ROUNDING): a float32 score is off by less than `doubt`, so a row whose best two
scores are further apart has its nearest centroid, and the others are looked at again.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ktransfer import __version__

from .bounds import SAFETY, UNIT, Doubles, Floats, Target, aim, longest
from .engine import BLOCK_NUMBERS, TIE, Engine, Pass, Rows, add_rows, blocks, empty_pass

SCORES_AT_ONCE = 2**19  # 2 MiB, which stay in the cache between the product and the two looks at them


def dense_engine() -> Engine:
    """Lloyd's pass by dense products on the CPU.

    In numpy and not in torch, whose products and maxima are slower here and may round to bfloat16 by a global setting.
    """
    return Engine("exact, dense in numpy", f"{__version__}, numpy {np.__version__}", _scan)


def _scan(rows: Rows, centroids: Floats, tick: Callable[[int], object]) -> Pass:
    target = aim(centroids)
    found = empty_pass(rows, centroids)
    # One column more makes the bias part of the product.
    columns = np.column_stack([target.centred, target.lengths / -2]).astype(np.float32).T
    size = max(1, min(SCORES_AT_ONCE // len(centroids), BLOCK_NUMBERS // rows.dim))
    scores = np.empty((size, len(centroids)), np.float32)
    centred = np.ones((size, rows.dim + 1), np.float32)
    for start, stop in blocks(rows.count, rows.dim):
        block = rows.read(start, stop)
        labels = np.empty(stop - start, np.int64)
        for begin in range(0, stop - start, size):
            part = slice(begin, min(begin + size, stop - start))
            count = part.stop - begin
            np.subtract(block[part], target.origin, out=centred[:count, :-1])
            np.matmul(centred[:count], columns, out=scores[:count])
            labels[part] = _nearest(block[part], centred[:count, :-1], scores[:count], target)
            gap = block[part] - target.raw[labels[part]]
            found.distances[start + begin : start + part.stop] = np.einsum("ij,ij->i", gap, gap, dtype=np.float64)
        found.labels[start:stop] = labels
        add_rows(found.sums, block, labels, None if rows.weights is None else rows.weights[start:stop])
        tick(stop - start)
    found.counts[:] = np.bincount(found.labels, minlength=len(centroids))
    return found


def _nearest(raw: Floats, centred: Floats, scores: Floats, target: Target) -> NDArray[np.int64]:
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


def _decide(raw: Floats, lengths: Doubles, near: NDArray[np.bool_], target: Target) -> NDArray[np.int64]:
    """The lowest index among the nearest, of the pairs in `near` (b, k)."""
    # Centred in float64, where subtracting float32 numbers leaves exact ties exact.
    wide = target.raw.astype(np.float64) - target.origin
    squares = np.einsum("ij,ij->i", wide, wide)
    scale = lengths**2 + squares.max()
    exact = squares - 2 * (raw.astype(np.float64) - target.origin) @ wide.T
    exact[~near] = np.inf
    tied = exact <= (exact.min(axis=1) + TIE * scale)[:, None]
    return np.asarray(tied.argmax(axis=1), np.int64)
