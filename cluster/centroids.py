"""`clusters.h5`: the centroids, how they came about, and what features they belong to (DESIGN §4)."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from ktransfer import files
from ktransfer.errors import UsageError
from ktransfer.features import Features

from .kmeans import Clustering
from .projection import Projection

SCHEMA = 1
SOURCE = ("teacher", "layer", "pooling", "transform")  # features that differ in one of these cannot be compared


class Centroids(NamedTuple):
    """What is needed to label pictures.

    Attributes:
        centroids: (k, d) float32.
        projection: the PCA before, if any.
        normalise: whether rows were scaled to length 1.
        source: the attributes of the features that must agree.
    """

    centroids: NDArray[np.float32]
    projection: Projection | None
    normalise: bool
    source: dict[str, str]


def write_centroids(
    path: Path, found: Clustering, projection: Projection | None, normalise: bool, features: Features
) -> None:
    """Write a clustering, whole or not at all; the same clustering gives the same bytes (no times are kept here)."""

    image = io.BytesIO()  # in memory: HDF5 may crash on a full disk
    with h5py.File(image, "w") as file:
        file["centroids"] = found.centroids
        file["counts"] = found.counts
        for name in ("objective", "empties", "splits", "moved"):
            file[name] = np.asarray(getattr(found, name))
        if projection is not None:
            for name, value in zip(Projection._fields, projection, strict=True):
                file[f"pca/{name}"] = value
        file.attrs.update(
            {
                "schema": SCHEMA,
                "normalise": normalise,
                "final_objective": found.final_objective,
                "points": f"trained on {found.points_used} of {found.points_total}",
                "seed": found.seed,
                "engine": found.engine,
                "version": found.version,
            }
            | {name: str(features.attributes.get(name)) for name in SOURCE}
        )
    files.write_bytes(path, image.getvalue())


def read_centroids(path: Path) -> Centroids:
    """Read what `write_centroids` wrote.

    Raises:
        UsageError: missing, or not such a file.
    """
    try:
        with h5py.File(path, "r") as file:
            attributes: dict[str, Any] = dict(file.attrs)
            if attributes["schema"] != SCHEMA:
                raise KeyError(f"schema {attributes['schema']}")
            centroids: NDArray[np.float32] = np.asarray(file["centroids"], np.float32)
            projection = None
            if "pca" in file:
                projection = Projection(*(np.asarray(file[f"pca/{name}"]) for name in Projection._fields))
            source = {name: str(attributes[name]) for name in SOURCE}
            return Centroids(centroids, projection, bool(attributes["normalise"]), source)
    except (OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not a clustering of ktransfer ({reason}); make it with ktransfer cluster") from error
