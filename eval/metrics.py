"""Average precision by the rules of PASCAL VOC 2007, and how sure it is.

The 11-point rule (VOC2007 development kit): the mean over recalls 0, 0.1, ..., 1 of the highest precision that is
reached at that recall or more. Images of one score are counted together, so that the order of equal scores never
matters.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng

POINTS = 11
DRAWS = 500
_CHUNK = 2**21  # numbers of one block of draws


def voc_ap(scores: NDArray[np.floating], wanted: NDArray[np.integer]) -> float:
    """11-point average precision of one class.

    Args:
        scores: (n,), higher for "yes".
        wanted: (n,), 1 yes, 0 no, -1 not counted.

    Returns:
        0..1; not a number where no image is a "yes".
    """
    return float(_weighted_ap(scores, wanted, np.ones((1, len(scores)), np.int64))[0])


def mean_ap(scores: NDArray[np.floating], tags: NDArray[np.integer]) -> float:
    """Mean of `voc_ap` over the classes that have a "yes" (arguments as for `voc_map`; at least one class has)."""
    return float(np.mean([voc_ap(scores[:, column], tags[:, column]) for column in _known(tags)]))


def voc_map(
    scores: NDArray[np.floating], tags: NDArray[np.integer], seed: int, draws: int = DRAWS
) -> dict[str, float | list[float]]:
    """`mean_ap` with a 95 % interval.

    Args:
        scores: (n, classes).
        tags: (n, classes), 1 yes, 0 no, -1 not counted (`Dataset.tags`).
        seed: of the bootstrap over images (percentiles 2.5 and 97.5 of `draws` repetitions; a class that a draw
            leaves without a "yes" is left out of that draw's mean).

    Returns:
        {"map": ..., "map_interval": [low, high]}, in 0..1.
    """
    count = len(scores)
    known, found = _known(tags), mean_ap(scores, tags)
    means: list[NDArray[np.float64]] = []
    step = max(1, _CHUNK // count)
    for start in range(0, draws, step):
        index = torch.arange(start, min(start + step, draws))
        drawn = rng.integers(seed, "eval/bootstrap", 0, index, count, count).numpy()
        weights = np.stack([np.bincount(row, minlength=count) for row in drawn])
        by_class = np.stack([_weighted_ap(scores[:, column], tags[:, column], weights) for column in known])
        there = ~np.isnan(by_class)
        means.append(np.where(there, by_class, 0).sum(0) / np.maximum(there.sum(0), 1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return {"map": found, "map_interval": [min(float(low), found), max(float(high), found)]}


def _known(tags: NDArray[np.integer]) -> list[int]:
    """The classes that have a "yes"."""
    return np.flatnonzero((tags == 1).any(axis=0)).tolist()


def _weighted_ap(
    scores: NDArray[np.floating], wanted: NDArray[np.integer], weights: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`voc_ap` for each of (draws, n) whole weights: how often each image is counted. (draws,)"""
    counted = np.flatnonzero(wanted >= 0)
    order = counted[np.argsort(-scores[counted], kind="stable")]
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the last of each run of equal scores
    yes, all_ = (np.cumsum(weights[:, order] * factor, axis=1)[:, ends] for factor in (wanted[order] == 1, np.int64(1)))
    precision = yes / np.maximum(all_, 1)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    positives = yes[:, -1:]
    total = np.zeros(len(weights))
    for point in range(POINTS):  # whole numbers: 3 of 10 must reach a recall of 0.3
        reached = (POINTS - 1) * yes >= point * positives
        total += highest[np.arange(len(weights)), reached.argmax(axis=1)]
    return np.where(positives[:, 0] > 0, total / POINTS, np.nan)
