"""Several clusterings of the same features: each sees them along other directions, with another number of clusters.

A cluster tells less than log2(k) bits of an image. Several clusterings that differ tell more, at the same cost for the
network that learns them all (`retrain --objective multi`). The first is the run's `clusters.h5`; the others lie in
`views/`, each a file of the same kind whose projection is onto random directions instead of principal components.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng
from ktransfer.artifacts.centroids import Projection
from ktransfer.artifacts.features import Features, mean_row
from ktransfer.progress import say

FOLDER = "views"
SHARES = (0.25, 0.5, 1.0, 2.0)  # of k, one clustering after the other
DIRECTIONS = 8  # a clustering sees the numbers of a row along an eighth as many directions
FEWEST = 2


class View(NamedTuple):
    """A clustering to be made: `number` from 2, `k` clusters."""

    number: int
    k: int

    @property
    def file(self) -> str:
        """Where it goes, below the folder of the clusters."""
        return f"{FOLDER}/{self.number}.h5"


def views(k: int, count: int) -> list[View]:
    """Those after the first of `count` clusterings; their k is a quarter, half, once and twice `k` in turn."""
    return [View(place + 2, max(FEWEST, round(k * SHARES[place % len(SHARES)]))) for place in range(count - 1)]


def most_clusters(k: int, count: int) -> int:
    """The largest k of them all."""
    return max([k, *(view.k for view in views(k, count))])


def made_views(clusters: Path) -> list[Path]:
    """The files of the clusterings after the first, in order, in a folder of clusters."""
    found = [path for path in (clusters / FOLDER).glob("*.h5") if re.fullmatch("[0-9]+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem))


def random_projection(features: Features, pca: Projection | None, seed: int, number: int) -> Projection:
    """The rows around their mean (or their principal components) along random orthonormal directions.

    `explained` is NaN: what share of the variance they hold is not measured.
    """
    columns = features.rows.shape[1] if pca is None else pca.components.shape[1]
    directions = max(min(columns, FEWEST), columns // DIRECTIONS)
    words = rng.words(seed, "cluster/views", number, torch.arange(columns), directions)
    gaussian = torch.special.ndtri((words.double() + 0.5) / 2**32)
    axes: NDArray[np.float64] = np.linalg.qr(gaussian.numpy())[0]
    if pca is not None:
        axes = (pca.components * pca.scale).astype(np.float64) @ axes
    mean = mean_row(features) if pca is None else pca.mean
    unknown = np.full(directions, np.nan)
    return Projection(mean, np.ascontiguousarray(axes, np.float32), unknown, np.ones(directions, np.float32))


def make_views(folder: Path, wanted: list[View], make: Callable[[View, Path], None]) -> list[Path]:
    """Make those that are not there yet, one after the other; all their files."""
    for view in wanted:
        path = folder / view.file
        if not path.is_file():
            say(f"cluster: clustering {view.number}, k = {view.k}")
            path.parent.mkdir(exist_ok=True)
            make(view, path)
    return [folder / view.file for view in wanted]
