"""Principal components of the valid rows in one streaming pass."""

import numpy as np
from numpy.typing import NDArray

from ktransfer.artifacts.centroids import Projection
from ktransfer.artifacts.features import Features, valid_rows
from ktransfer.errors import UsageError
from ktransfer.progress import bar

from .engines.engine import BLOCK_NUMBERS

FLAT = 1e-6  # share of the largest variance below which there is only the rounding of float32 products to be whitened


def fit_projection(features: Features, dim: int, whiten: bool = False) -> Projection:
    """The first `dim` principal components of the valid rows; `whiten`: coordinates of variance 1 (divided by n).

    Memory: three d x d float64 matrices. Products of a block are float32, their sum over blocks float64.

    Raises:
        UsageError: unless 1 <= dim <= d and dim < number of valid rows; to whiten, a component without variance.
    """
    places = np.flatnonzero(features.valid)
    count, columns = len(places), features.rows.shape[1]
    if not 1 <= dim <= columns or dim >= count:
        raise UsageError(
            f"--pca {dim} must be at least 1, at most the {columns} numbers of a row and below the {count} valid rows"
        )
    size = max(columns, BLOCK_NUMBERS // columns)  # adding a product to `scatter` must cost less than making it
    # Shifted by a mean close to the true one, sums of squares lose no digits to a common offset. Rows from all over the
    # file, because its beginning may hold one class only.
    spread = places[:: -(-count // size)]
    shift = np.asarray(features.rows[spread]).mean(axis=0, dtype=np.float64).astype(np.float32)
    total = np.zeros(columns)
    scatter = np.zeros((columns, columns))
    read = valid_rows(features)
    with bar(count, "PCA", "rows") as shown:
        for start in range(0, count, size):
            block = read(start, min(start + size, count)).astype(np.float32) - shift
            total += block.sum(axis=0, dtype=np.float64)
            scatter += block.T @ block
            shown.update(len(block))
    rest = total / count
    scatter /= count
    scatter -= np.outer(rest, rest)
    values, vectors = np.linalg.eigh(scatter)
    components: NDArray[np.float64] = vectors[:, ::-1][:, :dim]
    # eigh leaves the sign open.
    components = components * np.sign(components[np.abs(components).argmax(axis=0), np.arange(dim)])
    variances = np.maximum(values[::-1][:dim], 0)
    share = variances / max(float(np.trace(scatter)), np.finfo(np.float64).tiny)
    varied = int((variances > FLAT * variances[0]).sum())
    if whiten and varied < dim:
        raise UsageError(
            f"--whiten: only {varied} of {dim} components vary; give --pca {max(varied, 1)} or no --whiten"
        )
    scale = 1 / np.sqrt(variances) if whiten else np.ones(dim)
    return Projection(
        (shift + rest).astype(np.float32),
        np.ascontiguousarray(components, np.float32),
        share,
        scale.astype(np.float32),
    )
