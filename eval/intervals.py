"""95 % intervals of measures that have a formula for one; bootstrap.py is for the others."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964


def wilson(share: float, count: int) -> list[float]:
    """[low, high] of a share of `count` predictions, by Wilson's formula."""
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return [centre - half, centre + half]


def share_of(measure: str, hit: NDArray[Any]) -> dict[str, Any]:
    """The share of (m,) predictions, 1 or True where right, with Wilson's interval: {measure: ...,
    measure_interval}."""
    share = float(hit.astype(np.float64).mean())
    return {measure: share, f"{measure}_interval": wilson(share, len(hit))}


def mean_of(measure: str, each: NDArray[np.floating]) -> dict[str, Any]:
    """The mean of (m,) numbers in 0..1 with a normal interval within 0..1: {measure: ..., measure_interval}.

    One number says nothing of how far others would lie apart: its interval is 0..1.
    """
    value = float(each.mean())
    error = Z95 * float(each.std(ddof=1)) / len(each) ** 0.5 if len(each) > 1 else 1.0
    return {measure: value, f"{measure}_interval": [max(0.0, value - error), min(1.0, value + error)]}
