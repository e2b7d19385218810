"""The centroids of `clusters.h5`: reading them, and which of them is nearest to an image's features."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer.artifacts import hdf5
from ktransfer.artifacts.features import Features
from ktransfer.artifacts.stored import table
from ktransfer.errors import UsageError

SCHEMA = 1
SOURCE = ("teacher", "layer", "pooling", "transform")  # features that differ in one of these cannot be compared


class Projection(NamedTuple):
    """A PCA.

    Attributes:
        mean: (d,) float32.
        components: (d, p) float32, orthonormal columns by falling variance; the largest number of each is positive.
        explained: (p,) float64, the share of the total variance that each component holds.
        scale: (p,) float32, what each coordinate is multiplied by: 1, or 1 / its deviation to whiten.
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float32]
    explained: NDArray[np.float64]
    scale: NDArray[np.float32]


class Centroids(NamedTuple):
    """What is needed to label images.

    Attributes:
        centroids: (k, d) float32.
        projection: the PCA before, if any.
        normalise: whether rows were scaled to length 1.
        source: the attributes of the features that must agree.
        path: the file.
    """

    centroids: NDArray[np.float32]
    projection: Projection | None
    normalise: bool
    source: dict[str, str]
    path: Path


def read_centroids(path: Path) -> Centroids:
    """Read what `write_centroids` wrote.

    Raises:
        UsageError: missing, or not such a file.
    """
    try:
        with hdf5.opened(path) as file:
            attributes: dict[str, Any] = dict(file.attrs)
            if attributes["schema"] != SCHEMA:
                raise KeyError(f"schema {attributes['schema']}")
            centroids: NDArray[np.float32] = table(file, "centroids", "f", 2).astype(np.float32, copy=False)
            projection = _projection(file, centroids.shape[1]) if "pca" in file else None
            source = {name: str(attributes[name]) for name in SOURCE}
            return Centroids(centroids, projection, bool(attributes["normalise"]), source, path)
    except hdf5.ERRORS as error:
        hdf5.refuse_unreadable(path, error)
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not a clustering of ktransfer ({reason}); make it with ktransfer cluster") from error


def _projection(file: Any, columns: int) -> Projection:
    """The PCA of a file whose centroids have so many columns; ValueError where its parts do not fit together."""
    axes = {"mean": 1, "components": 2, "explained": 1, "scale": 1}
    # Files from before there was whitening have no scale.
    found = {name: table(file, f"pca/{name}", "f", axes[name]) for name in axes if f"pca/{name}" in file}
    found.setdefault("scale", np.ones(columns, np.float32))
    made = Projection(**found)
    shapes = [part.shape for part in made]
    if shapes != [(len(made.mean),), (len(made.mean), columns), (columns,), (columns,)]:
        raise ValueError(f"its PCA has the shapes {shapes}, the centroids {columns} columns")
    return made


def project(projection: Projection, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(b, d) float32 rows as (b, p) float32 coordinates around the mean."""
    projected = (rows - projection.mean) @ projection.components * projection.scale
    return projected.astype(np.float32, copy=False)


def nearest(made: Centroids, rows: NDArray[np.float32]) -> NDArray[np.int64]:
    """(b,) the centroid nearest to each of (b, d) rows as the teacher gives them: what `assign` labels them with.

    In float64; of centroids that are equally near, the first.
    """
    seen = rows if made.projection is None else project(made.projection, rows)
    if made.normalise:
        seen = seen / np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1e-12)
    points = made.centroids.astype(np.float64)
    origin = points.mean(axis=0)  # far from it squares would lose their digits
    points -= origin
    scores = np.einsum("ij,ij->i", points, points) - 2 * (seen.astype(np.float64) - origin) @ points.T
    found: NDArray[np.int64] = scores.argmin(axis=1)
    return found


def refuse_mismatch(features: Features, centroids: Centroids) -> None:
    """UsageError where the features are not of the kind that was clustered."""
    wrong = [
        f"{name} is '{features.attributes.get(name)}', not '{value}'"
        for name, value in centroids.source.items()
        if features.attributes.get(name) != value
    ]
    if wrong:
        raise UsageError(
            f"{features.path}: not made like the features behind {centroids.path}: {'; '.join(wrong)}; extract them "
            "in the same way"
        )
