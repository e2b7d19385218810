"""Clusters for the eye: the images nearest to some centroids."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer.artifacts.features import Features
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.data.sheets import SIDE, Strip, draw_sheet
from ktransfer.data.sheets import save_sheet as save
from ktransfer.errors import UsageError
from ktransfer.progress import say

NEAREST = 16


def spread_of_sizes(sizes: NDArray[np.int64], most: int) -> list[int]:
    """At most `most` clusters that have rows, from the largest to the smallest at even steps of rank.

    With three or more, and an odd number, the median is among them; the lower index goes first where sizes are equal.
    """
    ranked = np.argsort(-sizes, kind="stable")[: int((sizes > 0).sum())]
    steps = np.linspace(0, len(ranked) - 1, min(most, len(ranked)))
    return [int(ranked[round(float(step))]) for step in steps]


def nearest_members(
    labels: NDArray[np.int32], distances: NDArray[np.float32], cluster: int, most: int = NEAREST
) -> NDArray[np.int64]:
    """The rows of a cluster that are nearest to its centroid, nearest first (the lower row where two are equally near).

    Args:
        labels: (n,) int32.
        distances: (n,) float32, of each row to the centroid of its label.
    """
    members = np.flatnonzero(labels == cluster)
    return members[np.argsort(distances[members], kind="stable")[:most]]


def images_of(spec: str | None, features: Features) -> Dataset | None:
    """The images behind the features, row for row; None where they cannot be had: a line says why."""
    if not spec:
        reason = "it is not known which images the features were made of; name them with --data"
    else:
        try:
            data = open_dataset(spec)
        except UsageError as error:
            reason = str(error)
        else:
            if data.fingerprint == features.attributes.get("fingerprint"):
                return data
            reason = f"{features.path} was not made of the images that {spec} holds now"
    say(f"cluster: no image sheet: {reason}")
    return None


def save_sheet(
    path: Path,
    data: Dataset,
    places: NDArray[np.int64],
    labels: NDArray[np.int32],
    distances: NDArray[np.float32],
    k: int,
    most: int,
) -> None:
    """Write the `NEAREST` images of at most `most` clusters as PNG, whole or not at all.

    Args:
        path: the file.
        data: all images.
        places: (n,) int64, the image of each clustered row.
        labels: (n,) int32 in [0, k).
        distances: (n,) float32, of each row to the centroid of its label.
        k: number of clusters.
        most: at least 1.
    """
    images = ImageLoader(data, SIDE, cache="off")
    sizes = np.bincount(labels, minlength=k)
    strips = []
    for cluster in spread_of_sizes(sizes, most):
        pixels, valid = images.batch(torch.from_numpy(places[nearest_members(labels, distances, cluster)]))
        count = int(sizes[cluster])
        caption = f"cluster {cluster}: {count:,} image{'' if count == 1 else 's'}"
        strips.append(Strip(caption, pixels.numpy(), valid.numpy()))
    save(path, draw_sheet(strips, NEAREST))
