"""`clusters.h5`: the centroids, how they came about, and what features they belong to."""

import io
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ktransfer import files
from ktransfer.artifacts.centroids import SCHEMA, SOURCE, Projection, read_centroids
from ktransfer.artifacts.features import Features
from ktransfer.errors import UsageError, refuse_machine

from .algorithms.lloyd import Clustering


def write_centroids(
    path: Path, found: Clustering, projection: Projection | None, normalise: bool, features: Features
) -> None:
    """Write a clustering, whole or not at all; the same clustering gives the same bytes (no times are kept here)."""

    image = io.BytesIO()  # in memory: HDF5 may crash on a full disk
    with h5py.File(image, "w") as file:
        file["centroids"] = found.centroids
        file["counts"] = found.counts
        for name in ("objective", "empties", "splits", "moved", "attempts"):
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
                "points_used": found.points_used,
                "points_total": found.points_total,
                "start": found.start,
                "seed": found.seed,
                "attempt": found.attempt,
                "dissolved": found.dissolved,
                "spherical": found.spherical,
                "bytes_read": found.bytes_read,
                "engine": found.engine,
                "version": found.version,
            }
            | {name: str(features.attributes.get(name)) for name in SOURCE}
        )
    files.write_bytes(path, image.getvalue())


def read_start(path: Path, k: int, dim: int | None, normalise: bool) -> NDArray[np.float32]:
    """(k, d) float32 centroids to start from: a .npy of floats, or a clusters.h5 made without a PCA.

    A .npy is taken as it is: its numbers must be in the space of the rows after PCA and scaling.

    Args:
        path: the file.
        k: centroids wanted.
        dim: numbers of a row as k-means sees it; None: not known yet.
        normalise: whether rows are scaled to length 1.

    Raises:
        UsageError: not such a file, another shape, NaN or infinity, or centroids of differently prepared rows.
    """
    if path.suffix == ".h5":
        found = read_centroids(path)
        if found.projection is not None:
            raise UsageError(
                f"--start {path}: its centroids are coordinates of its own PCA; give centroids that were made without "
                "--pca"
            )
        if found.normalise != normalise:
            raise UsageError(
                f"--start {path}: made {'with' if found.normalise else 'without'} --normalise; do the same"
            )
        given: NDArray[Any] = found.centroids
    else:
        try:
            given = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(given, np.ndarray):
                raise ValueError("an archive")
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            refuse_machine(path, error)
            reason = " ".join(str(error).split())
            raise UsageError(f"--start {path}: not a .npy file of centroids ({reason})") from error
    wanted = f"({k}, {'d' if dim is None else dim})"
    if given.ndim != 2 or len(given) != k or dim not in (None, given.shape[1]) or given.dtype.kind != "f":
        raise UsageError(f"--start {path}: {given.dtype} of shape {given.shape}, must be floats of shape {wanted}")
    with np.errstate(over="ignore"):
        centroids = np.ascontiguousarray(given, np.float32)
    if not np.isfinite(centroids).all():
        raise UsageError(f"--start {path}: holds NaN, infinity or numbers beyond float32; give finite centroids")
    return centroids
