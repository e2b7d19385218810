"""Random orders and samples of rows, functions of the seed alone, in 24 bytes a row at most."""

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng

_AT_ONCE = 2**20


def random_order(count: int, seed: int, purpose: str) -> NDArray[np.int64]:
    """(count,) int64: all rows below `count`, once each."""
    return _keys(count, seed, purpose).argsort(kind="stable")


def random_sample(count: int, sample: int, seed: int, purpose: str) -> NDArray[np.int64]:
    """(min(sample, count),) int64: the first of that order, rising."""
    if sample >= count:
        return np.arange(count)
    return np.sort(_keys(count, seed, purpose).argpartition(sample)[:sample])


def _keys(count: int, seed: int, purpose: str) -> NDArray[np.int64]:
    keys = np.empty(count, np.int64)
    for start in range(0, count, _AT_ONCE):
        places = torch.arange(start, min(start + _AT_ONCE, count))
        high, low = rng.words(seed, purpose, 0, places, 2).unbind(1)
        keys[start : start + len(places)] = ((high << 31) ^ low).numpy()
    return keys
