"""Intervals of measures that have no formula for one: 95 % by the bootstrap over images."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng

from .intervals import Z95

TIMES = 100
Places = NDArray[np.int64]


def resamples(count: int, seed: int, times: int = TIMES) -> Iterator[Places]:
    """`times` draws with replacement of (count,) places in 0..count - 1, each a function of (seed, its number)."""
    for time in range(times):
        yield rng.integers(seed, "eval/bootstrap", time, torch.arange(count), 1, count)[:, 0].numpy()


def with_intervals(
    measure: Callable[[Places], dict[str, float]], count: int, seed: int, low: float = 0.0, high: float = 1.0
) -> dict[str, Any]:
    """Measures of all images, and 1.96 standard deviations over resampled images to either side, within low..high.

    Not the percentiles: what is drawn twice counts twice, so that measures of agreement are higher on every resample,
    and the percentiles may not even hold the value.

    Args:
        measure: (m,) places of `count` images -> the measures on these, by name.

    Returns:
        For each its value and, as "NAME_interval", [low, high].
    """
    found: dict[str, Any] = {}
    drawn = [measure(places) for places in resamples(count, seed)]
    for name, value in measure(np.arange(count)).items():
        error = Z95 * float(np.std([one[name] for one in drawn], ddof=1))
        ends = [max(min(low, value), value - error), min(max(high, value), value + error)]
        found |= {name: value, f"{name}_interval": ends}
    return found
